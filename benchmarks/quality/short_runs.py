"""Short trainings on scans of digits in one process, each a function of its seed, with a line in a file of records.

What `bound.py`, `cliff.py` and the like share: the data, the model, the recipe, and what is noted of a run.
"""

import argparse
import contextlib
import hashlib
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from shared import BENCHMARKS
from sklearn.datasets import load_digits

from diffusers_mp import MPDiTTransformer2DModel, NormWatch, PowerFunctionEMA, get_preset, normalize_weights_
from diffusers_mp.optimization import inverse_sqrt_schedule, parameter_groups
from diffusers_mp.rows import trust_rows_
from diffusers_mp.training import DDPMObjective, Objective, validation_losses, validation_timesteps


BATCH_SIZE, WARM_UP, NUM_HELD_OUT, EMA_STD = 64, 100, 256, 0.10
# Of the median of a loss that may have doubled.
MEDIAN_OF = 10
# What decides the values of a model; a record has the hash of these files.
CODE = ("functional", "fused", "rows", "layers", "modulation", "configuration", "blocks", "transformer_mpdit")
CODE += ("presets",)


class Run(NamedTuple):
    """One training: `kind` is "shift", "rotate" or "scale", which is with gate beside it alone."""

    configuration: str
    kind: str
    learning_rate: float
    seed: int
    width: int = 96
    num_layers: int = 4
    num_updates: int = 1500
    precision: str = "float32"


def hash_of_code() -> str:
    """The first digits of a hash of the files that decide the values of a model."""
    package = BENCHMARKS.parent / "diffusers_mp"
    return hashlib.sha256(b"".join((package / f"{name}.py").read_bytes() for name in CODE)).hexdigest()[:12]


def digits(seed: int):
    """Scans of 8x8 pixels, standardised, and their labels: for training and held out."""
    scans = load_digits()
    images = torch.tensor(scans.images[:, None] / 16, dtype=torch.float32)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(scans.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, trained = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    return (images[trained], labels[trained]), (images[held_out], labels[held_out])


def make_model(run: Run, images: torch.Tensor, head_dim: int = 32, **sizes: int) -> MPDiTTransformer2DModel:
    """The model of a run for images of ten classes, in training mode: 16 tokens, if `sizes` do not say otherwise."""
    torch.manual_seed(run.seed)
    num_channels, size = images.shape[1:3]
    config = get_preset(
        f"XS/{size // 4}",
        run.configuration,
        tuple(dict.fromkeys(("scale", run.kind, "gate"))),
        num_layers=run.num_layers,
        num_attention_heads=run.width // head_dim,
        attention_head_dim=head_dim,
        in_channels=num_channels,
        sample_size=size,
        num_classes=10,
        **sizes,
    )
    return MPDiTTransformer2DModel(**config).train()


def make_objective() -> DDPMObjective:
    """ε-prediction with plain losses."""
    return DDPMObjective.of_recipe("epsilon", variance_type="fixed_small", snr_gamma=None)


def loss_of(model: torch.nn.Module, unseen: torch.Tensor, of_unseen: torch.Tensor, objective=None) -> float:
    """The loss of held-out images, mean of eight noise levels."""
    objective = objective or make_objective()
    noise = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))
    batches = [{"latents": unseen, "noise": noise, "class_label": of_unseen}]
    return validation_losses(model, objective, batches, validation_timesteps(objective, 8), noise.device)["loss"]


@torch.no_grad()
def sample(model: torch.nn.Module, labels: torch.Tensor, shape: tuple, num_steps: int, seed: int) -> torch.Tensor:
    """Images of these classes by DDIM without guidance, each (C, H, W), 500 at a time."""
    scheduler = DDIMScheduler.from_config(make_objective().scheduler.config, clip_sample=False)
    scheduler.set_timesteps(num_steps)
    generator, samples = torch.Generator().manual_seed(seed), []
    for of_batch in labels.split(500):
        latents = torch.randn(len(of_batch), *shape, generator=generator)
        for timestep in scheduler.timesteps:
            prediction = model(latents, timestep=timestep.expand(len(of_batch)), class_labels=of_batch).sample
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        samples.append(latents)
    return torch.cat(samples)


