"""Is one learning rate right for all sizes? Sweeps over widths and depths on crops of photographs.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/rates.py --part $part --parts 2 & done
    python benchmarks/quality/rates.py --report

    A          DiT with Adam: one rate for all parameters
    A/sqrt(n)  the same, each rate divided by the square root of the fan-in, as `parameter_groups` does for unit rows;
               the table of classes by that of the width
    A muP      rates of maps whose fan-in grows are divided by width / 96, and so is the spread at the start of the one
               map whose spread does not fall by itself; the other maps start as muP asks, heads keep their size
    F          rotation, rates of `parameter_groups`

1000 updates of 32 at each size. Each arm has one grid of rates for all sizes, by factors of 2; where the best is at an
end, the grid goes on. The best rate is the least of a parabola through log losses of all seeds over log2 of the rate,
of rates whose loss is within a quarter of the best. Run again until nothing is left to do.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import short_runs
from crops import crops
from shared import BENCHMARKS, table
from torch import nn

from diffusers_mp import parameter_groups


RECORDS = BENCHMARKS / "records" / "rates.jsonl"
FIGURE = BENCHMARKS.parent / "docs" / "results" / "rates.png"
BASE_WIDTH, HEAD_DIM, BATCH_SIZE, SEEDS = 96, 16, 32, (100, 101)
ARMS = {"A": 0.01, "A/sqrt(n)": 0.1, "A muP": 0.01, "F": 0.1}
GRID = (-2, -1, 0, 1, 2)
# Of one depth, of one width.
WIDTHS, DEPTHS = tuple((width, 6) for width in (48, 96, 192)), tuple((96, depth) for depth in (3, 6, 12))
SIZES = tuple(dict.fromkeys((*WIDTHS, *DEPTHS)))
# Losses that are further from the best than this say nothing of where the best is.
WITHIN, NUM_BOOTSTRAPS = 1.25, 2000


class Run(NamedTuple):
    """One training."""

    arm: str
    width: int
    num_layers: int
    learning_rate: float
    seed: int
    num_updates: int = 1000


RUNS = [
    Run(arm, *size, middle * 2.0**power, seed)
    for seed, size, (arm, middle), power in itertools.product(SEEDS, SIZES, ARMS.items(), GRID)
]


# Training.


def groups_of_arm(arm: str, width: int):
    """Parameter groups of a model of an arm, from the model and a rate."""

    def by_root_of_fan_in(model: nn.Module, lr: float) -> list[dict]:
        fan_ins = {id(layer.weight): layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)}
        groups = defaultdict(list)
        for parameter in model.parameters():
            groups[fan_ins.get(id(parameter), width)].append(parameter)
        return [{"params": params, "lr": lr / math.sqrt(fan_in)} for fan_in, params in groups.items()]

    def of_mup(model: nn.Module, lr: float) -> list[dict]:
        grows = {id(layer.weight) for layer in growing_maps(model, width)}
        groups = defaultdict(list)
        for parameter in model.parameters():
            groups[id(parameter) in grows].append(parameter)
        return [{"params": groups[False], "lr": lr}, {"params": groups[True], "lr": lr * BASE_WIDTH / width}]

    return {"A/sqrt(n)": by_root_of_fan_in, "A muP": of_mup}.get(arm, parameter_groups)


def growing_maps(model: nn.Module, width: int) -> list[nn.Linear]:
    """Maps whose fan-in grows with the width: neither of patches nor of the features of a timestep."""
    ends = (model.patch_embed, model.conditioning_embedder.time_embedder.linear_1)
    excluded = {id(layer) for end in ends for layer in end.modules()}
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) and id(layer) not in excluded]


def build(arm: str):
    """How the model of an arm is made."""

    def make(run: short_runs.Run, images):
        model = short_runs.make_model(run, images, HEAD_DIM)
        if arm == "A muP":
            # DiT's 0.02 whatever the width is.
            weight = model.conditioning_embedder.time_embedder.linear_2.weight
            weight.data.mul_(math.sqrt(BASE_WIDTH / run.width))
        return model

    return make


def train(run: Run) -> dict:
    """The record of a run."""
    configuration, kind = ("F", "rotate") if run.arm == "F" else ("A", "shift")
    sizes = {"width": run.width, "num_layers": run.num_layers, "num_updates": run.num_updates}
    return short_runs.train(
        short_runs.Run(configuration, kind, run.learning_rate, run.seed, **sizes),
        data=crops,
        build=build(run.arm),
        groups=groups_of_arm(run.arm, run.width),
        batch_size=BATCH_SIZE,
    )


# What follows from the records.


def losses_of(records: list[dict], arm: str, size: tuple[int, int]) -> dict[float, dict[int, float]]:
    """Losses of a size by rate and seed; infinite where a run failed."""
    losses = defaultdict(dict)
    for record in records:
        if (record["arm"], record["width"], record["num_layers"]) == (arm, *size):
            loss = record.get("validation_loss", math.inf)
            losses[record["learning_rate"]][record["seed"]] = loss if math.isfinite(loss) else math.inf
    return dict(sorted(losses.items()))


def extended(records: list[dict]) -> list[Run]:
    """Runs at the next rate wherever the best of a whole grid is at its end."""
    runs = []
    for arm, size in itertools.product(ARMS, SIZES):
        losses = losses_of(records, arm, size)
        if len(losses) < len(GRID) or any(set(of_rate) != set(SEEDS) for of_rate in losses.values()):
            continue
        best = min(losses, key=lambda rate: statistics.mean(losses[rate].values()))
        if best == min(losses):
            runs += [Run(arm, *size, best / 2, seed) for seed in SEEDS]
        elif best == max(losses):
            runs += [Run(arm, *size, best * 2, seed) for seed in SEEDS]
    return runs


def best_log_rate(losses: dict[float, dict[int, float]], seeds: Sequence[int]) -> float:
    """log2 of the rate at which the parabola through log losses of these seeds, one or more times each, is least.

    Where the parabola has no least value between the rates, the best rate of the grid.
    """
    means = {rate: statistics.mean(of_rate[seed] for seed in seeds) for rate, of_rate in losses.items()}
    best = min(means, key=means.get)
    points = [
        (math.log2(rate), math.log(losses[rate][seed]))
        for rate, seed in itertools.product(losses, seeds)
        if losses[rate][seed] <= WITHIN * means[best]
    ]
    rates = sorted({rate for rate, _ in points})
    if len(rates) >= 3:
        curvature, slope, _ = np.polyfit(*zip(*points, strict=True), 2)
        if curvature > 0 and rates[0] <= -slope / (2 * curvature) <= rates[-1]:
            return -slope / (2 * curvature)
    return math.log2(best)


def slope_of(records: list[dict], arm: str, sizes: tuple) -> float:
    """Slope of log2 of the best rate over log2 of the width or depth."""
    return float(_slopes(sizes, [best_log_rate(losses_of(records, arm, size), SEEDS) for size in sizes]))


def bootstrap(records: list[dict], sizes: tuple) -> dict[str, np.ndarray]:
    """Slopes of each arm, seeds of each size drawn anew."""
    generator, found = np.random.default_rng(0), {}
    for arm in ARMS:
        losses = [losses_of(records, arm, size) for size in sizes]
        if all(losses):
            drawn = []
            for of_size in losses:
                samples = itertools.combinations_with_replacement(SEEDS, len(SEEDS))
                best = {sample: best_log_rate(of_size, sample) for sample in samples}
                seeds = generator.choice(SEEDS, (NUM_BOOTSTRAPS, len(SEEDS)))
                drawn.append([best[tuple(sorted(sample))] for sample in seeds.tolist()])
            found[arm] = _slopes(sizes, drawn)
    return found


def _slopes(sizes: tuple, best_log_rates: list) -> np.ndarray:
    lengths = [math.log2(width * depth) for width, depth in sizes]
    return np.polyfit(lengths, np.array(best_log_rates), 1)[0]


def report(records: list[dict]) -> None:
    """Losses, best rates in our units and per entry, and slopes with their intervals."""
    rows = []
    for arm, size in itertools.product(ARMS, SIZES):
        losses = losses_of(records, arm, size)
        if not losses:
            continue
        best = 2 ** best_log_rate(losses, SEEDS)
        per_entry = {"A": best, "A muP": best * BASE_WIDTH / size[0]}.get(arm, best / math.sqrt(size[0]))
        means = {rate: statistics.mean(of_rate.values()) for rate, of_rate in losses.items()}
        cells = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in means.items())
        rows.append([arm, *size, f"{best:.3g}", f"{per_entry:.2g}", f"{min(means.values()):.4f}", cells])
    columns = [
        "",
        "width",
        "depth",
        "best rate",
        "per entry of a hidden map",
        "loss at the best of the grid",
        "losses",
    ]
    print(table(columns, rows), "\n")
    rows = []
    for name, sizes in (("width", WIDTHS), ("depth", DEPTHS)):
        slopes = bootstrap(records, sizes)
        for arm, drawn in slopes.items():
            low, high = np.percentile(drawn, (2.5, 97.5))
            cells = [name, arm, f"{slope_of(records, arm, sizes):+.2f}", f"{low:+.2f} to {high:+.2f}", ""]
            if arm != "F" and "F" in slopes:
                low, high = np.percentile(drawn - slopes["F"], (2.5, 97.5))
                cells[-1] = f"{low:+.2f} to {high:+.2f}"
            rows.append(cells)
    print(table(["over", "", "slope of the best rate", "95 % interval", "less F's"], rows))
    hours = sum(record["seconds"] for record in records) / 3600
    print(f"\n{len(records)} runs, {hours:.1f} core hours.")


def draw(records: list[dict]) -> None:
    """Loss over rate, a panel for each arm, a line for each width."""
    figure, axes = plt.subplots(1, len(ARMS), figsize=(12, 3.4), sharey=True, layout="constrained")
    for axis, arm in zip(axes, ARMS, strict=True):
        for number, size in enumerate(WIDTHS):
            losses = losses_of(records, arm, size)
            means = {rate: statistics.mean(of_rate.values()) for rate, of_rate in losses.items()}
            axis.plot(list(means), list(means.values()), "o-", color=f"C{number}", label=f"width {size[0]}")
        axis.set(title=arm, xlabel="learning rate", xscale="log")
        axis.grid(alpha=0.3)
    lowest = [
        record["validation_loss"] for record in records if math.isfinite(record.get("validation_loss", math.inf))
    ]
    axes[0].set(ylabel="validation loss", ylim=(0.98 * min(lowest), 1.6 * min(lowest)))
    axes[0].legend()
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main():
    records = short_runs.make_records(
        RECORDS, [*RUNS, *extended(short_runs.read_records(RECORDS))], train, __doc__.split("\n")[0]
    )
    report(records)
    draw(records)


if __name__ == "__main__":
    main()
