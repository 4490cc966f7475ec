"""Does swapping AdaLN's shifts for rotations work? A stock DiT on real digits, swapped and fine-tuned in five ways.

    python benchmarks/quality/rotation_digits.py --output_dir rotation_digits --report docs/results/rotation_swap.md

For each seed a diffusers `DiTTransformer2DModel` is trained from scratch on the latents of the digits, and then
fine-tuned by every arm with the same number of updates, the same batches and the same noise: `control` without a
swap, and `drop`, `mean`, `anneal`, `distillation` (from `mean`) with one. Seed 0 tries every arm at every rate of
`--learning_rates`; the rate of its lowest validation loss is that of the arm, for all seeds. All training is done by
`finetune_rotation.py`. Every run leaves `records/<run>.json`; what has one is not done again.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from report import head_of, text, write_page
from shared import MODEL, demo, facts_of_run, finetune_rotation, read_log, table
from torch import nn

from diffusers_mp.files import read_json, whole_folder, write_json


ARMS = {
    "control": ("--swap", "none"),
    "drop": ("--swap", "drop"),
    "mean": ("--swap", "mean"),
    "anneal": ("--swap", "anneal"),
    "distillation": ("--swap", "mean", "--distillation"),
}
SCHEDULE = ("--lr_scheduler", "cosine")
# What numbers depend on: records with other settings are refused.
SETTINGS = (
    *("max_train_steps", "finetune_steps", "train_batch_size", "learning_rate", "vae_steps", "num_layers"),
    *("num_images_per_class", "num_inference_steps", "guidance_scale", "num_validation_images", "validation_steps"),
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("rotation_digits"), help="folder for everything")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, data order and noise; rates from the 1st")
    add("--max_train_steps", type=int, default=1600, help="updates of the base model")
    add("--finetune_steps", type=int, default=400, help="updates of each arm")
    add("--train_batch_size", type=int, default=32, help="samples of an update")
    add("--learning_rate", type=float, default=2e-3, help="of the base model")
    add("--learning_rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="tried by every arm")
    add("--vae_steps", type=int, default=400, help="updates of the VAE")
    add("--num_layers", type=int, default=MODEL["num_layers"], help="depth of the model")
    add("--num_images_per_class", type=int, default=30, help="samples that are judged, of each digit")
    add("--num_inference_steps", type=int, default=20, help="sampling steps")
    add("--guidance_scale", type=float, default=2.0, help="guidance of the samples")
    add("--num_validation_images", type=int, default=128, help="held out of the training part")
    add("--validation_steps", type=int, default=40, help="updates between points of the curves")
    add("--report", type=Path, help="write the tables here, and the figure beside them")
    return parser.parse_args(argv)


def main(args):
    splits = demo.split_digits()
    demo.write_image_folder(args.output_dir / "digits" / "train", splits["train"])
    make_vae(args, splits["train"])
    for seed in args.seeds:
        base = run(args, splits, f"base_seed{seed}", start_pipeline(args, seed), seed, base_arguments(args))
        for arm in ("drop", "mean"):
            run(args, splits, f"{arm}_swapped_seed{seed}", base, seed, (*ARMS[arm], "--max_train_steps", 0))
        for arm, arguments in ARMS.items():
            rates = args.learning_rates if seed == args.seeds[0] else [best_rate(args, arm)]
            for rate in rates:
                arguments_of_run = (*arguments, *finetune_arguments(args, rate))
                run(args, splits, run_name(arm, rate, seed), base, seed, arguments_of_run)
    if args.report is not None:
        report(args, splits)


def run_name(arm, rate, seed):
    return f"{arm}_lr{rate:g}_seed{seed}"


def best_rate(args, arm):
    """The rate with the lowest final validation loss on the first seed."""
    losses = {rate: read(args, run_name(arm, rate, args.seeds[0]))["final"]["loss"] for rate in args.learning_rates}
    return min(losses, key=losses.get)


def read(args, name):
    """The record of a run; refuses that of another experiment."""
    file = args.output_dir / "records" / f"{name}.json"
    record, wanted = json.loads(file.read_text()), settings_of(args)
    if record["settings"] != wanted:
        raise ValueError(
            f"`--output_dir` must hold runs with the settings of this command, {wanted}, {file} has "
            f"{record['settings']}: choose another folder for other settings."
        )
    return record


def settings_of(args):
    return {name: getattr(args, name) for name in SETTINGS}


# What is trained


def make_vae(args, digits):
    """The VAE of all seeds; its scaling factor makes latents of variance 1."""
    folder, unscaled = args.output_dir / "vae", args.output_dir / "unscaled_vae"
    if (folder / "config.json").is_file():
        return
    demo.train_vae(unscaled, digits, args.vae_steps, seed=0)
    vae = AutoencoderKL.from_pretrained(unscaled)
    vae.register_to_config(scaling_factor=1 / latent_std(vae, demo.pixels_of(digits)))
    with whole_folder(folder) as unfinished:
        vae.save_pretrained(unfinished)


@torch.no_grad()
def latent_std(vae, pixels):
    """Standard deviation of draws from the posteriors, of a VAE with one latent channel."""
    posteriors = [vae.encode(batch).latent_dist for batch in pixels.split(128)]
    of_means = torch.cat([posterior.mean for posterior in posteriors]).var((0, 2, 3))
    return (of_means + torch.cat([posterior.var for posterior in posteriors]).mean((0, 2, 3))).sqrt().item()


def start_pipeline(args, seed):
    """A pipeline with a stock DiT of random weights, its modulations at zero, as those of DiT start."""
    folder = args.output_dir / "start" / str(seed)
    if (folder / "model_index.json").is_file():
        return folder
    vae = AutoencoderKL.from_pretrained(args.output_dir / "vae")
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        **{**MODEL, "num_layers": args.num_layers},
        in_channels=vae.config.latent_channels,
        out_channels=2 * vae.config.latent_channels,
        sample_size=demo.IMAGE_SIZE // 4,
        num_embeds_ada_norm=len(demo.CLASS_NAMES),
    )
    for name, module in transformer.named_modules():
        if name.endswith("norm1.linear") or name == "proj_out_1":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    DiTPipeline(transformer, vae, DDPMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def base_arguments(args):
    options = {"--max_train_steps": args.max_train_steps, "--learning_rate": args.learning_rate}
    return ("--swap", "none", *sum(options.items(), ()), *SCHEDULE, "--lr_warmup_steps", 50, "--validation_steps", 0)


def finetune_arguments(args, rate):
    options = {
        "--max_train_steps": args.finetune_steps,
        "--learning_rate": rate,
        "--lr_warmup_steps": args.finetune_steps // 20,
        "--validation_steps": args.validation_steps,
    }
    return (*sum(options.items(), ()), *SCHEDULE)


def run(args, splits, name, base, seed, arguments):
    """One run of `finetune_rotation.py` and a look at its samples, unless there is a record; its folder."""
    folder, record = args.output_dir / "runs" / name, args.output_dir / "records" / f"{name}.json"
    if record.is_file():
        read(args, name)
        return folder
    print(f"--- {name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    options = {
        "--pretrained_model_name_or_path": base,
        "--train_data_dir": args.output_dir / "digits" / "train",
        "--latents_dir": args.output_dir / "latents",
        "--cache_dir": args.output_dir / "cache",
        "--output_dir": folder,
        "--seed": seed,
        "--total_batch_size": args.train_batch_size,
        "--num_validation_images": args.num_validation_images,
        "--mixed_precision": "no",
    }
    argv = [*sum(options.items(), ()), *arguments]
    finetune_rotation.main(finetune_rotation.parse_args(list(map(str, argv))))
    log = read_log(folder)
    measures = {
        "settings": settings_of(args),
        **facts_of_run(),
        **read_json(folder / "evaluation.json"),
        "curve": {entry["step"]: entry["validation/loss"] for entry in log if "validation/loss" in entry},
        "samples": judged(args, splits, folder, seed),
        "cpu_seconds": time.process_time() - start,
    }
    del measures["arguments"]
    write_json(record, measures)
    return folder


# What is measured


def judged(args, splits, folder, seed):
    """What a judge reads in samples of a run, and how they vary within a class."""
    labels = np.repeat(np.arange(len(demo.CLASS_NAMES)), args.num_images_per_class)
    pipeline = DiTPipeline.from_pretrained(folder)
    images = sample(pipeline, torch.tensor(labels), args, torch.Generator().manual_seed(seed))
    judge = demo.fit_judge(splits["judge"])
    return {
        "recognised": demo.recognised(judge, images, labels),
        "within_class_ratio": demo.within_class_ratio(images, labels, splits["held_out"]),
    }


@torch.no_grad()
def sample(pipeline, labels, args, generator):
    """Guided samples. `DiTPipeline` itself guides away from class 1000, whatever the number of classes."""
    transformer, vae = pipeline.transformer, pipeline.vae
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(args.num_inference_steps)
    channels, size = transformer.config.in_channels, transformer.config.sample_size
    latents = torch.randn(len(labels), channels, size, size, generator=generator)
    classes = torch.cat([labels, torch.full_like(labels, transformer.config.num_embeds_ada_norm)])
    for timestep in scheduler.timesteps:
        prediction = transformer(latents.repeat(2, 1, 1, 1), timestep.expand(len(classes)), classes).sample
        conditional, unconditional = prediction[:, :channels].chunk(2)
        noise = unconditional + args.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    pixels = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    return pipeline.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())


# The report


def report(args, splits):
    """Write the tables and the figure."""
    rates = {arm: best_rate(args, arm) for arm in ARMS}
    names = {
        "base": "base_seed{}",
        "(a) right after `drop`": "drop_swapped_seed{}",
        "(b) right after `mean`": "mean_swapped_seed{}",
        **{f"`{arm}`": f"{arm}_lr{rate:g}_seed{{}}" for arm, rate in rates.items()},
    }
    runs = {label: [read(args, name.format(seed)) for seed in args.seeds] for label, name in names.items()}
    control = [record["final"]["loss"] for record in runs["`control`"]]

    def row(label, records):
        losses = [record["final"]["loss"] for record in records]
        difference = "" if label == "`control`" else text(np.subtract(losses, control), 5)
        measured = [record["samples"] for record in records]
        return (
            label,
            text(losses, 4),
            difference,
            "" if label == "base" else text([record["final"]["relative_error"] for record in records], 4),
            text([each["recognised"] for each in measured], 1, 100),
            text([each["within_class_ratio"] for each in measured], 3),
            f"{records[0]['num_parameters']['after']:,}",
        )

    columns = ("validation loss", "less control's", "relative error", "recognised %", "within class", "weights")
    quality = table(("model", *columns), [row(*item) for item in runs.items()])
    first = args.seeds[0]
    tried = table(
        ("arm", *(f"{rate:g}" for rate in args.learning_rates)),
        [
            (arm, *(f"{read(args, run_name(arm, rate, first))['final']['loss']:.4f}" for rate in args.learning_rates))
            for arm in ARMS
        ],
    )
    figure = args.report.with_name(f"{args.report.stem}_loss.png")
    args.report.parent.mkdir(parents=True, exist_ok=True)
    plot(args, {label: runs[label] for label in map("`{}`".format, ARMS)}, runs["base"], figure)
    records = [read_json(path) for path in (args.output_dir / "records").glob("*.json")]
    judge, held_out = demo.fit_judge(splits["judge"]), splits["held_out"]
    numbers = TEMPLATE.format(
        head=head_of(records),
        minutes=sum(record["cpu_seconds"] for record in records) / 60,
        num_runs=len(records),
        seeds=f"{len(args.seeds)} seeds",
        num_samples=len(demo.CLASS_NAMES) * args.num_images_per_class,
        real=demo.recognised(judge, held_out.images, held_out.labels),
        rates=", ".join(f"{arm} {rate:g}" for arm, rate in rates.items()),
        first=first,
        quality=quality,
        tried=tried,
        **{name: value for name, value in vars(args).items() if name != "seeds"},
    )
    write_page(args.report, numbers)


def plot(args, arms, base, file):
    """Validation loss over updates of fine-tuning, mean over seeds."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for (label, records), marker in zip(arms.items(), "os^vD", strict=True):
        steps = [int(step) for step in records[0]["curve"]]
        losses = np.mean([list(record["curve"].values()) for record in records], axis=0)
        axes.plot(steps, losses, label=label.strip("`"), marker=marker, markersize=4, alpha=0.8)
    level = np.mean([record["final"]["loss"] for record in base])
    axes.axhline(level, color="black", linestyle=":", label="base, before")
    axes.set(xlabel="update of fine-tuning", ylabel="validation loss")
    axes.set_title(f"Stock DiT on digits, swapped: mean of {len(args.seeds)} seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


TEMPLATE = """{head}
- {minutes:.0f} minutes of one core for {num_runs} runs

A diffusers `DiTTransformer2DModel` is trained from scratch on the latents of real digits
({max_train_steps} updates of {train_batch_size}), and then fine-tuned for {finetune_steps} updates by every arm, from
the same weights, with the same batches and noise: `control` as it is, the others with their shifts swapped for
rotations. `drop` puts nothing beside the rotations, `mean` the mean of the shifts, `anneal` the shifts, faded into
their mean over half of the updates; `distillation` is `mean`, trained on the predictions of the untouched model.

Mean ± 95 % interval (Student's t) over {seeds}. Validation loss: of {num_validation_images} images held out of
training, at 8 fixed noise levels, with the variational bound in it. `less control's` is paired: same seed, images and
noise. Relative error: squared difference of the predicted noise from the base's, relative to the latter. Recognised:
by a judge fitted on other digits; {num_samples} samples, guidance {guidance_scale:g}, {num_inference_steps} steps
(real digits: {real:.1%}). Within class: mean distance between samples of a class, real digits = 1.

{quality}

Every arm was tried at these rates on seed {first}, with these final validation losses. The best of each was used for
all seeds: {rates}. What seed {first} says is therefore flattered, for all arms alike.

{tried}
"""


if __name__ == "__main__":
    main(parse_args())
