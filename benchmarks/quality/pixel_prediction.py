"""What should a model of pixels in large patches predict? Crops of photographs, as JiT (arXiv 2511.13720) has images.

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/pixel_prediction.py --part $part --parts 2 & done
    python benchmarks/quality/pixel_prediction.py --report

Crops of 32x32 pixels in patches of 16: four tokens of 768 values, in a model of width 96. It predicts the clean
sample, the noise or the velocity of a flow; the loss is that of the velocity, and times are JiT's (logit-normal, 0.8
toward noise), for all three. Each at the best of three rates, which one seed decides. Measured are the error of the
velocity of validation crops, and the Fréchet distance of patches of 8x8 pixels of 1024 samples from those of as many
crops of training.
"""

import itertools
import math
import statistics
from typing import NamedTuple

import short_runs
import torch
from ablation_judge import distance
from cliff import interval
from crops import crops
from shared import BENCHMARKS, table

from diffusers_mp import MPDiTPipeline
from diffusers_mp.training import FlowMatchObjective


RECORDS = BENCHMARKS / "records" / "pixel_prediction.jsonl"
KINDS = {"flow_sample": "x", "flow_epsilon": "noise", "flow_prediction": "velocity"}
RATES, SCREENED, SEEDS = (0.02, 0.05, 0.1), 100, range(5)
SIZE, PATCH = 32, 16
NUM_SAMPLES, NUM_STEPS = 1024, 50


class Run(NamedTuple):
    """One training."""

    prediction_type: str
    learning_rate: float
    seed: int
    num_updates: int = 2000


SCREEN = [Run(kind, rate, SCREENED) for rate, kind in itertools.product(RATES, KINDS)]


def patches(images: torch.Tensor) -> torch.Tensor:
    """All patches of 8x8 pixels of images, each a row of 192 values."""
    rows = images.unfold(2, 8, 8).unfold(3, 8, 8)
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def train(run: Run) -> dict:
    """The record of a run."""
    objective = FlowMatchObjective.of_recipe(run.prediction_type, loss_space="velocity", logit_mean=0.8, logit_std=0.8)
    (images, labels), (unseen, _) = crops(size=SIZE)

    def measure(model):
        pipe = MPDiTPipeline(model, objective.scheduler, prediction_type=run.prediction_type)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": NUM_STEPS, "output_type": "latent", "guidance_scale": 1.0}
        classes = labels[:NUM_SAMPLES].tolist()
        samples = pipe(classes, generator=torch.Generator().manual_seed(2), **options).images
        real, others = patches(images[:NUM_SAMPLES]), patches(images[-NUM_SAMPLES:])
        return {"distance": distance(patches(samples), real), "distance_of_real": distance(others, real)}

    return short_runs.train(
        short_runs.Run("F", "rotate", run.learning_rate, run.seed, num_updates=run.num_updates),
        data=lambda seed: crops(size=SIZE),
        build=lambda run, images: short_runs.make_model(run, images, patch_size=PATCH),
        objective=objective,
        measure=measure,
    )


def best_runs(records: list[dict]) -> list[Run]:
    """Runs of the seeds, each prediction at the best rate of the screen; none before that is whole."""
    screened = {
        (record["prediction_type"], record["learning_rate"]): record
        for record in records
        if record["seed"] == SCREENED
    }
    if len(screened) < len(SCREEN):
        return []
    best = {kind: min(RATES, key=lambda rate: screened[kind, rate].get("validation_loss", math.inf)) for kind in KINDS}
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
    if of_seeds:
        print(f"\nDistance of other crops of training: {of_seeds[-1]['distance_of_real']:.4g}")


if __name__ == "__main__":
    runs = [*SCREEN, *best_runs(short_runs.read_records(RECORDS))]
    report(short_runs.make_records(RECORDS, runs, train, __doc__.split("\n")[0]))
