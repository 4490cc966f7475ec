"""Figures of what a `MagnitudeRecorder` has recorded, of EMA widths and of samples, as matplotlib figures.

    figure = plot_blocks({"A": "run_a/logs/magnitudes.json", "E": "run_e/logs/magnitudes.json"})
    figure.savefig("blocks.png")

matplotlib is not among the package's requirements: it is imported when the first figure is made. A record is the path
of a file that `MagnitudeRecorder.save` has written, or a recorder's `history`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .history import load_history


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

Record = str | Path | list[dict]

# Members of a list of modules, which are a model's blocks; of a block with several outputs each of them.
BLOCKS = r".*\.\d+(/\d+)?"
# At the width of a page (about 7 inches) all letters are as large as its text.
_WIDTH, _DPI = 7.0, 150
_QUANTITIES = {
    "magnitude/activations": "magnitude (RMS) of the output",
    "magnitude/weights": "magnitude (RMS) of the weights",
    "magnitude/gradients": "magnitude (RMS) of the gradient",
    "relative_update": "relative update, RMS[new - old] / RMS[old]",
    "rotate/rms": "angles of rotation, RMS in radians",
    "rotate/max": "largest angle of rotation, radians",
    "gate/mean": "mean gate",
    "gate/rms": "gate (RMS)",
    "scale/rms": "scale (RMS)",
    "shift/rms": "shift (RMS)",
}


def plot_blocks(
    records: Mapping[str, Record], quantity: str = "magnitude/activations", modules: str = BLOCKS
) -> "Figure":
    """A quantity of each block in the order of depth, at the first record and at the last, one line for each run.

    As Figure 5 of arXiv 2505.19122, with the magnitude of what blocks return.

    Args:
        records (dict): names of the runs to their records.
        quantity (str): first part of a value's name, such as "magnitude/activations" or "relative_update".
        modules (str): which modules, by a regular expression that matches the rest of the name.
    Returns:
        matplotlib.figure.Figure: to be saved or shown.
    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a record has no such value.
    """
    figure, axes = _figure()
    num_blocks = 0
    for index, (name, record) in enumerate(records.items()):
        history = _history(record)
        names = _names(history, quantity, modules)
        num_blocks = max(num_blocks, len(names))
        # The first record lacks some quantities, such as gradients where the output starts at zero.
        first = next((entry for entry in history if entry.get(names[-1])), history[-1])
        for entry, style in ((first, {"linestyle": ":", "markerfacecolor": "white"}), (history[-1], {})):
            label = f"{name}, update {entry['step']:,}"
            values = [_visible(entry, key) for key in names]
            axes.plot(
                range(1, len(names) + 1),
                values,
                color=f"C{index}",
                # The earlier they are drawn, the larger: lines that coincide are seen beneath each other.
                marker="osD^v"[index % 5],
                ms=4 + 1.5 * (len(records) - 1 - index),
                label=label,
                **style,
            )
    axes.set(xlabel="block", ylabel=_QUANTITIES.get(quantity, quantity))
    axes.set_xticks(range(1, num_blocks + 1, 1 + num_blocks // 16))
    _scale(axes, quantity)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def plot_over_time(
    records: Mapping[str, Record], quantity: str = "magnitude/activations", modules: str = BLOCKS
) -> "Figure":
    """A quantity over updates, a panel for each run and a line for each module, coloured by depth.

    Args:
        records (dict): names of the runs to their records.
        quantity (str): first part of a value's name, such as "magnitude/activations", "rotate/rms" or "gate/mean".
        modules (str): which modules, by a regular expression that matches the rest of the name.
    Returns:
        matplotlib.figure.Figure: to be saved or shown.
    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a record has no such value.
    """
    histories = {name: _history(record) for name, record in records.items()}
    figure, axes = _figure(columns=len(histories), sharey=True)
    panels = [axes] if len(histories) == 1 else list(axes)
    for panel, (name, history) in zip(panels, histories.items(), strict=True):
        names = _names(history, quantity, modules)
        for key, color in zip(names, _colors(len(names)), strict=True):
            points = [(entry["step"], _visible(entry, key)) for entry in history]
            label = key.removeprefix(f"{quantity}/")
            panel.plot(*zip(*points, strict=True), color=color, marker="o", ms=2, label=label)
        panel.set(xlabel="update", title=name)
    panels[0].set_ylabel(_QUANTITIES.get(quantity, quantity))
    for panel in panels:
        _scale(panel, quantity)
    _depth_legend(figure, panels[-1])
    return figure


def plot_angles(records: Mapping[str, Record], sites: str = ".*") -> "Figure":
    """Histograms of each modulation's angles at the last record, in order of depth, a panel for each run.

    A row is the histogram of one modulation, its counts shown as colours relative to the highest of them.

    Args:
        records (dict): names of the runs to their records.
        sites (str): which modulations, by a regular expression that matches the name.
    Returns:
        matplotlib.figure.Figure: to be saved or shown.
    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a record has no angles.
    """
    import numpy as np

    histories = {name: _history(record) for name, record in records.items()}
    names = {name: _names(history[-1:], "rotate/histogram", sites) for name, history in histories.items()}
    figure, grid = _figure(
        height=1.2 + 0.2 * max(map(len, names.values())), columns=len(histories), sharex=True, squeeze=False
    )
    reach = 0.0
    for panel, (name, history) in zip(grid[0], histories.items(), strict=True):
        counts = np.array([history[-1][key] for key in names[name]], dtype=float)
        edges = np.linspace(-np.pi, np.pi, counts.shape[1] + 1)
        # One angle in a thousand may lie outside of what is shown.
        share = counts.sum(axis=0) / counts.sum()
        up_to = share.cumsum()
        inside = (up_to > 0.0005) & (up_to - share < 0.9995)
        reach = max(reach, *abs(edges[:-1][inside]), *abs(edges[1:][inside]))
        colors = panel.pcolormesh(
            edges, range(len(counts) + 1), counts / counts.max(axis=1, keepdims=True), vmin=0.0, vmax=1.0
        )
        labels = [key.removeprefix("rotate/histogram/") for key in names[name]]
        panel.set_yticks([row + 0.5 for row in range(len(labels))], labels, fontsize="small")
        panel.invert_yaxis()
        panel.set(xlabel="angle, radians", title=f"{name}, update {history[-1]['step']:,}")
    grid[0][0].set_xlim(-reach, reach)
    figure.colorbar(colors, ax=grid[0][-1], label="count / highest count of the row")
    return figure


def plot_ema_widths(curves: Mapping[str, Mapping[float, float]], ylabel: str) -> "Figure":
    """A score over the width of the average of weights, the best of each run marked.

    Args:
        curves (dict): names of the runs to their scores by relative width, lower being better (loss, FID).
        ylabel (str): what the score is.
    Returns:
        matplotlib.figure.Figure: to be saved or shown.
    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure, axes = _figure()
    for name, scores in curves.items():
        widths = sorted(scores)
        best = min(widths, key=lambda width: (math.isnan(scores[width]), scores[width]))
        (line,) = axes.plot(widths, [scores[width] for width in widths], marker="o", ms=4)
        line.set_label(f"{name}, best {scores[best]:.4g} at {best:g}")
        axes.plot(best, scores[best], marker="*", ms=14, color=line.get_color())
    axes.set(xlabel="relative width of the average (fraction of training)", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_samples(rows: Mapping[str, Sequence["Image"]], columns: Sequence[Any]) -> "Figure":
    """A grid of samples, a row for each run and a column for each class.

    Args:
        rows (dict): names of the rows to their images.
        columns (sequence): headings of the columns.
    Returns:
        matplotlib.figure.Figure: to be saved or shown.
    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a row has not one image for each column.
    """
    for name, images in rows.items():
        if len(images) != len(columns):
            raise ValueError(
                f"`rows` must have {len(columns)} images each, as `columns` has, got {len(images)} in {name!r}."
            )
    figure, grid = _figure(
        height=_WIDTH * len(rows) / len(columns) + 0.3, rows=len(rows), columns=len(columns), squeeze=False
    )
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, cmap="gray", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axes, heading in zip(grid[0], columns, strict=True):
        axes.set_title(str(heading), fontsize="medium")
    return figure


def _figure(height: float = 4.0, rows: int = 1, columns: int = 1, **options) -> tuple["Figure", Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: `pip install matplotlib`") from error
    # Without pyplot: no window, no backend, nothing to close.
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _history(record: Record) -> list[dict]:
    history = record if isinstance(record, list) else load_history(record)
    if not history:
        raise ValueError(f"a record must have entries, got none in {record!r}.")
    return history


def _names(history: list[dict], quantity: str, modules: str) -> list[str]:
    """Names of a quantity's values in the order of depth: of the numbers in them, and else as they first come."""
    names = dict.fromkeys(
        name
        for entry in history
        for name in entry
        if name.startswith(f"{quantity}/") and re.fullmatch(modules, name[len(quantity) + 1 :])
    )
    if not names:
        raise ValueError(f"a record must have values {quantity}/… of modules that match {modules!r}, got none.")
    ranks = {}

    def depth(name: str) -> list[int]:
        # Words and numbers take turns, so that words are compared with words.
        pieces = enumerate(re.split(r"(\d+)", name))
        return [int(piece) if index % 2 else ranks.setdefault(piece, len(ranks)) for index, piece in pieces]

    return sorted(names, key=depth)


def _colors(number: int) -> list:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(1, number - 1)) for index in range(number)]


def _visible(entry: dict, name: str) -> float:
    """A value; nan where there is none, and for zeros, such as gradients of blocks below an output that is zero."""
    return entry.get(name) or float("nan")


def _scale(axes: "Axes", quantity: str) -> None:
    """Equal steps for equal factors, with plain numbers, unless the quantity has a sign."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.grid(alpha=0.3)
    if quantity.endswith("/mean"):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if high / low < 4 else (1, 1.5, 2, 3, 5, 7)
    if high / low > 20:
        subs = (1, 2, 5) if high / low < 1000 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _depth_legend(figure: "Figure", axes: "Axes") -> None:
    """At most twelve of the lines by name: the others lie between them, in colour as in depth."""
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    shown = entries[:: -(-len(entries) // 12)]
    figure.legend(*zip(*shown, strict=True), loc="outside right center", frameon=False, fontsize="small")
