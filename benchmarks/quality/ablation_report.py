"""The report of ablate.py: tables and figures of its records.

Arms are compared in pairs of equal seed: equal data, order and noise.
"""

import math
import re

import numpy as np
from matplotlib.figure import Figure
from report import head_of, interval, signed, text, write_page
from shared import table

from diffusers_mp.diagnostics import plots


ADALN, ROTATION = "E_scale+shift+gate", "E_scale+rotate+gate"
CONFIGURATIONS = [*(f"{configuration}_scale+shift+gate" for configuration in "ABCDE")]
# arXiv 2505.19122, changes in per cent: of FID-10K, or of the time of an update.
CLAIMS = (
    ("magnitude preservation lowers the distance", "frechet", ADALN, CONFIGURATIONS[0], -12.8),
    ("scale + rotate is near scale + shift", "frechet", ROTATION, ADALN, 100 * (70.86 / 69.28 - 1)),
    ("scale alone is worse than scale + shift", "frechet", "E_scale+gate", ADALN, 100 * (72.03 / 69.28 - 1)),
    (
        "forced normalisation (D) is no better than none (C)",
        "frechet",
        *CONFIGURATIONS[3:1:-1],
        100 * (89.38 / 86.49 - 1),
    ),
    ("E takes longer than A", "update_cpu_ms", ADALN, CONFIGURATIONS[0], 8.5),
)
PROBE_RATE = 1e-4


# Statistics


def changes(records, references, name):
    """Change of a measure in per cent from a reference, for each seed in which both have it."""
    of_reference = {record["seed"]: measure(record, name) for record in references}
    pairs = [(measure(record, name), of_reference.get(record["seed"])) for record in records]
    return [100 * (value / reference - 1) for value, reference in pairs if None not in (value, reference)]


def verdict(values, claimed):
    """What measured changes say of a claimed one."""
    mean, half = interval(values)
    if not abs(mean) > half:
        return "not resolved, and less than claimed" if abs(claimed - mean) > half else "not resolved"
    if mean * claimed < 0:
        return "**disagrees**"
    return "**agrees**" if abs(claimed - mean) <= half else "**agrees** in direction, not in size"


def measure(record, name):
    if name == "loss":
        return record["validation"]["loss"]
    if name in ("frechet", "recognised", "nearest_training_ratio"):
        return record["samples"]["1"][name]
    return record[name]


def growth(record, quantity):
    """Magnitude after the last block, or mean magnitude of the blocks' weights, at the last update over the first."""
    first, last = (magnitudes(entry, quantity) for entry in record["magnitudes"])
    return last[-1] / first[-1] if quantity == "activations" else np.mean(last) / np.mean(first)


def magnitudes(entry, quantity):
    """Magnitudes of the blocks in order of depth."""
    prefix = f"magnitude/{quantity}/transformer_blocks."
    blocks = {int(name.removeprefix(prefix)): value for name, value in entry.items() if name.startswith(prefix)}
    return [blocks[index] for index in sorted(blocks)]


# Tables


def title(arm):
    configuration, modulation = arm.split("_")
    return f"{configuration}, {modulation.replace('+', ' + ')}"


def claims_table(results, sweeps):
    rows = []
    for claim, name, arm, reference, claimed in CLAIMS:
        values = changes(results.get(arm, []), results.get(reference, []), name)
        if values:
            what = f"{'Fréchet' if name == 'frechet' else 'CPU time'}, {title(arm)} from {title(reference)}"
            rows.append((claim, what, f"{claimed:+.1f} %", f"{signed(values)} %", verdict(values, claimed)))
    if results.get(ADALN) and results.get(ROTATION):
        less = 100 * (
            measure(results[ROTATION][0], "num_parameters") / measure(results[ADALN][0], "num_parameters") - 1
        )
        says = "**agrees**" if less < 0 else "**disagrees**"
        rows.append(("rotation needs fewer parameters", "the same two", "-5.6 % (S/2)", f"{less:+.1f} %", says))
    baseline = CONFIGURATIONS[0]
    if results.get(ADALN) and results.get(baseline):
        plain, preserving = ([growth(record, "activations") for record in results[arm]] for arm in (baseline, ADALN))
        (low, half), (high, other) = interval(plain), interval(preserving)
        agrees = low > high and (math.isnan(half) or low - half > max(1, high + other))
        says = "one seed" if math.isnan(half) else "**agrees**" if agrees else "**disagrees** or not resolved"
        measured = f"A × {text(plain)}, E × {text(preserving)}"
        rows.append(
            ("blocks' outputs grow in A, not in E", "last block, end / start", "A × 8, E bounded", measured, says)
        )
    probe = sweeps.get(ROTATION, {}).get(PROBE_RATE)
    if probe is not None and results.get(ROTATION):
        best = results[ROTATION][0]
        if "failure" in probe:
            rows.append(("a rate of 1e-4 fails for E", "training", "fails", "fails", "**agrees**, one seed"))
        else:
            factor = measure(probe, "frechet") / measure(best, "frechet")
            says = "**agrees**" if factor > 2 else "**disagrees**"
            measured = f"× {factor:.1f} of the best rate's"
            rows.append(("a rate of 1e-4 fails for E", "Fréchet, first seed", "fails", measured, f"{says}, one seed"))
    return table(("claim", "measured as", "paper", "here", "verdict"), rows)


