"""How long before a loss doubles does a NormWatch warn, and does it warn of healthy trainings? Those of cliff.py.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/alarm.py --part $part --parts 2 & done
    python benchmarks/quality/alarm.py --report

A loss has doubled when the median of ten updates is above twice the least such median so far, or not finite. A run
fails if its loss has doubled, or if cliff.py counts it; it is healthy if not. Of one that fails before update 200
nothing is asked.
"""

import itertools
import statistics
from collections import defaultdict

from cliff import CLIFF, has_failed
from shared import BENCHMARKS, table
from short_runs import Run, make_records, train

from diffusers_mp import NormWatch


RECORDS = BENCHMARKS / "records" / "alarm.jsonl"
MEDIAN_OF, HEALTHY_START, AIM = 10, 200, 50
# E from rates that are good to those at which it fails, and F, which goes on where E fails.
RUNS = [
    *(run for run in CLIFF if run.configuration == "E" and run.learning_rate < 0.8),
    *(Run("E", kind, 0.025, seed) for seed, kind in itertools.product(range(100, 105), ("shift", "rotate"))),
    *(run for run in CLIFF if run.configuration == "F" and run.learning_rate < 0.4 and run.seed < 102),
]


def doubled_at(losses: list[float]) -> int | None:
    """The update at which a loss has doubled."""
    least = float("inf")
    for update in range(MEDIAN_OF, len(losses) + 1):
        median = statistics.median(losses[update - MEDIAN_OF : update])
        if not median <= 2 * least:
            return update
        least = min(least, median)
    return None


def replay(run: Run) -> dict:
    """The record of a run, with its alarms, the largest value of each quantity, and when its loss doubled."""
    watches, losses, largest = [], [], defaultdict(float)

    def watch(model, update, loss):
        if update == 0:
            watches.append(NormWatch(model, warn=False))
            return
        losses.append(loss)
        watches[0].step()
        for name, value in watches[0].values().items():
            quantity = name.partition("/")[0]
            largest[quantity] = max(largest[quantity], value)

    record = train(run, watch)
    watches[0].close()
    alarms = [alarm._asdict() for alarm in watches[0].alarms]
    return record | {"doubled": doubled_at(losses) or record.get("update"), "alarms": alarms, "largest": largest}


def lead_of(record: dict) -> int | None:
    """Updates from the first alarm of a run that failed until its loss had doubled, or to its end."""
    if not record["alarms"]:
        return None
    return (record["doubled"] or record["num_updates"]) - record["alarms"][0]["update"]


def report(records: list[dict]) -> None:
    """For each configuration and rate how many runs failed, how many were warned of, and the leads."""
    groups, leads, false_alarms, rows = defaultdict(list), [], [], []
    for record in records:
        groups[record["configuration"], record["learning_rate"]].append(record)
    for (configuration, rate), found in sorted(groups.items()):
        failed = [record for record in found if record["doubled"] or has_failed(record)]
        asked = [record for record in failed if record["doubled"] is None or record["doubled"] > HEALTHY_START]
        healthy = [record for record in found if record not in failed]
        warned = [record for record in healthy if record["alarms"]]
        quantities = {record["alarms"][0]["quantity"] for record in asked + warned if record["alarms"]}
        of_rate = [lead_of(record) for record in asked]
        counts = [len(healthy), len(warned), len(failed), len(asked)]
        rows.append([configuration, f"{rate:g}", *counts, ", ".join(map(str, of_rate)), ", ".join(sorted(quantities))])
        if configuration == "E":
            leads += of_rate
            false_alarms += warned
    columns = [
        "",
        "rate",
        "healthy",
        "warned of",
        "failed",
        f"after {HEALTHY_START}",
        "leads of these",
        "first alarm by",
    ]
    print(table(columns, rows))
    in_time = sum(lead is not None and lead >= AIM for lead in leads)
    print(f"\nE: a lead of {AIM} updates or more in {in_time} of {len(leads)} runs; {len(false_alarms)} false alarms.")


if __name__ == "__main__":
    report(make_records(RECORDS, RUNS, replay, __doc__.split("\n")[0]))
