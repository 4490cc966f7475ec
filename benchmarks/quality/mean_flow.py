"""MeanFlow (arXiv 2505.13447) on digits: does the model learn to sample in one step, by derivatives forwards?

    for part in 0 1; do OMP_NUM_THREADS=1 python benchmarks/quality/mean_flow.py --part $part --parts 2 & done
    python benchmarks/quality/mean_flow.py --report

    mean flow    the mean velocity between two times, of a model that is told both
    flow         rectified flow by the same model and recipe: both times are one

Configuration E, 16 tokens, no guidance. The recognised share is that of 1000 samples in which a small network, fitted
to the training digits, reads the digit that was asked for; it is given for 1, 2 and 25 steps, and for held-out digits.
"""

import statistics
import time
from collections import defaultdict
from typing import NamedTuple

import torch
from ablation_judge import fit_judge
from pinned import as_pixels
from shared import BENCHMARKS, table
from short_runs import BATCH_SIZE, EMA_STD, WARM_UP, digits, make_records

from diffusers_mp import MPDiTTransformer2DModel, PowerFunctionEMA, functional, get_preset, normalize_weights_
from diffusers_mp.optimization import inverse_sqrt_schedule, parameter_groups
from diffusers_mp.rows import trust_rows_


RECORDS = BENCHMARKS / "records" / "mean_flow.jsonl"
ARMS, SEEDS, NUM_STEPS = ("mean flow", "flow"), (0, 1, 2), (1, 2, 25)
NUM_SAMPLES, NUM_JUDGE_STEPS = 1000, 600
# The model has features of time for 0 to 1000; at their frequencies a derivative by a time in [0, 1] would be of them.
TIME_SCALE = 10.0
SHARE_OF_FLOW = {"mean flow": 0.75, "flow": 1.0}


class Run(NamedTuple):
    """One training."""

    arm: str
    seed: int
    learning_rate: float = 0.05
    width: int = 96
    num_layers: int = 4
    num_updates: int = 2000


RUNS = [Run(arm, seed) for seed in SEEDS for arm in ARMS]


def make_model(run: Run) -> MPDiTTransformer2DModel:
    """Configuration E for digits of 8x8 pixels; the interval is told as a pooled vector."""
    torch.manual_seed(run.seed)
    config = get_preset(
        "XS/2",
        "E",
        num_layers=run.num_layers,
        num_attention_heads=run.width // 32,
        attention_head_dim=32,
        in_channels=1,
        sample_size=8,
        num_classes=10,
        class_dropout_prob=0.0,
        pooled_projection_dim=functional.NUM_TIME_FEATURES,
    )
    return trust_rows_(MPDiTTransformer2DModel(**config).train())


def mean_velocity(model, noisy, r, t, class_labels):
    """u(z, r, t): what takes z from time t to time r, over the interval."""
    interval = functional.timestep_features(TIME_SCALE * (t - r), noisy.dtype)
    return model(noisy, TIME_SCALE * t, class_labels, pooled_projections=interval).sample


def mean_flow_loss(model, images, class_labels, share_of_flow=0.75, generator=None):
    """Algorithm 1 of arXiv 2505.13447, with its logit-normal times and adaptive weights; a mean over the batch."""
    times = (torch.randn(2, len(images), generator=generator) - 0.4).sigmoid()
    t, r = times.amax(0), times.amin(0)
    r = torch.where(torch.rand(len(images), generator=generator) < share_of_flow, t, r)
    noise = torch.randn(images.shape, generator=generator)
    velocity, noisy = noise - images, torch.lerp(images, noise, t[:, None, None, None])

    def mean(noisy, r, t):
        return mean_velocity(model, noisy, r, t, class_labels)

    # Along the trajectory: dz/dt is the velocity, dr/dt is 0.
    tangents = (velocity, torch.zeros_like(r), torch.ones_like(t))
    u, du_dt = torch.func.jvp(mean, (noisy, r, t), tangents)
    target = velocity - (t - r)[:, None, None, None] * du_dt.detach()
    error = (u - target).square().mean(dim=(1, 2, 3))
    return (error / (error.detach() + 1e-3)).mean()


@torch.no_grad()
def sample(model, class_labels, num_steps, is_mean=True, generator=None):
    """Images from noise, in steps of one length."""
    images = torch.randn(len(class_labels), 1, 8, 8, generator=generator)
    times = torch.linspace(1, 0, num_steps + 1)[:, None].expand(-1, len(images))
    for t, r in zip(times, times[1:], strict=False):
        u = mean_velocity(model, images, r if is_mean else t, t, class_labels)
        images = images - (t - r)[:, None, None, None] * u
    return images


def train(run: Run) -> dict:
    """The record of a run: the `recognised` share by number of steps, that of held-out digits as `recognised_real`."""
    (images, labels), (unseen, of_unseen) = digits(run.seed)
    model, share_of_flow = make_model(run), SHARE_OF_FLOW[run.arm]
    optimizer = torch.optim.Adam(parameter_groups(model, lr=run.learning_rate), betas=(0.9, 0.99))
    schedule = inverse_sqrt_schedule(optimizer, WARM_UP, run.num_updates)
    ema, generator = PowerFunctionEMA(model, [EMA_STD]), torch.Generator().manual_seed(run.seed)
    started = time.perf_counter()
    for update in range(1, run.num_updates + 1):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        mean_flow_loss(model, images[rows], labels[rows], share_of_flow, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        normalize_weights_(model)
        ema.update(update)
    seconds = round(time.perf_counter() - started)
    ema.copy_to(model.eval(), EMA_STD)
    judge, recognised = fit_judge(as_pixels(images), labels, NUM_JUDGE_STEPS), {}
    drawn = labels[torch.randint(len(labels), (NUM_SAMPLES,), generator=torch.Generator().manual_seed(1))]
    for num_steps in NUM_STEPS:
        samples = sample(model, drawn, num_steps, run.arm == "mean flow", torch.Generator().manual_seed(2))
        recognised[str(num_steps)] = share_recognised(judge, samples, drawn)
    real = share_recognised(judge, unseen, of_unseen)
    return {"recognised": recognised, "recognised_real": real, "seconds": seconds}


@torch.no_grad()
def share_recognised(judge, images, labels) -> float:
    """The share of images in which the judge reads these labels."""
    return (judge(as_pixels(images))[1].argmax(1) == labels).double().mean().item()


def report(records: list[dict]) -> None:
    """Recognised shares by arm, the seeds side by side."""
    by_arm = defaultdict(list)
    for record in sorted(records, key=lambda record: record["seed"]):
        by_arm[record["arm"]].append(record)
    rows = []
    for arm in (arm for arm in ARMS if arm in by_arm):
        shares = [" / ".join(f"{record['recognised'][str(n)]:.3f}" for record in by_arm[arm]) for n in NUM_STEPS]
        rows.append([arm, *shares, round(statistics.mean(record["seconds"] for record in by_arm[arm]))])
    print(table(["arm", *(f"{n} step{'s' * (n > 1)}" for n in NUM_STEPS), "seconds"], rows))
    real = [f"{record['recognised_real']:.3f}" for record in records if record["arm"] == ARMS[0]]
    print(f"\nheld-out digits: {' / '.join(real)}")


if __name__ == "__main__":
    report(make_records(RECORDS, RUNS, train, __doc__.split("\n")[0]))
