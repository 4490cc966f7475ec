"""Does pinning help? A stock DiT of diffusers on digits, whose weights are free, decay, or keep their norms.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/pinned.py --part $part --parts 2 & done
    python benchmarks/quality/pinned.py --report

    plain      Adam
    decay      AdamW, weight decay 0.1
    rows       Adam, rows pinned to the norms that they start with
    matrices   Adam, matrices pinned to theirs

3000 updates of 64 with a warm-up of 100, then 10,000 more at the same constant rate. Maps that start at zero are free
in each arm. Every 1000 updates: the norm of matrices over that at the start, the share by which an update changes
them, the loss of held-out digits, and after 3000 and 13,000 the Fréchet distance of samples from the training digits.
"""

import statistics
import time
from collections import defaultdict
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from ablation_judge import distance, fit_judge
from cliff import interval
from diffusers import DiTTransformer2DModel
from shared import BENCHMARKS, table
from short_runs import BATCH_SIZE, EMA_STD, WARM_UP, digits, loss_of, make_objective, make_records, sample

from diffusers_mp import PowerFunctionEMA, normalize_weights_, pin_weight_norms_


RECORDS = BENCHMARKS / "records" / "pinned.jsonl"
FIGURE = BENCHMARKS.parent / "docs" / "results" / "pinned.png"
ARMS, SEEDS = ("plain", "decay", "rows", "matrices"), (0, 1, 2)
EVERY, SAMPLED_AT = 1000, (3000, 13_000)
NUM_SAMPLES, NUM_STEPS, NUM_JUDGE_STEPS = 1000, 25, 600


class Run(NamedTuple):
    """One training."""

    arm: str
    seed: int
    learning_rate: float = 2e-3
    num_updates: int = 13_000


RUNS = [Run(arm, seed) for seed in SEEDS for arm in ARMS]


def make_model(seed: int) -> DiTTransformer2DModel:
    """diffusers' DiT of width 64 and 3 blocks, for digits of 8x8 pixels."""
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "patch_size": 2, "sample_size": 8}
    return DiTTransformer2DModel(**sizes, in_channels=1, out_channels=1, num_embeds_ada_norm=10).train()


def as_pixels(images):
    """Standardised digits as bytes, for the judge."""
    ((trained, _), _) = digits(0)
    scale = 255 / (trained.max() - trained.min())
    return ((images - trained.min()) * scale).round().clamp(0, 255).to(torch.uint8)


def train(run: Run) -> dict:
    """The record of a run: a list of what was measured."""
    (images, labels), (unseen, of_unseen) = digits(run.seed)
    model = make_model(run.seed)
    if run.arm in ("rows", "matrices"):
        pin_weight_norms_(model, per={"rows": "row", "matrices": "matrix"}[run.arm])
    objective = make_objective()
    decay = 0.1 if run.arm == "decay" else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1, (update + 1) / WARM_UP))
    ema, generator = PowerFunctionEMA(model, [EMA_STD]), torch.Generator().manual_seed(run.seed)
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2 and weight.any()}
    start = {name: weight.norm().item() for name, weight in matrices.items()}
    measured, started = [], time.perf_counter()
    for update in range(1, run.num_updates + 1):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        noise = torch.randn(BATCH_SIZE, *images.shape[1:], generator=generator)
        timesteps = objective.timesteps(torch.rand(BATCH_SIZE, dtype=torch.float64, generator=generator))
        noisy = objective.add_noise(images[rows], noise, timesteps)
        # diffusers' DiT drops classes itself.
        prediction = model(noisy, timestep=timesteps, class_labels=labels[rows]).sample
        objective.loss(prediction, images[rows], noise, timesteps)["loss"].mean().backward()
        is_measured = update % EVERY == 0
        if is_measured:
            before = {name: weight.detach().clone() for name, weight in matrices.items()}
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        normalize_weights_(model)
        ema.update(update)
        if not is_measured:
            continue
        growth = [matrices[name].norm().item() / start[name] for name in matrices]
        changes = [((matrices[name] - before[name]).norm() / before[name].norm()).item() for name in matrices]
        entry = {"update": update, "growth": statistics.geometric_mean(growth), "largest_growth": max(growth)}
        entry |= {"relative_update": statistics.median(changes)}
        averaged = make_model(run.seed)
        averaged.load_state_dict(model.state_dict())
        ema.copy_to(averaged, EMA_STD)
        entry["validation_loss"] = loss_of(averaged.eval(), unseen, of_unseen)
        if update in SAMPLED_AT:
            judge = fit_judge(as_pixels(images), labels, NUM_JUDGE_STEPS)
            drawn = labels[torch.randint(len(labels), (NUM_SAMPLES,), generator=torch.Generator().manual_seed(1))]
            with torch.no_grad():
                of_samples, logits = judge(as_pixels(sample(averaged, drawn, images.shape[1:], NUM_STEPS, seed=1)))
                entry["frechet"] = distance(of_samples, judge(as_pixels(images))[0])
            entry["recognised"] = (logits.argmax(1) == drawn).double().mean().item()
        measured.append(entry)
    return {"measured": measured, "seconds": round(time.perf_counter() - started)}


def report(records: list[dict]) -> None:
    """Means over seeds at the updates at which samples were drawn, and changes from plain weights, paired."""
    by_arm = defaultdict(dict)
    for record in records:
        by_arm[record["arm"]][record["seed"]] = {entry["update"]: entry for entry in record["measured"]}
    rows = []
    for update in SAMPLED_AT:
        for arm in (arm for arm in ARMS if arm in by_arm):
            entries = {seed: of_seed[update] for seed, of_seed in by_arm[arm].items() if update in of_seed}
            plain = {seed: by_arm["plain"][seed][update] for seed in entries if seed in by_arm["plain"]}
            cells = [f"{update:,}", arm, len(entries)]
            for name, digits_ in (("growth", ".3f"), ("relative_update", ".2e"), ("validation_loss", ".4f")):
                cells.append(f"{statistics.mean(entry[name] for entry in entries.values()):{digits_}}")
            cells.append(f"{statistics.mean(entry['frechet'] for entry in entries.values()):.1f}")
            for name in ("validation_loss", "frechet"):
                changes = [100 * (entries[seed][name] / plain[seed][name] - 1) for seed in plain]
                resolved = arm != "plain" and len(changes) > 1
                cells.append("{:+.1f} ± {:.1f}".format(*interval(changes)) if resolved else "")
            rows.append(cells)
    columns = ["update", "arm", "seeds", "norm over start", "relative update", "loss", "Fréchet distance"]
    print(table([*columns, "loss over plain, %", "distance over plain, %"], rows))


def draw(records: list[dict]) -> None:
    """Norms and effective updates over time, a line for each run."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for record in records:
        color = f"C{ARMS.index(record['arm'])}"
        label = record["arm"] if record["seed"] == SEEDS[0] else None
        updates = [entry["update"] for entry in record["measured"]]
        for axis, name in zip(axes, ("growth", "relative_update", "validation_loss"), strict=True):
            axis.plot(updates, [entry[name] for entry in record["measured"]], color=color, label=label, alpha=0.8)
    titles = ("‖w‖ over that at the start", "‖Δw‖ / ‖w‖ of an update", "loss of held-out digits")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    found = make_records(RECORDS, RUNS, train, __doc__.split("\n")[0])
    report(found)
    draw(found)
