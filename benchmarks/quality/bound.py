"""Where should the magnitude of tokens be bounded, and at what? Short trainings on digits, at rates from good to high.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/bound.py --part $part --parts 2 & done
    python benchmarks/quality/bound.py --report

Configuration E, with one addition: each token's RMS is capped, x · min(1, c / RMS(x)), in one of three places:

    stream    after each residual sum
    branch    what attention and the feed-forward add, after the gate
    both      the two

A run is a function of its seed. Each leaves a line in the records; what has one is not done again.
"""

import argparse
import contextlib
import itertools
import json
import math
import time
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from shared import BENCHMARKS, table
from sklearn.datasets import load_digits

from diffusers_mp import MPDiTTransformer2DModel, PowerFunctionEMA, fused, get_preset, normalize_weights_
from diffusers_mp.optimization import inverse_sqrt_schedule, parameter_groups
from diffusers_mp.rows import trust_rows_
from diffusers_mp.training import DDPMObjective, validation_losses, validation_timesteps


RECORDS = BENCHMARKS / "records" / "bound.jsonl"
BATCH_SIZE, NUM_HELD_OUT, EMA_STD = 64, 256, 0.10


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
PLACES = [("none", 0.0), *itertools.product(("stream", "branch", "both"), (1.0, 2.0, 4.0))]
SCREEN = [
    Run(place, limit, kind, rate, seed)
    for seed, kind, rate, (place, limit) in itertools.product(SEEDS, KINDS, (0.1, 0.3), PLACES)
]
# The two best of the screen, and E, in a wider and in a deeper model.
BEST = [("none", 0.0), ("both", 2.0), ("branch", 1.0)]
LARGER = [
    Run(place, limit, kind, rate, seed, width, num_layers)
    for (seed, rate), (width, num_layers), kind, (place, limit) in itertools.product(
        ((100, 0.1), (100, 0.2), (101, 0.1)), ((192, 4), (96, 12)), KINDS, BEST
    )
]


def capped(x, limit):
    """Tokens of RMS `limit` at most."""
    return x * (limit / x.square().mean(-1, keepdim=True).sqrt().clamp(min=limit))


@contextlib.contextmanager
def bounded(run, largest):
    """Residual sums with the cap of a run; notes the largest RMS of a token in the stream."""
    plain = fused.gated_sum

    def gated_sum(x, branch, gate, t):
        if run.place in ("branch", "both"):
            branch, gate = capped(branch if gate is None else branch * gate, run.limit), None
        x = plain(x, branch, gate, t)
        if run.place in ("stream", "both"):
            x = capped(x, run.limit)
        largest[0] = max(largest[0], x.detach().square().mean(-1).max().item() ** 0.5)
        return x

    fused.gated_sum = gated_sum
    try:
        yield
    finally:
        fused.gated_sum = plain


def digits(seed):
    """Scans of 8x8 pixels, standardised, and their labels: for training and held out."""
    scans = load_digits()
    images = torch.tensor(scans.images[:, None] / 16, dtype=torch.float32)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(scans.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, trained = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    return (images[trained], labels[trained]), (images[held_out], labels[held_out])


def train(run):
    """The record of a run: its validation loss, or the update at which its loss was not finite."""
    torch.manual_seed(run.seed)
    (images, labels), (unseen, of_unseen) = digits(run.seed)
    config = get_preset(
        "XS/2",
        "E",
        ("scale", run.kind, "gate"),
        num_layers=run.num_layers,
        num_attention_heads=run.width // 32,
        attention_head_dim=32,
        in_channels=1,
        sample_size=8,
        num_classes=10,
    )
    model = MPDiTTransformer2DModel(**config).train()
    objective = DDPMObjective.of_recipe("epsilon", variance_type="fixed_small", snr_gamma=None)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=run.learning_rate), betas=(0.9, 0.99))
    schedule = inverse_sqrt_schedule(optimizer, run.num_updates // 7, run.num_updates)
    trust_rows_(model)
    ema, generator = PowerFunctionEMA(model, [EMA_STD]), torch.Generator().manual_seed(run.seed)
    largest, losses, record = [0.0], [], {"ended": True}
    started = time.perf_counter()
    with bounded(run, largest):
        for update in range(1, run.num_updates + 1):
            rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
            noise = torch.randn(BATCH_SIZE, *images.shape[1:], generator=generator)
            timesteps = objective.timesteps(torch.rand(BATCH_SIZE, dtype=torch.float64, generator=generator))
            ids = torch.where(torch.rand(BATCH_SIZE, generator=generator) < 0.1, 10, labels[rows])
            prediction = model(
                objective.add_noise(images[rows], noise, timesteps), timestep=timesteps, class_labels=ids
            ).sample
            loss = objective.loss(prediction, images[rows], noise, timesteps)["loss"].mean()
            loss.backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                record = {"ended": False, "update": update}
                break
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            normalize_weights_(model)
            ema.update(update)
        record |= {"largest_rms": largest[0], "largest_loss": float(np.nanmax(losses)), "last_loss": losses[-1]}
        if record["ended"]:
            ema.copy_to(model, EMA_STD)
            noise = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))
            batch = [{"latents": unseen, "noise": noise, "class_label": of_unseen}]
            levels = validation_timesteps(objective, 8)
            record["validation_loss"] = validation_losses(model.eval(), objective, batch, levels, noise.device)["loss"]
    return run._asdict() | record | {"seconds": round(time.perf_counter() - started)}


def read_records():
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", type=int, default=0, help="which share of the runs")
    parser.add_argument("--parts", type=int, default=1, help="among how many processes they are shared")
    parser.add_argument("--report", action="store_true", help="print the table of all records, train nothing")
    args = parser.parse_args()
    if not args.report:
        for number, run in enumerate(SCREEN + LARGER):
            done = {tuple(record[name] for name in Run._fields) for record in read_records()}
            if number % args.parts == args.part and tuple(run) not in done:
                line = json.dumps(train(run))
                with RECORDS.open("a") as file:
                    file.write(line + "\n")
    report(read_records())


if __name__ == "__main__":
    main()
