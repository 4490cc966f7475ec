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
    """The record of a run, with its first alarm, if one came, and when its loss doubled."""
    watches, losses = [], []

    def watch(model, update, loss):
        if update == 0:
            watches.append(NormWatch(model, warn=False))
        else:
            losses.append(loss)
            watches[0].step()

    record = train(run, watch)
    watches[0].close()
    alarms = [alarm._asdict() for alarm in watches[0].alarms]
    return record | {"doubled": doubled_at(losses) or record.get("update"), "alarms": alarms}


def report(records: list[dict]) -> None:
    """For each configuration and rate how many runs failed, how many were warned of, and the leads."""
    groups = defaultdict(list)
    for record in records:
        groups[record["configuration"], record["learning_rate"]].append(record)
    rows, leads, num_false = [], [], 0
    for (configuration, rate), found in sorted(groups.items()):
        failed = [record for record in found if record["doubled"] or has_failed(record)]
        asked = [record for record in failed if (record["doubled"] or HEALTHY_START + 1) > HEALTHY_START]
        healthy = [record for record in found if record not in failed]
        warned = [record["alarms"][0] for record in healthy if record["alarms"]]
        of_rate = []
        for record in asked:
            first = record["alarms"][0]["update"] if record["alarms"] else record["num_updates"]
            of_rate.append((record["doubled"] or record["num_updates"]) - first)
        quantities = sorted({record["alarms"][0]["quantity"] for record in asked if record["alarms"]})
        rows.append(
            [configuration, f"{rate:g}", len(healthy), len(warned), len(failed), len(asked)]
            + [", ".join(map(str, sorted(of_rate))), ", ".join(quantities)]
        )
        if configuration == "E":
            leads += of_rate
            num_false += len(warned)
    columns = ["", "rate", "healthy", "of these warned of", "failed", "after 200", "lead of these in updates", "by"]
    print(table(columns, rows))
    in_time = sum(lead >= AIM for lead in leads)
    print(f"\nE: a lead of {AIM} updates or more in {in_time} of {len(leads)} runs; {num_false} false alarms.")


if __name__ == "__main__":
    report(make_records(RECORDS, RUNS, replay, __doc__.split("\n")[0]))
