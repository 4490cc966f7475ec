"""Magnitudes of five configurations trained on the demo's digits: the figures of docs/diagnostics.md.

    python benchmarks/quality/digits_magnitudes.py --output_dir digits_magnitudes

Trains a small VAE and, by examples/train_mpdit.py with `--record_magnitudes_steps`, a model of each configuration on
its latents, then draws what was recorded, and prints the held-out loss of averages of many widths. What a broken-off
run has finished is not done again. The paper's Figure 5 is of S/2 on ImageNet after 400 000 updates: here models are
small and runs short, so that only the kind of figure is the same.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from shared import MODEL, demo, facts_of_run, head, held_out_losses, run_trainer, table

from diffusers_mp import MagnitudeRecorder, MPDiTPipeline, reconstruct_ema
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.diagnostics import plots
from diffusers_mp.files import write_json
from diffusers_mp.presets import CONFIGURATIONS


EMA_STDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.17, 0.21, 0.25)
# The paper's 1e-2 for magnitude-preserving models; ten times its 1e-4 for the others, since runs are short.
LEARNING_RATES = {configuration: 1e-3 if configuration in "AB" else 1e-2 for configuration in CONFIGURATIONS}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for everything, figures/ among it")
    parser.add_argument("--configurations", nargs="+", choices=[*CONFIGURATIONS], default=[*CONFIGURATIONS])
    parser.add_argument("--max_train_steps", type=int, default=600, help="updates of each configuration")
    parser.add_argument("--vae_steps", type=int, default=400, help="updates of the VAE")
    parser.add_argument("--num_validation_images", type=int, default=128, help="images held out of training")
    parser.add_argument("--ema_stds", type=float, nargs="+", default=EMA_STDS, help="widths of averages to measure")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(args, configuration):
    """One model, unless it is there."""
    folder, model = args.output_dir / configuration, args.output_dir / f"{configuration}.json"
    write_json(model, {**MODEL, **CONFIGURATIONS[configuration]})
    options = {
        "--train_data_dir": args.output_dir / "digits" / "train",
        "--vae": args.output_dir / "vae",
        "--resolution": demo.IMAGE_SIZE,
        "--latents_dir": args.output_dir / "latents",
        "--model_config_name_or_path": model,
        "--total_batch_size": 64,
        "--max_train_steps": args.max_train_steps,
        "--learning_rate": LEARNING_RATES[configuration],
        "--num_validation_images": args.num_validation_images,
        "--validation_steps": 0,
        "--checkpointing_steps": max(1, args.max_train_steps // 4),
        "--checkpoints_total_limit": 1,
        "--record_magnitudes_steps": max(1, args.max_train_steps // 30),
        "--ema_snapshot_steps": max(1, args.max_train_steps // 20),
        "--seed": args.seed,
    }
    run_trainer(folder, options)
    return folder


def losses_of_averages(args, folder):
    """Held-out loss of averages of each width."""
    latents, losses = LatentDataset(args.output_dir / "latents"), {}
    for std in args.ema_stds:
        average = folder / f"average_{std:g}"
        if not (average / "model_index.json").is_file():
            reconstruct_ema(folder / "ema_snapshots", average, std)
        pipeline = MPDiTPipeline.from_pretrained(average)
        parts = pipeline.transformer, pipeline.scheduler, latents
        losses[std] = held_out_losses(*parts, args.num_validation_images, args.seed)["loss"]
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
    values, rows = recorder.values(), []
    for index in range(len(model.transformer_blocks)):
        cells = []
        for branch in ("attn", "ff"):
            name = f"transformer_blocks.{index}.{branch}"
            returned, given = (values[f"magnitude/activations/{module}"] for module in (name, f"{name}_modulation"))
            cells += [f"{returned / given:.2f}", f"{values[f'gate/rms/{name}_modulation']:.2f}"]
        rows.append((index + 1, *cells))
    header = ("attention, out / in", "its gate, RMS", "feed-forward, out / in", "its gate, RMS")
    print(f"\n{table((f'{folder.name}, block', *header), rows)}\n")


def main():
    args = parse_args()
    disable_progress_bar()
    start = time.perf_counter()
    digits = demo.split_digits()["train"]
    demo.write_image_folder(args.output_dir / "digits" / "train", digits)
    demo.train_vae(args.output_dir / "vae", digits, args.vae_steps, seed=0)
    folders = {configuration: train(args, configuration) for configuration in args.configurations}
    records = {name: folder / "logs" / "magnitudes.json" for name, folder in folders.items()}
    print(head(facts_of_run()))
    first, last = args.configurations[0], args.configurations[-1]
    print_branches(folders[last], args.seed)
    losses = losses_of_averages(args, folders[last])
    row = ("held-out loss", *(f"{loss:.4f}" for loss in losses.values()))
    print(table((f"{last}, width of the average", *losses), [row]))
    figures = {
        "magnitudes_blocks": plots.plot_blocks(records),
        "magnitudes_time": plots.plot_over_time({name: records[name] for name in (first, last)}),
        "magnitudes_angles": plots.plot_angles({last: records[last]}),
    }
    folder = args.output_dir / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
        print(folder / f"{name}.png")
    print(f"seconds in all: {time.perf_counter() - start:.0f}")


if __name__ == "__main__":
    main()
