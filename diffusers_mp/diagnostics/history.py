"""The file of a recorder: a column of numbers to six digits for each value, and the histograms of the last record."""

from pathlib import Path

from ..files import MISSING_IS_AN_ERROR, read_json, write_json


HISTOGRAM = "rotate/histogram/"


def save_history(path: str | Path, history: list[dict]) -> None:
    """Write the entries of `MagnitudeRecorder.history`, in place of a file that is there."""
    entries = [without_histograms(entry) for entry in history]
    names = dict.fromkeys(name for entry in entries for name in entry)
    columns = {name: [_rounded(entry.get(name)) for entry in entries] for name in names}
    last = history[-1] if history else {}
    histograms = {name: last[name] for name in last if name.startswith(HISTOGRAM)}
    write_json(path, {"columns": columns, "histograms": histograms}, indent=None)


def load_history(path: str | Path) -> list[dict]:
    """Read what `MagnitudeRecorder.save` has written.

    Args:
        path (str or Path): the file.
    Returns:
        list of dict: as `MagnitudeRecorder.history`.
    """
    file = read_json(path, MISSING_IS_AN_ERROR, keys=("columns", "histograms"))
    columns = file["columns"]
    history = [
        {name: column[row] for name, column in columns.items() if column[row] is not None}
        for row in range(len(columns.get("step", [])))
    ]
    if history:
        history[-1] |= file["histograms"]
    return history


def without_histograms(entry: dict) -> dict:
    """An entry of numbers alone."""
    return {name: value for name, value in entry.items() if not name.startswith(HISTOGRAM)}


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")