def quality_table(results, sweeps):
    def row(arm, records):
        def of(name):
            return [measure(record, name) for record in records]

        rate = records[0]["learning_rate"]
        edge = " (edge)" if rate in (min(sweeps[arm]), max(sweeps[arm])) else ""
        guided = {scale for record in records for scale in record["samples"]} - {"1"}
        of_guided = [record["samples"][scale]["frechet"] for record in records for scale in sorted(guided)[:1]]
        return (
            title(arm),
            f"{rate:g}{edge}",
            len(records),
            text(of("frechet"), 1),
            text(of_guided, 1),
            text(of("recognised"), 1, 100),
            text(of("nearest_training_ratio"), 2),
            text(of("loss"), 4),
            f"{of('num_parameters')[0]:,}",
            text(of("update_ms"), 0),
            text(of("update_cpu_ms"), 0),
        )

    header = ("arm", "rate", "seeds", "Fréchet", "guided", "recognised %", "nearest", "validation loss", "parameters")
    return table((*header, "ms", "CPU ms"), [row(arm, records) for arm, records in results.items() if records])


def pairs_table(results):
    """Changes from E with DiT's modulation; of an arm without gate also from the same with one."""
    rows = []
    for arm, records in results.items():
        for reference in dict.fromkeys((ADALN, f"{arm}+gate")):  # once where both are the same
            if arm != reference and records and results.get(reference):
                measures = ("frechet", "loss", "update_cpu_ms")
                columns = [changes(records, results[reference], name) for name in measures]
                names = f"{title(arm)} from {title(reference)}"
                rows.append((names, *(f"{signed(values, 1)} %" for values in columns)))
    return table(("change", "Fréchet", "validation loss", "CPU time of an update"), rows)


def sweep_table(sweeps):
    rates = sorted({rate for sweep in sweeps.values() for rate in sweep})

    def cell(arm, rate):
        record = sweeps[arm].get(rate)
        if record is None:
            return "" if rate not in sweeps[arm] else "–"
        if "failure" in record:
            return "not finite"
        shown = f"{record['validation']['loss']:.4f}, {measure(record, 'frechet'):.0f}"
        if record["failed_seeds"]:
            return f"{shown}; seed {', '.join(map(str, record['failed_seeds']))} not finite"
        return f"**{shown}**" if record["validation"]["loss"] == min(losses(sweeps[arm]).values()) else shown

    return table(
        ("arm", *(f"{rate:g}" for rate in rates)),
        [(title(arm), *(cell(arm, rate) for rate in rates)) for arm in sweeps if any(sweeps[arm].values())],
    )


def losses(sweep):
    """Validation losses of the rates that have been tried and have not failed, on any seed."""
    return {
        rate: record["validation"]["loss"]
        for rate, record in sweep.items()
        if record and "failure" not in record and not record["failed_seeds"]
    }


def magnitudes_table(results):
    def row(arm, records):
        first, last = zip(*(record["magnitudes"] for record in records), strict=True)
        return (
            title(arm),
            *(text([magnitudes(entry, "activations")[-1] for entry in entries]) for entries in (first, last)),
            text([max(magnitudes(entry, "activations")) for entry in last]),
            *(text([np.mean(magnitudes(entry, "weights")) for entry in entries], 4) for entries in (first, last)),
            text([growth(record, "weights") for record in records]),
        )

    header = ("arm", "last block, start", "end", "largest of blocks, end", "weights, start", "end", "end / start")
    return table(header, [row(arm, records) for arm, records in results.items() if records])


def levels_table(results):
    levels = sorted({name for records in results.values() for record in records for name in record["validation"]})
    levels = [name for name in levels if re.fullmatch(r"mse_t\d+", name)]
    return table(
        ("arm", *(f"t = {int(name[5:])}" for name in levels)),
        [
            (title(arm), *(text([record["validation"][name] for record in records], 4) for name in levels))
            for arm, records in results.items()
            if records
        ],
    )


# Figures


def figures(results):
    """Name of each figure to the figure."""
    results = {arm: records for arm, records in results.items() if records}
    named = {**{arm: arm[0] for arm in CONFIGURATIONS}, ROTATION: "E, rotation"}
    return {
        "frechet": plot_frechet(results),
        "magnitudes": plots.plot_blocks(
            {name: results[arm][0]["magnitudes"] for arm, name in named.items() if arm in results}
        ),
    }


