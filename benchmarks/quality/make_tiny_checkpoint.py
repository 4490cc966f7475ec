"""Train the tiny checkpoint of docs/tiny: digits of 8x8 pixels, 237,077 parameters, a few minutes of one core.

    python benchmarks/quality/make_tiny_checkpoint.py --work_dir build/tiny --output_dir docs/tiny

Trains by train_mpdit.py on half of scikit-learn's digits, then again at the paper's learning rate and at two wrong
ones. Leaves a pipeline with its card, its log, its samples and its curves in `output_dir`, everything else in
`work_dir`. What a broken-off run has finished is not done again. Prints the tables of docs/is_my_loss_normal.md.
"""

import argparse
import platform
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from shared import demo, facts_of_run, head, held_out_losses, read_log, run_trainer, table

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.files import write_json
from diffusers_mp.publishing.hub import files_to_publish
from diffusers_mp.publishing.model_card import write_model_card


MODEL = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "patch_size": 2}
SEED, BATCH_SIZE, NUM_HELD_OUT, NUM_LEVELS = 0, 64, 96, 8
MAX_TRAIN_STEPS = 3000
# The checkpoint's, above the paper's since so short a run has to take longer steps; the paper's; and two wrong ones,
# for as many updates as show it.
RATES = {3e-2: MAX_TRAIN_STEPS, 1e-2: MAX_TRAIN_STEPS, 3e-1: 1000, 1e-4: 1000}
RATE_NAMES = (", the checkpoint", ", the paper's", ", too high", ", too low")
GUIDANCE_SCALE, NUM_INFERENCE_STEPS, NUM_SHOWN, NUM_JUDGED = 2.0, 25, 10, 50


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, default=Path("build/tiny"), help="folder of data and runs")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/tiny"), help="folder of the checkpoint")
    return parser.parse_args(argv)


def train(work_dir, learning_rate, max_train_steps):
    """One run of the trainer, its warm-up and decay those of the long one, unless it is finished or stopped itself."""
    folder, model = work_dir / f"rate-{learning_rate:g}", work_dir / "model.json"
    write_json(model, MODEL)
    options = {
        "--train_data_dir": work_dir / "digits" / "train",
        "--resolution": demo.SCAN_SIZE,
        "--vae": "none",
        "--image_channels": 1,
        "--latents_dir": work_dir / "latents",
        "--model_config_name_or_path": model,
        "--total_batch_size": BATCH_SIZE,
        "--max_train_steps": max_train_steps,
        "--learning_rate": learning_rate,
        "--lr_warmup_steps": MAX_TRAIN_STEPS // 150,
        "--lr_constant_steps": MAX_TRAIN_STEPS // 10,
        "--ema_stds": 0.05,
        "--checkpointing_steps": 1000,
        "--checkpoints_total_limit": 1,
        "--validation_steps": 100,
        "--validation_inference_steps": 10,
        "--num_validation_images": NUM_HELD_OUT,
        "--num_validation_levels": NUM_LEVELS,
        "--seed": SEED,
    }
    run_trainer(folder, options)
    return folder


def generate(pipe, num_images_per_class):
    """Samples of the ten digits.

    Args:
        pipe (MPDiTPipeline): the checkpoint's; its sampler becomes DPM-Solver.
        num_images_per_class (int): of each digit.
    Returns:
        tuple: list of PIL images, 8x8, and their labels, np.ndarray of the same length.
    """
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    images = pipe(
        class_labels=demo.CLASS_NAMES,
        num_images_per_class=num_images_per_class,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(SEED),
    ).images
    return images, np.repeat(np.arange(10), num_images_per_class)


def read_curve(folder, name):
    """Updates and values of one measure, from the log."""
    return zip(*((entry["step"], entry[name]) for entry in read_log(folder) if name in entry), strict=True)


