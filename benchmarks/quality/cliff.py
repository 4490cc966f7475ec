"""At which rates do E and F fail? Trainings on digits from good rates to absurd ones, and both at their best rates.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/cliff.py --part $part --parts 2 & done
    python benchmarks/quality/cliff.py --report

A run fails if a loss is not finite, or if its average ends no better than a model that predicts nothing, whose loss
is 1. The best rate of an arm is that of the lowest mean loss over the seeds of the first table in which no run failed.
"""

import itertools
import math
import statistics
from collections import defaultdict

import matplotlib.pyplot as plt
from scipy.stats import t as student
from shared import BENCHMARKS, table
from short_runs import Run, make_records, read_records, train_watched


RECORDS = BENCHMARKS / "records" / "cliff.jsonl"
ARMS = list(itertools.product("EF", ("shift", "rotate")))
RATES, SEEDS, FRESH_SEEDS = (0.025, 0.05, 0.1, 0.2, 0.4), range(100, 105), range(8)
FIGURE = BENCHMARKS.parent / "docs" / "results" / "cliff.png"
NOTHING, LARGEST_DRAWN = 1.0, 1e6
CLIFF = [
    Run(configuration, kind, rate, seed) for seed, rate, (configuration, kind) in itertools.product(SEEDS, RATES, ARMS)
]
# At depth, and in half precision.
DEEP = [
    Run(configuration, kind, rate, seed, num_layers=24, num_updates=500)
    for seed, rate, (configuration, kind) in itertools.product((100, 101), (0.1, 0.2), ARMS)
]
HALF = [run._replace(precision="bf16") for run in CLIFF if run.learning_rate in (0.1, 0.2) and run.seed < 102]


def has_failed(record: dict) -> bool:
    """Whether a run ended early, or has learned nothing."""
    return not record["ended"] or not record["validation_loss"] < NOTHING


def of_arm(records: list[dict], arm: tuple[str, str]) -> list[dict]:
    """The records of a configuration and a kind of modulation."""
    return [record for record in records if (record["configuration"], record["kind"]) == arm]


def best_rates(records: list[dict]) -> dict[tuple[str, str], float]:
    """The best rate of each arm that has one."""
    best = {}
    for arm in ARMS:
        losses = {}
        for rate in RATES:
            found = [record for record in of_arm(records, arm) if record["learning_rate"] == rate]
            found = [record for record in found if is_cliff(record) and record["seed"] in SEEDS]
            if found and not any(map(has_failed, found)):
                losses[rate] = statistics.mean(record["validation_loss"] for record in found)
        if losses:
            best[arm] = min(losses, key=losses.get)
    return best


def is_cliff(record: dict) -> bool:
    """Whether a record is of the size and precision of the first table."""
    sizes = ("width", "num_layers", "num_updates", "precision")
    return all(record[name] == getattr(CLIFF[0], name) for name in sizes)