def train(
    run: Run,
    watch: Callable[[MPDiTTransformer2DModel, int, float], None] | None = None,
    *,
    data: Callable = digits,
    build: Callable[[Run, torch.Tensor], MPDiTTransformer2DModel] = make_model,
    groups: Callable = parameter_groups,
    measure: Callable[[MPDiTTransformer2DModel], dict] | None = None,
    objective: Objective | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict:
    """Train as a run says.

    Args:
        run (Run): what to train.
        watch (callable, optional): called after each update with the model, the update and its loss; and before the
            first with 0 and NaN.
        data (callable): images and labels, of training and held out, of a seed.
        build (callable): the model of a run, for such images.
        groups (callable): parameter groups of a model and a learning rate.
        measure (callable, optional): what else to note of the averaged model.
        objective (Objective, optional): by default `make_objective()`.
        batch_size (int): images of an update.
    Returns:
        dict: whether it `ended` with finite losses, else the `update` at which it did not; `largest_rms` of a token
        after a block, `largest_hidden` of one within a feed-forward, after its activation, and `largest_loss` on the
        way, `last_loss`, and the `validation_loss` of its average.
    """
    (images, labels), (unseen, of_unseen) = data(run.seed)
    model, objective = build(run, images), objective or make_objective()
    optimizer = torch.optim.Adam(groups(model, lr=run.learning_rate), betas=(0.9, 0.99))
    schedule = inverse_sqrt_schedule(optimizer, WARM_UP, run.num_updates)
    autocast = contextlib.nullcontext()
    if run.precision == "bf16":
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    trust_rows_(model)
    ema, generator = PowerFunctionEMA(model, [EMA_STD]), torch.Generator().manual_seed(run.seed)
    losses, largest = [], {"stream": torch.zeros(()), "hidden": torch.zeros(())}

    def note(name):
        def hook(module, args, output):
            magnitudes = output.detach().float().square().mean(-1)
            torch.maximum(largest[name], magnitudes.max().sqrt(), out=largest[name])

        return hook

    hooks = [block.register_forward_hook(note("stream")) for block in model.transformer_blocks]
    hooks += [block.ff.act.register_forward_hook(note("hidden")) for block in model.transformer_blocks]
    if watch is not None:
        watch(model, 0, math.nan)
    started, record = time.perf_counter(), {"ended": True}
    for update in range(1, run.num_updates + 1):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *images.shape[1:], generator=generator)
        timesteps = objective.timesteps(torch.rand(batch_size, dtype=torch.float64, generator=generator))
        ids = torch.where(torch.rand(batch_size, generator=generator) < 0.1, 10, labels[rows])
        with autocast:
            noisy = objective.add_noise(images[rows], noise, timesteps)
            prediction = model(noisy, timestep=timesteps, class_labels=ids).sample
        loss = objective.loss(prediction.float(), images[rows], noise, timesteps)["loss"].mean()
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
        if watch is not None:
            watch(model, update, losses[-1])
    for hook in hooks:
        hook.remove()
    finite = [loss for loss in losses if math.isfinite(loss)]
    record |= {"largest_rms": largest["stream"].item(), "largest_hidden": largest["hidden"].item()}
    record |= {"largest_loss": max(finite), "last_loss": finite[-1]}
    if record["ended"]:
        ema.copy_to(model, EMA_STD)
        record["validation_loss"] = loss_of(model.eval(), unseen, of_unseen, objective)
        if measure is not None:
            record |= measure(model)
    return record | {"seconds": round(time.perf_counter() - started)}


def doubled_at(losses: list[float]) -> int | None:
    """The update at which a loss has doubled."""
    least = float("inf")
    for update in range(MEDIAN_OF, len(losses) + 1):
        median = statistics.median(losses[update - MEDIAN_OF : update])
        if not median <= 2 * least:
            return update
        least = min(least, median)
    return None


def train_watched(run: Run) -> dict:
    """`train`, with what a `NormWatch` says: alarms, and the largest value of each quantity at each look; and when the
    loss doubled.
    """
    watches, losses, looks = [], [], defaultdict(list)

    def watch(model, update, loss):
        if update == 0:
            watches.append(NormWatch(model, warn=False))
            return
        losses.append(loss)
        watches[0].step()
        if update != 1 and update % watches[0].every:
            return
        largest = defaultdict(float)
        for name, value in watches[0].values().items():
            quantity = name.partition("/")[0]
            largest[quantity] = max(largest[quantity], float(f"{value:.4g}"))
        for quantity, value in largest.items():
            looks[quantity].append(value)

    record = train(run, watch)
    watches[0].close()
    alarms = [alarm._asdict() for alarm in watches[0].alarms]
    return record | {"doubled": doubled_at(losses) or record.get("update"), "alarms": alarms, "looks": looks}


def read_records(path: Path) -> list[dict]:
    """The records in a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def make_records(path: Path, runs: Iterable[NamedTuple], train: Callable[..., dict], description: str) -> list[dict]:
    """The command line of an experiment: train its runs, or a share of them, that have no record yet.

    Returns:
        list of dict: all records.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--part", type=int, default=0, help="which share of the runs")
    parser.add_argument("--parts", type=int, default=1, help="among how many processes they are shared")
    parser.add_argument("--report", action="store_true", help="print the tables of all records, train nothing")
    args = parser.parse_args()
    for number, run in enumerate([] if args.report else runs):
        done = {tuple(record[name] for name in run._fields) for record in read_records(path)}
        if number % args.parts == args.part and tuple(run) not in done:
            line = json.dumps(run._asdict() | train(run) | {"code": hash_of_code()})
            with path.open("a") as file:
                file.write(line + "\n")
    return read_records(path)
