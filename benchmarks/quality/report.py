"""What the experiments' pages are made of: means over seeds with intervals, and numbers below a hand-written head.

Means come with 95 % intervals of Student's t over seeds. Three seeds give 2.5 standard deviations to either side, so
that only large effects stand out.
"""

import math

import numpy as np
from scipy.stats import t as student
from shared import facts_of_run, head


NUMBERS = "## Numbers\n"


def interval(values):
    """Mean of n values and half of its 95 % interval of Student's t, which is nan for one value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def text(values, digits=2, factor=1.0):
    """Mean ± half an interval."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    mean, half = interval(factor * np.asarray(values, dtype=float))
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def signed(values, digits=1):
    return text(values, digits) if not values or np.mean(values) < 0 else f"+{text(values, digits)}"


def head_of(records):
    """Command of this process; machines, versions and dates of the records."""
    of_records = {name: "; ".join(sorted({record[name] for record in records})) for name in ("machine", "versions")}
    dates = sorted(record["date"] for record in records)
    date = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return head({"command": facts_of_run()["command"], **of_records, "date": date})


def write_page(file, numbers):
    """Write the part of a page that is made of records; what stands above it, written by hand, is kept."""
    former = file.read_text() if file.is_file() else f"# {file.stem}\n\n{NUMBERS}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{former.partition(NUMBERS)[0]}{NUMBERS}\n{numbers}")
    print(f"wrote {file}; what stood above its numbers was kept: see that it still holds")