def paired(records: list[dict]) -> list[Run]:
    """Runs of fresh seeds, each arm at its best rate; none before the first table is whole."""
    done = {tuple(record[name] for name in Run._fields) for record in records}
    if not all(tuple(run) in done for run in CLIFF):
        return []
    best = best_rates(records)
    return [Run(*arm, best[arm], seed) for seed, arm in itertools.product(FRESH_SEEDS, best)]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval."""
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def report_failures(records: list[dict], heading: str) -> None:
    """How many runs failed, how, and what the others came to."""
    rows = []
    for arm, rate in itertools.product(ARMS, sorted({record["learning_rate"] for record in records})):
        found = [record for record in of_arm(records, arm) if record["learning_rate"] == rate]
        if not found:
            continue
        stopped = sorted(record["update"] for record in found if not record["ended"])
        lost = [record for record in found if record["ended"] and has_failed(record)]
        losses = [record["validation_loss"] for record in found if not has_failed(record)]
        rows.append(
            [
                *(*arm, f"{rate:g}", f"{len(stopped) + len(lost)} of {len(found)}"),
                ", ".join(map(str, stopped)) or "",
                len(lost) or "",
                f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})" if losses else "",
                *(f"{max(record[name] for record in found):.3g}" for name in ("largest_rms", "largest_hidden")),
                f"{max(record['largest_loss'] for record in found):.3g}",
            ]
        )
    columns = ["", "modulation", "rate", "failed", "not finite at update", "learned nothing"]
    print(f"{heading}\n")
    print(
        table(
            [
                *columns,
                "loss of the others, mean (range)",
                "largest RMS of a token",
                "within a branch",
                "largest loss",
            ],
            rows,
        ),
        "\n",
    )


def report_pairs(records: list[dict]) -> None:
    """F against E on fresh seeds, each at its best rate."""
    best, rows = best_rates(records), []
    for kind in ("shift", "rotate"):
        losses = defaultdict(dict)
        for configuration in "EF":
            arm = (configuration, kind)
            for record in of_arm(records, arm):
                if record["seed"] in FRESH_SEEDS and is_cliff(record) and record["learning_rate"] == best.get(arm):
                    losses[record["seed"]][configuration] = record.get("validation_loss", math.inf)
        pairs = [of_seed for of_seed in losses.values() if len(of_seed) == 2]
        if len(pairs) < 2:
            continue
        mean, half = interval([100 * (of_seed["F"] / of_seed["E"] - 1) for of_seed in pairs])
        means = [f"{statistics.mean(of_seed[name] for of_seed in pairs):.4f} at {best[name, kind]:g}" for name in "EF"]
        rows.append([kind, len(pairs), *means, f"{mean:+.2f} ± {half:.2f}", f"{mean + half:+.2f}"])
    if rows:
        print("Each at its best rate, fresh seeds\n")
        print(table(["modulation", "seeds", "E", "F", "F over E, %", "upper end"], rows))


def draw(records: list[dict]) -> None:
    """Loss over rate with each modulation, and the largest token on the way; a mark for each run."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")

    def beside(records):
        return [record["learning_rate"] * {"E": 0.95, "F": 1.05}[record["configuration"]] for record in records]

    for number, configuration in enumerate("EF"):
        style = {"color": f"C{number}", "marker": "os"[number], "linestyle": "", "alpha": 0.6}
        for axis, kind in zip(axes, ("shift", "rotate"), strict=False):
            found = of_arm(records, (configuration, kind))
            learned = [record for record in found if not has_failed(record)]
            failed = [record for record in found if has_failed(record)]
            losses = [record["validation_loss"] for record in learned]
            axis.plot(beside(learned), losses, label=configuration, **style)
            axis.plot(beside(failed), [NOTHING * (1.4, 1.8)[number]] * len(failed), **{**style, "marker": "x"})
            axis.set(title=f"scale, {kind}, gate", ylabel="validation loss (x: failed)", yscale="log")
        of_both = [record for record in records if record["configuration"] == configuration]
        # What is not finite is drawn at the top.
        largest = [min(record["largest_rms"], LARGEST_DRAWN) for record in of_both]
        axes[2].plot(beside(of_both), largest, label=configuration, **style)
    axes[2].set(title="largest RMS of a token on the way", yscale="log", ylim=(1, 3 * LARGEST_DRAWN))
    for axis in axes:
        axis.set(xlabel="learning rate", xscale="log", xticks=RATES, xticklabels=[f"{rate:g}" for rate in RATES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(loc="center left")
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main():
    runs = [*CLIFF, *paired(read_records(RECORDS)), *HALF, *DEEP]
    records = make_records(RECORDS, runs, train_watched, __doc__.split("\n")[0])
    report_failures(
        [record for record in records if is_cliff(record) and record["seed"] in SEEDS],
        "Width 96, 4 blocks, 1500 updates of 64",
    )
    for runs, heading in ((DEEP, "24 blocks, 500 updates"), (HALF, "4 blocks, 1500 updates, bfloat16 autocast")):
        names = {tuple(run) for run in runs}
        found = [record for record in records if tuple(record[name] for name in Run._fields) in names]
        if found:
            report_failures(found, heading)
    report_pairs(records)
    draw([record for record in records if is_cliff(record) and record["seed"] in SEEDS])


if __name__ == "__main__":
    main()
