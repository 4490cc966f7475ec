"""Fréchet distances of a sweep as a map of numbers; needs matplotlib."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from .outputs import MARK


def draw_heat_map(path: Path, results: dict[str, Any]) -> None:
    """The first extractor's distances over guidance: by width with a panel for each number of steps, or by steps.

    Args:
        path (Path): the PNG file.
        results (dict): as `evaluate.py` writes them: `settings`, `cells` and the `best` of these.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    def values(key):
        return sorted({cell[key] for cell in results["cells"]})

    by_width = len({cell["ema_std"] for cell in results["cells"]}) > 1
    row_key, row_label = ("ema_std", "width of the average") if by_width else ("num_inference_steps", "sampling steps")
    rows, columns = values(row_key), values("guidance_scale")
    panels = values("num_inference_steps") if by_width else [None]
    distances = [cell["metrics"][0]["frechet_distance"] for cell in results["cells"]]
    low, high = min(distances), max(distances)
    norm = LogNorm(low, high) if 0 < 4 * low < high else Normalize(low, high)
    width = len(panels) * (0.8 * len(columns) + 0.4) + 2.2
    figure = Figure(figsize=(max(width, 5), max(0.6 * len(rows) + 1.6, 2.6)), layout="constrained")
    for axes, steps in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        grid = [[math.nan] * len(columns) for _ in rows]
        for cell in results["cells"]:
            if steps is None or cell["num_inference_steps"] == steps:
                row, column = rows.index(cell[row_key]), columns.index(cell["guidance_scale"])
                value = grid[row][column] = cell["metrics"][0]["frechet_distance"]
                is_best = cell == results["best"]
                # Bright is small: black on it, white on dark.
                colour = "black" if norm(value) < 0.5 else "white"
                weight = "bold" if is_best else "normal"
                axes.text(column, row, f"{value:.4g}", ha="center", va="center", color=colour, weight=weight)
                if is_best:
                    frame = {"fill": False, "edgecolor": "tab:red", "linewidth": 3, "clip_on": False}
                    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
        image = axes.imshow(grid, cmap="viridis_r", norm=norm, aspect="auto")
        axes.set_facecolor("lightgrey")
        axes.set_xticks(range(len(columns)), [f"{scale:g}" for scale in columns])
        axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
        axes.set(xlabel="guidance scale", title=None if steps is None else f"{steps} steps")
    figure.axes[0].set_ylabel(row_label)
    name = results["settings"]["extractors"][0]["id"].rstrip("/").split("/")[-1]
    # Of its own choice matplotlib writes 6 x 10^-1.
    ticks = np.unique((np.geomspace if isinstance(norm, LogNorm) else np.linspace)(low, high, 5))
    bar = figure.colorbar(image, ax=figure.axes, ticks=ticks, format="%.3g", label=f"Fréchet distance\n({name})")
    bar.minorticks_off()
    figure.savefig(path, dpi=150, metadata={"Software": None} | MARK)