def plot_frechet(results):
    """Fréchet distance of each arm: seeds, and mean with its interval."""
    figure = Figure(figsize=(7, 0.9 + 0.28 * len(results)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, records in enumerate(results.values()):
        values = [measure(record, "frechet") for record in records]
        mean, half = interval(values)
        axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.5, markersize=4)
        axes.errorbar(mean, place, xerr=None if math.isnan(half) else half, fmt="|", color="black", capsize=3)
    axes.set_yticks(range(len(results)), [title(arm) for arm in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set(xlabel="Fréchet distance in the judge's features, without guidance")
    axes.grid(alpha=0.3, axis="x")
    return figure


# The file


def write_report(file, sweeps, results, facts, settings, num_planned):
    """Write the tables, and the figures beside them; what stands above the numbers of a former report is kept.

    Args:
        file (Path): the report; figures go beside it as `<stem>_<name>.png`.
        sweeps (dict): names of arms to rates to records of the first seed, with the seeds that have failed at the rate
            as `failed_seeds`; None where there is none yet.
        results (dict): names of arms to records at their best rate, one for each seed, failed ones left out.
        facts (dict): of the judge.
        settings (dict): of all runs.
        num_planned (int): runs that the whole plan has.
    """
    of_sweeps = [record for sweep in sweeps.values() for record in sweep.values() if record is not None]
    shown = [*of_sweeps, *(record for of_arm in results.values() for record in of_arm)]
    records = list({(record["arm"], record["learning_rate"], record["seed"]): record for record in shown}.values())
    if not any(results.values()):
        print("no arm has all its rates yet: nothing to report")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    figure_files = {name: f"{file.stem}_{name}.png" for name in ("frechet", "magnitudes")}
    for name, figure in figures(results).items():
        figure.savefig(file.with_name(figure_files[name]))
    quality = quality_table(results, sweeps)
    filled = TEMPLATE.format(
        head=head_of(records),
        hours=sum(record["cpu_seconds"] for record in records) / 3600,
        num_runs=len(records),
        num_planned=num_planned,
        num_failed=sum(len(record["failed_seeds"]) for record in of_sweeps),
        width=settings["num_attention_heads"] * settings["attention_head_dim"],
        claims=claims_table(results, sweeps),
        quality=quality,
        edges='"(edge)" above says that it is the first or last of them, so that there may be a better one beyond.'
        if "(edge)" in quality
        else "No arm has it at the end of those that it tried.",
        pairs=pairs_table(results),
        tried=sweep_table(sweeps),
        magnitudes=magnitudes_table(results),
        levels=levels_table(results),
        figures=figure_files,
        perfect=facts["floor"] * (1 / settings["num_samples"] + 1 / facts["num_real"]) / (4 / facts["num_real"]),
        **settings,
        **facts,
    )
    write_page(file, filled)


TEMPLATE = """{head}
- {hours:.1f} core hours for {num_runs} of {num_planned} runs, of which {num_failed} became not finite, on a machine
  with other work; records of these runs and of others that were tried: `benchmarks/records/ablation.jsonl`

Real digits of 8×8 pixels, {num_layers} blocks of width {width}, patches of 2×2, {max_train_steps} updates of
{train_batch_size}: the same data, updates and batches for every arm, and the same order and noise for runs of one
seed. Noise and variance are predicted, Adam's rate warms up and decays as in the paper, measures are those of the
average of width 0.05. A to D have DiT's own modulation, scale + shift + gate, and so compare with E of the same. Every
arm has the rate, out of those it tried on the first seed, of the lowest validation loss there; that seed counts among
the others, which flatters all arms alike. A rate at which a seed becomes not finite is out.

Mean ± 95 % interval (Student's t) over seeds. Three seeds make these wide: 2.5 standard deviations to either side.

- Fréchet: distance between {num_samples} samples and all {num_real} real digits that the judge has not seen, in the 32
  features below the logits of a small convolutional network, the judge. Samples are of the digits in proportion to the
  data, {num_inference_steps} steps of DPM-Solver without guidance; "guided" with a scale of 2. Two random halves of
  the real digits are {floor:.1f} apart; as a finite number of images adds to the distance in inverse proportion, a
  perfect model would be at about {perfect:.1f} here. These numbers compare with
  nothing but each other: an FID is of Inception features.
- Recognised: samples in which the judge reads the digit asked for (real digits: {accuracy:.1%}).
- Nearest: mean distance of samples to the nearest training image, relative to that of held-out digits; below 1 the
  model repeats what it was trained on.
- Validation loss: of {num_validation_images} digits held out of training, at 8 fixed noise levels with fixed noise.
- ms: time of an update, median over the run; CPU ms: processor time of it, validation and logs included. The machine
  had other work, so that the latter is the better one, and [speed](speed.md) is where to look.

### What the paper says

Changes are relative, paired by seed. A claim is resolved where the interval excludes no change; it agrees in size
where the interval contains the paper's number. Those are of ImageNet, 30 M weights and 400 000 updates.

{claims}

### All arms

{quality}

Paired by seed:

{pairs}

### Learning rates

Validation loss, and Fréchet distance, of the first seed at every rate that was tried. In bold the one that was taken.
{edges}

{tried}

### Magnitudes

Root mean square of what blocks return, at the first update and the last, and of their weights. Unit rows have a fixed
magnitude, which D and E return to after every update. The [figure]({figures[magnitudes]}) shows the first seed.

{magnitudes}

### Noise levels

Squared error of held-out digits at fixed timesteps.

{levels}
"""
