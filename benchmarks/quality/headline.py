"""Is a magnitude-preserving model better than DiT? Eight seeds on crops of photographs, each arm at its best rate.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/headline.py --part $part --parts 2 & done
    python benchmarks/quality/headline.py --report

Width 96, 6 blocks, 1500 updates of 64, averages of width 0.10. Rates are chosen on seeds 100 and 101, by the mean
validation loss of those at which no run failed; arms are compared on seeds 0 to 7, paired, since runs of a seed have
the same start of the generator, data and noise. A and F with rotation train at half of their best rates, too, for
`few_bits.py`. Run again until nothing is left to do.
"""

import copy
import itertools
import math
import statistics
from collections import defaultdict
from typing import NamedTuple

import bits
import short_runs
import torch
from ablation_judge import distance
from cliff import NOTHING, interval
from crops import PHOTOGRAPHS, as_pixels, crops, draw_crops, features_of, nearest_training_ratio
from rates import HEAD_DIM
from scipy.stats import t as student
from shared import BENCHMARKS, table

from diffusers_mp import PowerFunctionEMA, normalize_weights_
from diffusers_mp.averages.reconstruction import reconstruction_weights


RECORDS = BENCHMARKS / "records" / "headline.jsonl"
# Configuration, kind of modulation beside scale and gate, the rate in the middle of the grid.
ARMS = {
    "A": ("A", "shift", 0.01),
    "F rotate": ("F", "rotate", 0.05),
    "F shift": ("F", "shift", 0.05),
    "F scale": ("F", "scale", 0.05),
    "E rotate": ("E", "rotate", 0.05),
}
HALVED = ("A", "F rotate")
GRID, SWEPT_SEEDS, SEEDS = (-2, -1, 0, 1, 2), (100, 101), range(8)
WIDTH, NUM_LAYERS, NUM_UPDATES = 96, 6, 1500
NUM_SAMPLES, NUM_QUANTISED_SAMPLES, NUM_STEPS = 10_000, 2000, 16
# What the paper reports of E over A in FID.
CLAIM = math.log(1 - 0.128)
ENDPOINTS = ("W8A8, constant", "W4A8, tensor")
TRACKED, SNAPSHOT_WIDTHS, WIDTHS = (0.03, 0.15), (0.05, 0.10), (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20)
EMA_SEEDS, NUM_SNAPSHOTS = range(4), 15


class Run(NamedTuple):
    """One training."""

    arm: str
    learning_rate: float
    seed: int
    num_updates: int = NUM_UPDATES


SWEEP = [
    Run(arm, middle * 2.0**power, seed)
    for seed, power, (arm, (_, _, middle)) in itertools.product(SWEPT_SEEDS, GRID, ARMS.items())
]


