"""How long before a loss doubles does a NormWatch warn, and does it warn of healthy trainings? Those of cliff.py.

    python benchmarks/quality/alarm.py

A loss has doubled when the median of ten updates is above twice the least such median so far, or not finite. A run
fails if its loss has doubled, or if cliff.py counts it; it is healthy if not. Of one that fails before update 200
nothing is asked.
"""

from collections import defaultdict

from cliff import RECORDS, has_failed, is_cliff
from shared import table
from short_runs import read_records


HEALTHY_START, AIM = 200, 50


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
    report([record for record in read_records(RECORDS) if is_cliff(record)])
