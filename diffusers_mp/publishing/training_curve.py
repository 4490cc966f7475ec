"""The log of a training run as a curve: rows of a table, an image, and the seconds that its updates took."""

import json
import math
from collections.abc import Mapping
from pathlib import Path


NUM_ROWS = 10
LOGGING_DIR, LOG_NAME = "logs", "metrics.jsonl"


def log_file(run: Path, arguments: Mapping) -> Path:
    """Where the log of a run lies, there or not, by the arguments that its folder has.

    Raises:
        ValueError: if the arguments, which are a file's content, name a folder elsewhere.
    """
    path = run / (arguments.get("logging_dir") or LOGGING_DIR) / LOG_NAME
    if not path.resolve().is_relative_to(run.resolve()):
        raise ValueError(
            f"{run / 'training_arguments.json'} must have a `logging_dir` inside that folder, got "
            f"{arguments['logging_dir']!r}."
        )
    return path


def read_log(path: Path) -> list[dict]:
    """Entries of the log in order, without a last line that a kill cut off; none without a file."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    entries = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]
    return sorted(entries, key=lambda entry: entry["step"])


def curve_rows(log: list[dict]) -> list[tuple]:
    """Mean training loss of up to ten equal stretches of the log, and the last validation loss in each."""
    steps = [entry["step"] for entry in log if "train/loss" in entry]
    if not steps:
        return []
    num_rows = min(NUM_ROWS, len(steps))
    ends = [steps[math.ceil(len(steps) * (row + 1) / num_rows) - 1] for row in range(num_rows)]
    rows = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        stretch = [entry for entry in log if start < entry["step"] <= end]
        losses = [entry["train/loss"] for entry in stretch if "train/loss" in entry]
        validation = [entry["validation/loss"] for entry in stretch if "validation/loss" in entry]
        rows.append((f"{end:,}", sum(losses) / len(losses), validation[-1] if validation else ""))
    return rows


def draw_curve(log: list[dict], path: Path) -> bool:
    """Draw the losses over updates in place of an earlier image; False without matplotlib."""
    path.unlink(missing_ok=True)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    values = [math.inf]
    for key, label in (("train/loss", "training"), ("validation/loss", "validation, averaged weights")):
        points = [(entry["step"], entry[key]) for entry in log if math.isfinite(entry.get(key, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "validation/loss" else None)
            values += [loss for _, loss in points]
    is_log = 0 < min(values) < math.inf
    axes.set(xlabel="update", ylabel="loss", yscale="log" if is_log else "linear")
    axes.yaxis.set_major_formatter("{x:g}")
    # Between powers of ten there is room for labels within a decade or two.
    has_room = is_log and max(values[1:]) < 50 * min(values)
    axes.yaxis.set_minor_formatter("{x:g}" if has_room else NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.13, top=0.96)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True


def seconds_of_updates(log: list[dict], total_batch_size: float) -> float | None:
    """Seconds of all updates, from the images per second that were logged; None if none were."""
    seconds, previous = 0.0, 0
    for entry in log:
        if entry.get("train/images_per_second"):
            seconds += (entry["step"] - previous) * total_batch_size / entry["train/images_per_second"]
            previous = entry["step"]
    return seconds or None
