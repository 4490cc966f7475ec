"""Do magnitude-preserving models lose less in few bits? Of the models of headline.py, whose records have the numbers.

    python benchmarks/quality/few_bits.py

A model that learns more may have larger outliers, so that arms are compared at equal loss: for each seed a line
through A's rise over its loss, at its best rate and at half of it, gives A's rise at the loss of the other; beyond its
two losses the nearer end is taken. p is of a paired t-test over seeds; the primary comparisons are held together by
Holm's rule.
"""

import statistics
from collections import defaultdict

from bits import SCHEMES
from cliff import interval
from headline import ENDPOINTS, HALVED, RECORDS, best_rates
from scipy.stats import ttest_1samp
from shared import table
from short_runs import read_records


PRIMARY, COMPARED = ENDPOINTS[0], ("F rotate", "F shift", "F scale", "E rotate")


def rise_at(loss: float, points: list[tuple[float, float]]) -> float:
    """What a line through two (loss, rise) gives at a loss between them, or at the nearer end."""
    (low, at_low), (high, at_high) = sorted(points)
    if not low < loss < high:
        return at_low if loss <= low else at_high
    return at_low + (at_high - at_low) * (loss - low) / (high - low)


def holm(values: dict[str, float]) -> dict[str, float]:
    """p-values, adjusted so that all may be read together."""
    adjusted, largest = {}, 0.0
    for number, (name, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(values) - number) * value))
        adjusted[name] = largest
    return adjusted


def by_arm_and_seed(records: list[dict]) -> dict[str, dict[int, dict]]:
    """Records with rises, by the name of the arm, "A / 2" for half of its best rate, and seed."""
    best, found = best_rates(records), defaultdict(dict)
    for record in records:
        if "rises" in record:
            halved = record["arm"] in HALVED and record["learning_rate"] < best[record["arm"]]
            found[record["arm"] + (" / 2" if halved else "")][record["seed"]] = record
    return found


def differences(found: dict[str, dict[int, dict]], arm: str, scheme: str) -> list[float]:
    """Rise of an arm less that of A at its loss, one for each seed that has all three runs."""
    values = []
    for seed, record in found[arm].items():
        of_a = [found[name].get(seed) for name in ("A", "A / 2")]
        if all(of_a):
            points = [(each["validation_loss"], each["rises"][scheme]["rise"]) for each in of_a]
            values.append(record["rises"][scheme]["rise"] - rise_at(record["validation_loss"], points))
    return values


def report(records: list[dict]) -> None:
    """Rises of each scheme, comparisons at equal loss, outliers, and distances of the two endpoints."""
    found = by_arm_and_seed(records)
    arms = sorted(found)

    def mean_of(arm, value, digits):
        return f"{statistics.mean(value(record) for record in found[arm].values()):.{digits}f}"

    rows = [
        ["seeds", *(len(found[arm]) for arm in arms)],
        ["loss", *(mean_of(arm, lambda record: record["validation_loss"], 4) for arm in arms)],
        *(
            [name, *(mean_of(arm, lambda record, name=name: record["outliers"][name], 1) for arm in arms)]
            for name in ("kurtosis", "largest_entry")
        ),
        *(
            [name, *(mean_of(arm, lambda record, name=name: record["rises"][name]["rise"], 2) for arm in arms)]
            for name in SCHEMES
        ),
        *(
            [
                f"distance, {name}",
                *(mean_of(arm, lambda record, name=name: record["quantised_frechet"][name], 1) for arm in arms),
            ]
            for name in ("float32", *ENDPOINTS)
        ),
    ]
    print("Rise of the validation loss, %\n")
    print(table(["", *arms], rows), "\n")
    print("Less A's at equal loss, percentage points\n")
    rows, of_primary = [], {}
    for scheme in SCHEMES:
        for arm in COMPARED:
            values = differences(found, arm, scheme)
            if len(values) < 2:
                continue
            mean, half = interval(values)
            p = float(ttest_1samp(values, 0).pvalue)
            if scheme == PRIMARY:
                of_primary[arm] = p
            rows.append(
                [scheme, arm, len(values), f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}", f"{p:.2g}"]
            )
    print(table(["scheme", "", "seeds", "less A's", "95 % interval", "p"], rows), "\n")
    for arm, p in holm(of_primary).items():
        print(f"{PRIMARY}, {arm}: p = {p:.2g} by Holm's rule over {len(of_primary)} comparisons.")


if __name__ == "__main__":
    report(read_records(RECORDS))
