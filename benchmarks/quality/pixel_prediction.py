"""What should a model of pixels in large patches predict? Crops of photographs, as JiT (arXiv 2511.13720) has images.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/pixel_prediction.py --part $part --parts 2 & done
    python benchmarks/quality/pixel_prediction.py --report

Crops of 32x32 pixels in patches of 16: four tokens of 768 values, in a model of width 96. It predicts the clean
sample, the noise or the velocity of a flow; the loss is that of the velocity, and times are JiT's (logit-normal, 0.8
toward noise), for all three. Each at the best of three rates, which one seed of its own decides.

Photographs are those in the wheels of scikit-learn and, where it is installed, scikit-image. Their right fifth is held
out. Measured are the error of the velocity there, and the Fréchet distance of patches of 8x8 pixels of 1024 samples
from those of as many held-out crops.
"""

import importlib.util
import itertools
import statistics
import time
from typing import NamedTuple

import torch
from ablation_judge import distance
from cliff import interval
from shared import BENCHMARKS, table
from short_runs import BATCH_SIZE, EMA_STD, WARM_UP, make_records, read_records
from sklearn.datasets import load_sample_images

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, PowerFunctionEMA, get_preset, normalize_weights_
from diffusers_mp.optimization import inverse_sqrt_schedule, parameter_groups
from diffusers_mp.rows import trust_rows_
from diffusers_mp.training import FlowMatchObjective, validation_losses, validation_timesteps


RECORDS = BENCHMARKS / "records" / "pixel_prediction.jsonl"
KINDS = {"flow_sample": "x", "flow_epsilon": "noise", "flow_prediction": "velocity"}
RATES, SCREENED, SEEDS = (0.02, 0.05, 0.1), 100, range(5)
SIZE, PATCH, WIDTH, NUM_LAYERS = 32, 16, 96, 4
NUM_CROPS, NUM_STEPS = 1024, 50


class Run(NamedTuple):
    """One training."""

    prediction_type: str
    learning_rate: float
    seed: int
    num_updates: int = 2000


SCREEN = [Run(kind, rate, SCREENED) for rate, kind in itertools.product(RATES, KINDS)]