class AverageWatch:
    """Follows a training: averages of two widths, stored on the way, and two more that check what is rebuilt of them.

    Attributes:
        found (list of dict): after each third, losses by width of `rebuilt` and `tracked` averages.
    """

    def __init__(self, num_updates: int):
        self.num_updates, self.snapshots, self.found = num_updates, [], []

    def __call__(self, model, update: int, loss: float) -> None:
        if update == 0:
            self.stored, self.tracked = PowerFunctionEMA(model, SNAPSHOT_WIDTHS), PowerFunctionEMA(model, TRACKED)
            self.averaged = copy.deepcopy(model).eval()
            return
        self.stored.update(update)
        self.tracked.update(update)
        if update % (self.num_updates // NUM_SNAPSHOTS) == 0:
            for std, average in zip(SNAPSHOT_WIDTHS, self.stored.state_dict()["averages"], strict=True):
                self.snapshots.append((update, std, {name: each.clone() for name, each in average.items()}))
        if update % (self.num_updates // 3) == 0:
            rebuilt = {str(std): self.loss_of_rebuilt(update, std) for std in WIDTHS}
            self.found.append({"update": update, "rebuilt": rebuilt, "tracked": {}})
            for std in TRACKED:
                self.tracked.copy_to(self.averaged, std)
                self.found[-1]["tracked"][str(std)] = self.loss()

    @torch.no_grad()
    def loss_of_rebuilt(self, update: int, std: float) -> float:
        """The loss of the average that the snapshots up to an update give for a width."""
        steps, stds, averages = zip(*self.snapshots, strict=True)
        weights = reconstruction_weights(steps, stds, update, std).tolist()
        for name, parameter in self.averaged.named_parameters():
            parameter.copy_(sum(weight * of[name] for weight, of in zip(weights, averages, strict=True)))
        normalize_weights_(self.averaged)
        return self.loss()

    def loss(self) -> float:
        _, (unseen, labels) = crops()
        return short_runs.loss_of(self.averaged, unseen[:256], labels[:256])


def measure(model) -> dict:
    """What is noted of the averaged model of a fresh seed: distances of samples, and what few bits cost."""
    (images, labels), (unseen, of_unseen) = crops()

    def distance_of(number):
        drawn = torch.randint(len(PHOTOGRAPHS), (number,), generator=torch.Generator().manual_seed(1))
        samples = as_pixels(short_runs.sample(model, drawn, images.shape[1:], NUM_STEPS, seed=1))
        features, logits = features_of(samples)
        real = features_of(draw_crops("training", NUM_SAMPLES, seed=1).images)[0]
        return samples, distance(features, real), (logits.argmax(1) == drawn).double().mean().item()

    samples, found, recognised = distance_of(NUM_SAMPLES)
    record = {"frechet": found, "recognised": recognised, "nearest": nearest_training_ratio(samples[:500])}
    record["outliers"] = bits.outliers(model, lambda: short_runs.loss_of(model, unseen, of_unseen))
    record["rises"] = bits.rises(
        model,
        lambda model: short_runs.loss_of(model, unseen, of_unseen),
        lambda model: short_runs.loss_of(model, images[:64], labels[:64]),
    )
    record["quantised_frechet"] = {"float32": distance_of(NUM_QUANTISED_SAMPLES)[1]}
    for name in ENDPOINTS:
        with bits.in_few_bits(model, bits.SCHEMES[name], *record["rises"][name]["limits"]):
            record["quantised_frechet"][name] = distance_of(NUM_QUANTISED_SAMPLES)[1]
    return record


def train(run: Run) -> dict:
    """The record of a run: of a swept seed the losses alone."""
    configuration, kind, _ = ARMS[run.arm]
    sizes = {"width": WIDTH, "num_layers": NUM_LAYERS, "num_updates": run.num_updates}
    watch = AverageWatch(run.num_updates) if run.seed in EMA_SEEDS and run.arm in HALVED else None
    record = short_runs.train(
        short_runs.Run(configuration, kind, run.learning_rate, run.seed, **sizes),
        watch,
        data=crops,
        build=lambda run, images: short_runs.make_model(run, images, HEAD_DIM),
        measure=None if run.seed in SWEPT_SEEDS else measure,
    )
    return record | ({"averages": watch.found} if watch else {})


# What follows from the records.


def best_rates(records: list[dict]) -> dict[str, float]:
    """The best rate of each arm whose sweep is whole."""
    losses = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["seed"] in SWEPT_SEEDS:
            losses[record["arm"]][record["learning_rate"]].append(record.get("validation_loss", math.inf))
    best = {}
    for arm, by_rate in losses.items():
        means = {rate: statistics.mean(found) for rate, found in by_rate.items() if max(found) < NOTHING}
        if means and sum(map(len, by_rate.values())) == len(GRID) * len(SWEPT_SEEDS):
            best[arm] = min(means, key=means.get)
    return best


def fresh(records: list[dict]) -> list[Run]:
    """Runs of fresh seeds at the best rates, and at half of two of them; none before all sweeps are whole."""
    best = best_rates(records)
    if len(best) < len(ARMS):
        return []
    return [
        Run(arm, rate, seed)
        for seed in SEEDS
        for arm in ARMS
        for rate in ([best[arm], best[arm] / 2] if arm in HALVED else [best[arm]])
    ]


def seeds_to_resolve(differences: list[float], effect: float) -> int:
    """How many seeds a paired 95 % interval needs to be narrower than an effect on each side, at this spread."""
    spread = statistics.stdev(differences)
    number = 2
    while student.ppf(0.975, number - 1) * spread / math.sqrt(number) > abs(effect):
        number += 1
    return number


def report(records: list[dict]) -> None:
    """Sweeps, differences from A, what would resolve the paper's claim, and averages."""
    best, rows = best_rates(records), []
    for arm in ARMS:
        losses = defaultdict(list)
        for record in records:
            if record["arm"] == arm and record["seed"] in SWEPT_SEEDS:
                losses[record["learning_rate"]].append(record.get("validation_loss", math.nan))
        cells = ", ".join(f"{rate:g}: {statistics.mean(found):.4f}" for rate, found in sorted(losses.items()))
        rows.append([arm, f"{best[arm]:g}" if arm in best else "", cells])
    print(table(["", "best rate", "mean losses of the sweep"], rows), "\n")

    at_best = defaultdict(dict)
    for record in records:
        if record["seed"] in SEEDS and record["learning_rate"] == best.get(record["arm"]):
            at_best[record["arm"]][record["seed"]] = record
    rows = []
    for arm, other in [*((arm, "A") for arm in ARMS if arm != "A"), ("F scale", "F shift"), ("F rotate", "F shift")]:
        for name in ("validation_loss", "frechet"):
            pairs = [(at_best[arm][seed], at_best[other][seed]) for seed in at_best[arm] if seed in at_best[other]]
            pairs = [pair for pair in pairs if all(name in record for record in pair)]
            if len(pairs) < 2:
                continue
            differences = [math.log(one[name] / two[name]) for one, two in pairs]
            mean, half = interval(differences)
            means = [statistics.mean(record[name] for record in each) for each in zip(*pairs, strict=True)]
            percent = [f"{100 * math.expm1(value):+.1f}" for value in (mean, mean - half, mean + half)]
            rows.append(
                [arm, other, name, len(pairs), *(f"{value:.4g}" for value in means), percent[0]]
                + [
                    f"{percent[1]} to {percent[2]}",
                    seeds_to_resolve(differences, CLAIM),
                    f"{100 * math.expm1(half):.1f}",
                ]
            )
    columns = ["", "over", "measure", "seeds", "mean", "of the other", "difference, %", "95 % interval"]
    print(table([*columns, "seeds that resolve 12.8 %", "resolved here, %"], rows), "\n")
    rows = []
    for arm, by_seed in at_best.items():
        found = [record for record in by_seed.values() if "nearest" in record]
        if found:
            rows.append(
                [arm, *(f"{statistics.mean(each[name] for each in found):.3f}" for name in ("nearest", "recognised"))]
            )
    print(table(["", "nearest-training ratio", "recognised"], rows), "\n")
    report_averages(at_best)
    hours = sum(record["seconds"] for record in records) / 3600
    print(f"\n{len(records)} runs, {hours:.1f} core hours of training.")


def report_averages(at_best: dict[str, dict[int, dict]]) -> None:
    """The best width of an average after each third of training, and rebuilt averages against tracked ones."""
    rows = []
    for arm, by_seed in at_best.items():
        found = [record["averages"] for record in by_seed.values() if "averages" in record]
        for looks in zip(*found, strict=True):
            means = {std: statistics.mean(look["rebuilt"][std] for look in looks) for std in looks[0]["rebuilt"]}
            apart = max(
                abs(look["rebuilt"][std] / look["tracked"][std] - 1) for look in looks for std in look["tracked"]
            )
            losses = ", ".join(f"{std}: {loss:.4f}" for std, loss in means.items())
            rows.append([arm, looks[0]["update"], len(looks), min(means, key=means.get), losses, f"{100 * apart:.2f}"])
    print(table(["", "update", "seeds", "best width", "mean losses of rebuilt averages", "from tracked, %"], rows))


def main():
    records = short_runs.read_records(RECORDS)
    report(short_runs.make_records(RECORDS, [*SWEEP, *fresh(records)], train, __doc__.split("\n")[0]))


if __name__ == "__main__":
    main()
