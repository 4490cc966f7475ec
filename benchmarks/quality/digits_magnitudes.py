"""Magnitudes of five configurations trained on the demo's digits: the pictures of docs/diagnostics.md.

    python benchmarks/quality/digits_magnitudes.py --output_dir digits_magnitudes

Trains a small VAE and, by examples/train_mpdit.py with `--record_magnitudes_steps`, a model of each configuration on
its latents, then draws what was recorded, the held-out loss of averages of many widths, and samples. What a broken-off
run has finished is not done again. The paper's Figure 5 is of S/2 on ImageNet after 400 000 updates: here models are
small and runs short, so that only the kind of picture is the same.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils.logging import disable_progress_bar
from shared import EXAMPLES, demo, facts
from torch.utils.data import DataLoader

from diffusers_mp import MagnitudeRecorder, MPDiTPipeline, reconstruct_ema
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.diagnostics import plots
from diffusers_mp.presets import CONFIGURATIONS
from diffusers_mp.training import (
    DDPMObjective,
    TrainingSamples,
    split_validation,
    validation_losses,
    validation_timesteps,
)


EMA_STDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.17, 0.21, 0.25)
# The paper's 1e-2 for magnitude-preserving models; ten times its 1e-4 for the others, since runs are short.
LEARNING_RATES = {configuration: 1e-3 if configuration in "AB" else 1e-2 for configuration in CONFIGURATIONS}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for everything, pictures/ among it")
    parser.add_argument("--configurations", nargs="+", choices=[*CONFIGURATIONS], default=[*CONFIGURATIONS])
    parser.add_argument("--max_train_steps", type=int, default=600, help="updates of each configuration")
    parser.add_argument("--vae_steps", type=int, default=400, help="updates of the VAE")
    parser.add_argument("--num_validation_images", type=int, default=128, help="images held out of training")
    parser.add_argument("--ema_stds", type=float, nargs="+", default=EMA_STDS, help="widths of averages to measure")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def run(*command):
    """Run one of the example scripts."""
    subprocess.run([sys.executable, *map(str, command)], check=True)


def train(args, configuration):
    """One model, unless it is there."""
    folder = args.output_dir / configuration
    if (folder / "model_index.json").is_file():
        return folder
    model = {**json.loads(Path(__file__).with_name("digits_model.json").read_text()), **CONFIGURATIONS[configuration]}
    (args.output_dir / f"{configuration}.json").write_text(json.dumps(model))
    run(
        EXAMPLES / "train_mpdit.py",
        *("--train_data_dir", args.output_dir / "digits" / "train"),
        *("--vae", args.output_dir / "vae"),
        *("--resolution", 32),
        *("--latents_dir", args.output_dir / "latents"),
        *("--model_config_name_or_path", args.output_dir / f"{configuration}.json"),
        *("--output_dir", folder),
        *("--train_batch_size", 64),
        *("--max_train_steps", args.max_train_steps),
        *("--learning_rate", LEARNING_RATES[configuration]),
        *("--num_validation_images", args.num_validation_images),
        *("--validation_steps", 0),
        *("--checkpointing_steps", max(1, args.max_train_steps // 4)),
        *("--checkpoints_total_limit", 1),
        *("--record_magnitudes_steps", max(1, args.max_train_steps // 30)),
        *("--ema_snapshot_steps", max(1, args.max_train_steps // 20)),
        *("--seed", args.seed),
        *("--resume_from_checkpoint", "latest"),
    )
    if not (folder / "model_index.json").is_file():
        raise SystemExit(f"stopped by a signal in the training of {configuration}; the same command goes on")
    return folder


@torch.no_grad()
def losses_of_averages(args, folder):
    """Held-out loss of averages of each width."""
    latents = LatentDataset(args.output_dir / "latents")
    _, held_out = split_validation(len(latents), args.num_validation_images, args.seed)
    samples = TrainingSamples(latents, seed=args.seed, num_classes=10, indices=held_out)
    losses = {}
    for std in args.ema_stds:
        average = folder / f"average_{std:g}"
        if not (average / "model_index.json").is_file():
            reconstruct_ema(folder / "ema_snapshots", average, std)
        pipeline = MPDiTPipeline.from_pretrained(average)
        objective = DDPMObjective(pipeline.scheduler)
        batches = DataLoader(samples, sampler=[(0, index) for index in range(len(samples))], batch_size=64)
        levels = validation_timesteps(objective, 8)
        losses[std] = validation_losses(pipeline.transformer, objective, batches, levels, torch.device("cpu"))["loss"]
        print(f"- {folder.name}, average of width {std:g}: held-out loss {losses[std]:.4f}")
    return losses


@torch.no_grad()
def print_branches(folder, seed):
    """What the branches of a trained model return, relative to what they are given, and the gates after them."""
    model = MPDiTPipeline.from_pretrained(folder).transformer.eval()
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(64, model.config.in_channels, 8, 8, generator=generator)
    timestep = torch.randint(0, 1000, (64,), generator=generator)
    class_labels = torch.randint(0, 10, (64,), generator=generator)
    with MagnitudeRecorder(model, modules=r"transformer_blocks\.\d+\.(attn|ff)(_modulation)?") as recorder:
        model(latents, timestep, class_labels)
    values = recorder.values()
    print(f"\n| {folder.name}, block | attention, out / in | its gate, RMS | feed-forward, out / in | its gate, RMS |")
    print("|---|---|---|---|---|")
    for index in range(len(model.transformer_blocks)):
        cells = [str(index + 1)]
        for branch in ("attn", "ff"):
            name = f"transformer_blocks.{index}.{branch}"
            returned, given = (values[f"magnitude/activations/{module}"] for module in (name, f"{name}_modulation"))
            cells += [f"{returned / given:.2f}", f"{values[f'gate/rms/{name}_modulation']:.2f}"]
        print(f"| {' | '.join(cells)} |")
    print()


def samples_of(folder, seed):
    """A sample of each digit."""
    pipeline = MPDiTPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        class_labels=list(range(10)),
        num_inference_steps=25,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(seed),
    ).images


def main():
    args = parse_args()
    disable_progress_bar()
    start = time.perf_counter()
    digits = demo.split_digits()["train"]
    demo.write_image_folder(args.output_dir / "digits" / "train", digits)
    demo.train_vae(args.output_dir / "vae", digits, args.vae_steps, seed=0)
    folders = {configuration: train(args, configuration) for configuration in args.configurations}
    records = {name: folder / "logs" / "magnitudes.json" for name, folder in folders.items()}
    print(facts.head(facts.facts_of_run()))
    first, last = args.configurations[0], args.configurations[-1]
    print_branches(folders[last], args.seed)
    figures = {
        "magnitudes_blocks": plots.plot_blocks(records),
        "magnitudes_time": plots.plot_over_time({name: records[name] for name in (first, last)}),
        "magnitudes_angles": plots.plot_angles({last: records[last]}),
        "magnitudes_ema": plots.plot_ema_widths(
            {last: losses_of_averages(args, folders[last])}, ylabel="held-out loss (squared error + bound in bits)"
        ),
        "magnitudes_samples": plots.plot_samples(
            {name: samples_of(folder, args.seed) for name, folder in folders.items()}, columns=list(range(10))
        ),
    }
    pictures = args.output_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(pictures / f"{name}.png")
        print(pictures / f"{name}.png")
    print(f"seconds in all: {time.perf_counter() - start:.0f}")


if __name__ == "__main__":
    main()