def draw_curves(path, runs, untrained):
    """Loss over updates at each rate, and squared error over updates at each noise level at the first."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = ("tab:green", "tab:olive", "tab:red", "tab:blue")
    for (rate, folder), colour, name in zip(runs.items(), colours, RATE_NAMES, strict=True):
        left.plot(*read_curve(folder, "train/loss"), color=colour, alpha=0.35, linewidth=1)
        left.plot(*read_curve(folder, "validation/loss"), color=colour, linewidth=2, label=f"{rate:g}{name}")
    left.axhline(untrained["loss"], color="black", linestyle=":", linewidth=1, label="untrained")
    left.set(ylabel="loss", title="learning rates: thin training, thick held out")
    folder, levels = next(iter(runs.values())), [name for name in untrained if name.startswith("mse_t")]
    for level, colour in zip(levels, plt.cm.viridis(np.linspace(0, 0.9, len(levels))), strict=True):
        curve = read_curve(folder, f"validation/{level}")
        right.plot(*curve, color=colour, label=f"t = {int(level.removeprefix('mse_t'))}")
    right.set(ylabel="squared error", title=f"noise levels, held out, rate {next(iter(runs)):g}")
    for axes in (left, right):
        axes.set(xlabel="update", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8, ncols=1 + (axes is right))
    # Above it is what the rate that is too high comes to in its last entry.
    left.set_ylim(0.05, 3)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def print_tables(runs, untrained):
    """Losses over updates in Markdown."""
    updates, rows = [10, 30, 100, 300, 1000, MAX_TRAIN_STEPS], []
    for rate, folder in runs.items():
        for name, what in (("train/loss", "training"), ("validation/loss", "held out")):
            curve = dict(zip(*read_curve(folder, name), strict=True))
            cells = [f"{curve[step]:.4g}" if step in curve else "" for step in updates]
            rows.append((f"{rate:g}, {what}", f"{untrained['loss']:.4g}" if what == "held out" else "", *cells))
    print(f"\n{table(('update', 0, *updates), rows)}")
    folder, updates = next(iter(runs.values())), [100, 300, 1000, MAX_TRAIN_STEPS]
    _, values = read_curve(folder, "train/loss")
    last = np.array(values[-50:])
    print(f"\nThe last 50 entries of training: {last.mean():.4f} ± {last.std(ddof=1):.4f}, each of 10 updates")
    rows = []
    for name, value in untrained.items():
        if name.startswith("mse_t"):
            curve = dict(zip(*read_curve(folder, f"validation/{name}"), strict=True))
            timestep = int(name.removeprefix("mse_t"))
            rows.append((timestep, f"{value:.3f}", *(f"{curve[step]:.2g}" for step in updates)))
    print(f"\n{table(('timestep', 0, *updates), rows)}")


def main(args):
    splits = demo.split_digits()
    for name, split in splits.items():
        demo.write_image_folder(args.work_dir / "digits" / name, split)
    runs = {rate: train(args.work_dir, rate, num_updates) for rate, num_updates in RATES.items()}
    run = next(iter(runs.values()))

    latents, pipe = LatentDataset(args.work_dir / "latents"), MPDiTPipeline.from_pretrained(run)
    training_scheduler = pipe.scheduler
    losses = held_out_losses(pipe.transformer, training_scheduler, latents, NUM_HELD_OUT)
    torch.manual_seed(SEED)
    untrained_model = MPDiTTransformer2DModel.from_config(pipe.transformer.config).eval()
    untrained = held_out_losses(untrained_model, training_scheduler, latents, NUM_HELD_OUT)
    images, labels = generate(pipe, NUM_JUDGED)
    real = splits["held_out"]
    judge = demo.fit_judge(splits["judge"])
    within = demo.within_class_ratio(images, labels, real)
    nearest = demo.nearest_training_ratio(images, labels, real, splits["train"])
    measured = {
        "held-out loss (squared error + bound in bits)": f"{losses['loss']:.6f}",
        f"samples at guidance {GUIDANCE_SCALE:g}, {NUM_INFERENCE_STEPS} steps of DPM-Solver": len(images),
        "of them a judge reads as asked": f"{demo.recognised(judge, images, labels):.1%}",
        "of real digits it reads": f"{demo.recognised(judge, real.images, real.labels):.1%}",
        "distance within a class, real digits = 1": f"{within:.2f}",
        "distance to the nearest training image, real digits = 1": f"{nearest:.2f}",
    }

    grid = args.work_dir / "samples.png"
    shown = [
        ImageOps.expand(image.resize((32, 32), Image.Resampling.NEAREST), border=2, fill=96)
        for i, image in enumerate(images)
        if i % NUM_JUDGED < NUM_SHOWN
    ]
    make_image_grid(shown, rows=10, cols=NUM_SHOWN).save(grid)
    write_model_card(
        run,
        license="apache-2.0",
        data="half of the digits that scikit-learn ships, 8x8 grey pixels, written by examples/demo.py",
        sample_grid=grid,
        num_images_seen=MAX_TRAIN_STEPS * BATCH_SIZE,
        hardware=f"one thread of {platform.machine()}, no GPU",
        metrics=measured,
    )
    for name in [*files_to_publish(run), "logs/metrics.jsonl"]:
        (args.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, args.output_dir / name)
    draw_curves(args.output_dir / "learning_rates.png", runs, untrained)

    print(f"\n{head(facts_of_run())}")
    print_tables(runs, untrained)
    print("\n" + "\n".join(f"- {name}: {value}" for name, value in measured.items()))
    fine = held_out_losses(pipe.transformer, training_scheduler, latents, NUM_HELD_OUT, num_levels=100)
    print(f"- held-out loss at 100 noise levels: {fine['loss']:.4f}")
    print(f"Checkpoint: {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