def photographs() -> dict[str, torch.Tensor]:
    """Photographs by name, standardised, of shape (3, height, width)."""
    found = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    if importlib.util.find_spec("skimage") is not None:
        from skimage import data

        found |= {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
        found["motorcycle"] = data.stereo_motorcycle()[0]
    images = {name: torch.tensor(image).permute(2, 0, 1) / 127.5 - 1 for name, image in found.items()}
    pixels = torch.cat([image.flatten() for image in images.values()])
    return {name: (image - pixels.mean()) / pixels.std() for name, image in images.items()}


def crops(images: list[torch.Tensor], num_crops: int, generator: torch.Generator) -> torch.Tensor:
    """Crops at random places of random images: (num_crops, 3, SIZE, SIZE)."""
    cut = []
    for image, down, right in torch.rand(num_crops, 3, generator=generator).tolist():
        of = images[int(image * len(images))]
        top, left = (int(share * (side - SIZE + 1)) for share, side in zip((down, right), of.shape[1:], strict=True))
        cut.append(of[:, top : top + SIZE, left : left + SIZE])
    return torch.stack(cut)


def patches(images: torch.Tensor) -> torch.Tensor:
    """All patches of 8x8 pixels of images, each a row of 192 values."""
    rows = images.unfold(2, 8, 8).unfold(3, 8, 8)
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def train(run: Run) -> dict:
    """The record of a run."""
    # Four fifths of the columns to train on, and the rest.
    images = photographs()
    parts = [
        image.split([4 * image.shape[2] // 5, image.shape[2] - 4 * image.shape[2] // 5], 2)
        for image in images.values()
    ]
    trained, held_out = ([part[i] for part in parts] for i in (0, 1))
    torch.manual_seed(run.seed)
    sizes = {
        "num_layers": NUM_LAYERS,
        "num_attention_heads": WIDTH // 32,
        "attention_head_dim": 32,
        "patch_size": PATCH,
    }
    model = MPDiTTransformer2DModel(
        **get_preset("XS/2", "E", **sizes, in_channels=3, sample_size=SIZE, num_classes=None)
    )
    objective = FlowMatchObjective.of_recipe(run.prediction_type, loss_space="velocity", logit_mean=0.8, logit_std=0.8)
    optimizer = torch.optim.Adam(parameter_groups(model.train(), lr=run.learning_rate), betas=(0.9, 0.99))
    schedule = inverse_sqrt_schedule(optimizer, WARM_UP, run.num_updates // 4)
    trust_rows_(model)
    ema, generator = PowerFunctionEMA(model, [EMA_STD]), torch.Generator().manual_seed(run.seed)
    started = time.perf_counter()
    for update in range(1, run.num_updates + 1):
        clean = crops(trained, BATCH_SIZE, generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = objective.timesteps(torch.rand(BATCH_SIZE, dtype=torch.float64, generator=generator))
        prediction = model(objective.add_noise(clean, noise, timesteps), timestep=timesteps).sample
        objective.loss(prediction, clean, noise, timesteps)["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        normalize_weights_(model)
        ema.update(update)
    ema.copy_to(model.eval(), EMA_STD)

    unseen = crops(held_out, NUM_CROPS, torch.Generator().manual_seed(0))
    noise = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(1))
    batch, levels = [{"latents": unseen, "noise": noise}], validation_timesteps(objective, 8)
    losses = validation_losses(model, objective, batch, levels, noise.device)
    pipe = MPDiTPipeline(model, objective.scheduler, prediction_type=run.prediction_type)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": NUM_STEPS, "output_type": "latent", "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(2)
    samples = pipe(num_images_per_class=NUM_CROPS, generator=generator, **options).images
    seen = crops(trained, NUM_CROPS, torch.Generator().manual_seed(3))
    return {
        "photographs": list(images),
        "validation_loss": losses["loss"],
        "losses": losses,
        "distance": distance(patches(samples), patches(unseen)),
        "distance_of_photographs": distance(patches(seen), patches(unseen)),
        "seconds": round(time.perf_counter() - started),
    }


def best_runs(records: list[dict]) -> list[Run]:
    """Runs of the seeds, each prediction at the best rate of the screen; none before that is whole."""
    screened = {
        (record["prediction_type"], record["learning_rate"]): record
        for record in records
        if record["seed"] == SCREENED
    }
    if len(screened) < len(SCREEN):
        return []
    best = {kind: min(RATES, key=lambda rate: screened[kind, rate]["validation_loss"]) for kind in KINDS}
    return [Run(kind, best[kind], seed) for seed, kind in itertools.product(SEEDS, KINDS)]


def report(records: list[dict]) -> None:
    """A row for each prediction: means over seeds, and changes from the velocity, paired."""
    of_seeds = [record for record in records if record["seed"] in SEEDS]
    by_kind = {kind: {r["seed"]: r for r in of_seeds if r["prediction_type"] == kind} for kind in KINDS}
    base, rows = by_kind["flow_prediction"], []
    for kind, found in by_kind.items():
        if not found:
            continue
        cells = [KINDS[kind], f"{next(iter(found.values()))['learning_rate']:g}", len(found)]
        for name in ("validation_loss", "distance"):
            cells.append(f"{statistics.mean(record[name] for record in found.values()):.4g}")
            changes = [100 * (found[seed][name] / base[seed][name] - 1) for seed in found if seed in base]
            resolved = found is not base and len(changes) > 1
            cells.append("{:+.1f} ± {:.1f}".format(*interval(changes)) if resolved else "")
        rows.append(cells)
    columns = ["predicted", "rate", "seeds", "error of the velocity", "over velocity, %"]
    print(table([*columns, "Fréchet distance of patches", "over velocity, %"], rows))
    if records:
        names, floor = ", ".join(records[-1]["photographs"]), records[-1]["distance_of_photographs"]
        print(f"\nPhotographs: {names}; distance of their left parts {floor:.4g}")


if __name__ == "__main__":
    description = __doc__.split("\n")[0]
    report(make_records(RECORDS, [*SCREEN, *best_runs(read_records(RECORDS))], train, description))
