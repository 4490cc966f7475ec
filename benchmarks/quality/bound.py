"""Where should the magnitude of tokens be bounded, and at what? Short trainings on digits, at rates from good to high.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/bound.py --part $part --parts 2 & done
    python benchmarks/quality/bound.py --report

Configuration E, with one addition: each token's RMS is capped, x · min(1, c / RMS(x)), in one of three places:

    stream    after each residual sum
    branch    what attention and the feed-forward add, after the gate
    both      the two

A run is a function of its seed. Each leaves a line in the records; what has one is not done again.
"""

import contextlib
import itertools
from collections import defaultdict
from typing import NamedTuple

import short_runs
from shared import BENCHMARKS, table

from diffusers_mp import fused


RECORDS = BENCHMARKS / "records" / "bound.jsonl"


class Run(NamedTuple):
    """One training."""

    place: str
    limit: float
    kind: str
    learning_rate: float
    seed: int
    width: int = 96
    num_layers: int = 4
    num_updates: int = 700


SEEDS, KINDS = (100, 101), ("shift", "rotate")
PLACES = [("none", 0.0), *itertools.product(("stream", "branch", "both"), (1.0, 2.0, 4.0)), ("branch", 1.5)]
SCREEN = [
    Run(place, limit, kind, rate, seed)
    for seed, kind, rate, (place, limit) in itertools.product(SEEDS, KINDS, (0.1, 0.3), PLACES)
]
# As long as the runs of cliff.py, where a limit that is too low shows at good rates: all on one seed, some on two.
BEST = [("none", 0.0), ("both", 2.0), ("branch", 1.0)]
BOUNDS = [*BEST, ("stream", 2.0), ("both", 1.0), ("both", 4.0), ("branch", 2.0), ("branch", 4.0)]
LONGER = [
    Run(place, limit, kind, rate, seed, num_updates=1500)
    for seed, rates, bounds in ((100, (0.05, 0.1), BOUNDS), (100, (0.2,), BOUNDS[:4]), (101, (0.05, 0.1), BOUNDS[:4]))
    for rate, kind, (place, limit) in itertools.product(rates, KINDS, bounds)
]
# E, configuration F and the best of its rivals, in a wider and in a deeper model.
LARGER = [
    Run(place, limit, kind, rate, SEEDS[0], width, num_layers)
    for rate, (width, num_layers), kind, (place, limit) in itertools.product(
        (0.05, 0.1), ((192, 4), (96, 12)), KINDS, BEST
    )
]


@contextlib.contextmanager
def bounded(run):
    """Residual sums with the cap of a run."""
    plain = fused.gated_sum

    def gated_sum(x, branch, gate, t, max_magnitude=None):
        if run.place in ("branch", "both"):
            branch, gate = fused.cap_magnitude(branch if gate is None else branch * gate, run.limit), None
        x = plain(x, branch, gate, t)
        return fused.cap_magnitude(x, run.limit) if run.place in ("stream", "both") else x

    fused.gated_sum = gated_sum
    try:
        yield
    finally:
        fused.gated_sum = plain


def train(run):
    """The record of a run: E with the cap of the run."""
    sizes = {name: getattr(run, name) for name in ("width", "num_layers", "num_updates")}
    with bounded(run):
        return short_runs.train(short_runs.Run("E", run.kind, run.learning_rate, run.seed, **sizes))


def report(records):
    """Validation losses by place and limit, a column for each kind and rate, its seeds side by side."""
    columns = sorted({(record["kind"], record["learning_rate"]) for record in records})
    bounds, cells, rows = sorted({(record["place"], record["limit"]) for record in records}), defaultdict(list), []
    for record in sorted(records, key=lambda record: record["seed"]):
        text = f"{record['validation_loss']:.4f}" if record["ended"] else f"NaN at {record['update']}"
        cells[record["place"], record["limit"], record["kind"], record["learning_rate"]].append(text)
    for bound in bounds:
        largest = max(record["largest_rms"] for record in records if (record["place"], record["limit"]) == bound)
        rows.append([f"{bound[0]} {bound[1]:g}", *(" / ".join(cells[*bound, *c]) for c in columns), f"{largest:.3g}"])
    print(table(["bound", *(f"{kind}, {rate:g}" for kind, rate in columns), "largest RMS"], rows))


def main():
    runs = SCREEN + LONGER + LARGER
    records = short_runs.make_records(RECORDS, runs, train, __doc__.split("\n")[0])
    sizes = ("width", "num_layers", "num_updates")
    for size in dict.fromkeys(tuple(getattr(run, name) for name in sizes) for run in runs):
        of_size = [record for record in records if tuple(record[name] for name in sizes) == size]
        if of_size:
            print("Width {}, {} blocks, {} updates, seeds {}\n".format(*size, " / ".join(map(str, SEEDS))))
            report(of_size)
            print()


if __name__ == "__main__":
    main()
