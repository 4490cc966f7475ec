"""The whole product on real data in a few minutes: digits, a VAE, a transformer, samples, and a judge of them.

    python examples/demo.py --output_dir demo

Leaves `samples.png` (ten classes), `loss.png`, the pipeline in `model/`, the VAE in `vae/` and the data in `digits/`.
The result is a function of the flags and the number of threads, which is that of the CPUs the process may use, and
never of speed: a slow machine takes longer and makes the same images. Interrupted, the same command goes on. All of it
runs on the CPU, also where there is a GPU.

The digits are the 1797 scans that scikit-learn ships: no network is needed. VAE and transformer see half of each
class, the classifier that reads the samples another quarter; what the last one scores a perfect model would score.
"""

import functools
import hashlib
import json
import os
import runpy
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import diffusers_mp
from diffusers_mp import scripts
from diffusers_mp.arguments import HelpFormatter, at_least, finite, seed
from diffusers_mp.files import whole_file, whole_folder, write_json
from diffusers_mp.scripts import ScriptParser, command_line, run_script


EXAMPLES = Path(__file__).resolve().parent
RECORD_NAME = "demo.json"
INTERRUPTED = "interrupted: the same command goes on"
IMAGE_SIZE, SCAN_SIZE = 32, 8
SAVING_STEPS = 50  # of the VAE's training
# In the order of numbers, as the trainer reads a folder's classes: the id of a class is its digit.
CLASS_NAMES = [str(digit) for digit in range(10)]
VAE = {
    **{"in_channels": 1, "out_channels": 1, "latent_channels": 1, "layers_per_block": 1, "sample_size": IMAGE_SIZE},
    **{"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
    **{"block_out_channels": [16, 32, 32], "norm_num_groups": 8, "mid_block_add_attention": False},
}
MODEL = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "patch_size": 2}


def make_parser():
    parser = ScriptParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("demo"), help="folder for everything")
    add("--max_train_steps", type=at_least(1), default=1500, help="updates of the transformer")
    add("--vae_steps", type=at_least(1), default=300, help="updates of the VAE")
    add("--guidance_scale", type=finite, default=2.0, help="guidance of the samples")
    add("--num_inference_steps", type=at_least(1), default=25, help="sampling steps")
    # Distances within a class need two images.
    add("--num_images_per_class", type=at_least(2), default=50, help="samples that are judged, of each digit")
    add("--seed", type=seed, default=0, help="seed of training and samples")
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


# The folder


def usable_cpus():
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def describe(args):
    """What the result is a function of, but for the number of threads and the processor: flags, versions, sources."""
    packages = ("torch", "numpy", "diffusers", "accelerate", "datasets", "pillow", "scikit-learn")
    sources = sorted([*EXAMPLES.glob("*.py"), *Path(diffusers_mp.__file__).parent.rglob("*.py")])
    return {
        "flags": {name: value for name, value in sorted(vars(args).items()) if name not in ("output_dir", "debug")},
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        "sources_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }


def open_folder(args):
    """Make the folder, or find what an interrupted run has left; one of another version is moved aside.

    Returns the number of threads, which the folder keeps, so that a run that goes on ends as it would have.
    """
    record_file, wanted = args.output_dir / RECORD_NAME, describe(args)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        try:
            record = json.loads(record_file.read_text())
            num_threads = record.pop("num_threads")
        except (OSError, ValueError, KeyError):
            record = {}
        if record == wanted:
            return num_threads
        differences = [name for name in wanted if record.get(name) != wanted[name]] if record else ["no record"]
        aside = next(
            path for i in range(1, 1000) if not (path := Path(f"{str(args.output_dir).rstrip('/')}.old-{i}")).exists()
        )
        args.output_dir.rename(aside)
        print(f"{args.output_dir} was made by another version ({', '.join(differences)}): kept as {aside}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    num_threads = usable_cpus()
    write_json(record_file, {**wanted, "num_threads": num_threads})
    return num_threads


if __name__ == "__main__":
    # Before the heavy imports: `--help` answers at once, and torch is told the number of threads.
    arguments = command_line(parse_args, make_parser())
    signal.signal(signal.SIGINT, lambda *_: sys.exit(f"\n{INTERRUPTED}"))  # while it imports
    print(
        "Trains a VAE and a diffusion transformer on 896 real handwritten digits, then draws new ones: about 4 "
        "minutes on 2 idle cores. Interrupted, the same command goes on.",
        flush=True,
    )
    num_threads = open_folder(arguments)
    # Threads that wait for each other give way soon: with busy neighbours they would spin for most of the time.
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(num_threads), "GOMP_SPINCOUNT": "1000"}

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC
from tqdm.auto import tqdm

from diffusers_mp import MPDiTPipeline
from diffusers_mp.sheets import CELL_SIZE, draw_sheet


# Digits


class LabelledImages(NamedTuple):
    """N images, their digits, shape (N,), and their places among all the scans, shape (N,)."""

    images: list[Image.Image]
    labels: np.ndarray
    numbers: np.ndarray


def upscale(scan):
    """One 8x8 scan with values 0 to 16 as a 32x32 8-bit greyscale image.

    Lanczos, because averaging its 4x4 blocks returns the scan more closely than after bilinear or bicubic upscaling.
    """
    image = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def split_digits():
    """All 1797 digits in three disjoint parts by their names, each class divided 1/2, 1/4, 1/4 by a fixed shuffle."""
    digits, rng = load_digits(), np.random.default_rng(0)
    numbers = {"train": [], "judge": [], "held_out": []}
    for digit in range(len(CLASS_NAMES)):
        members = rng.permutation(np.flatnonzero(digits.target == digit))
        half, quarter = len(members) // 2, len(members) // 4
        for name, part in zip(numbers, np.split(members, [half, half + quarter]), strict=True):
            numbers[name].extend(part)
    return {
        name: LabelledImages([upscale(digits.images[number]) for number in part], digits.target[part], part)
        for name, part in zip(numbers, map(np.sort, numbers.values()), strict=True)
    }


def write_image_folder(folder, digits):
    """Write `folder/<digit>/<number>.png`, the layout that `datasets.load_dataset("imagefolder")` reads.

    Other files would become training data: a ValueError names them. The same digits again are written over.
    """
    paths = [folder / CLASS_NAMES[label] / f"{number:04d}.png" for label, number in zip(*digits[1:], strict=True)]
    strangers = sorted({path for path in folder.rglob("*") if path.is_file()} - set(paths))
    if strangers:
        raise ValueError(
            f"`folder` must hold nothing but the digits to be written, got {folder} with {len(strangers)} other "
            f"files, the first {strangers[0]}. Name an empty folder."
        )
    for path, image in zip(paths, digits.images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


# The VAE


def train_vae(folder, digits, num_steps, seed):
    """Train a small `AutoencoderKL`, whose three levels make of a 32x32 image a latent of 1x8x8, unless it is there.

        loss = mean (x - decode(z))² + 1e-3 · mean KL(q(z|x) ‖ N(0, 1)),      z drawn from q(z|x)

    Means are per value; no adversarial and no perceptual term. It suits small images of one kind; for photographs
    take a published VAE. Each update draws from a generator of (seed, update), so that a run that was killed goes on
    from its last save and ends with the same VAE.
    """
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    # Named by what its content is a function of, beside the digits: one of other flags is not gone on with.
    state_file, first_step = folder.with_name(f"{folder.name}.{num_steps}-{seed}.pt"), 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]

    pixels = pixels_of(digits)
    progress_bar = tqdm(range(first_step, num_steps), "VAE", num_steps, initial=first_step)
    for step in progress_bar:
        generator = torch.Generator().manual_seed(seed * num_steps + step)
        warmup = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = 2e-3 * warmup * (1 - step / num_steps)

        batch = pixels[torch.randint(len(pixels), (32,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.mse_loss(reconstruction, batch) + 1e-3 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress_bar.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}", refresh=False)

        if (step + 1) % SAVING_STEPS == 0:
            state = {"step": step + 1, "vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            with whole_file(state_file) as unfinished:
                torch.save(state, unfinished)
    with whole_folder(folder) as unfinished:
        vae.save_pretrained(unfinished)
    state_file.unlink(missing_ok=True)


def pixels_of(digits):
    """Values in [-1, 1], shape (N, 1, 32, 32), class by class."""
    order = np.argsort(digits.labels, kind="stable")
    pixels = torch.from_numpy(np.stack([np.asarray(digits.images[place]) for place in order]))
    return pixels[..., None].permute(0, 3, 1, 2).float() / 127.5 - 1


# The judge. Distances are Euclidean in `features`, and their ratios to real digits are about 1 for a perfect model: a
# model that repeats one image per class has a within-class ratio of 0, one that has memorised its training images a
# nearest-training ratio of 0.


def features(images):
    """What the judge reads of images of any mode and size: grey, averaged down to 8x8, in [0, 1], shape (N, 64)."""
    size = (SCAN_SIZE, SCAN_SIZE)
    scans = [np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=float) for image in images]
    return np.stack(scans).reshape(len(scans), -1) / 255


def fit_judge(digits):
    """A support vector classifier with a Gaussian kernel on `features` of the `judge` part."""
    return SVC(C=10.0).fit(features(digits.images), digits.labels)


def recognised(judge, images, labels):
    """Fraction of images in which the judge reads the digit that `labels` says: of real ones its accuracy."""
    return float(np.mean(judge.predict(features(images)) == check_labels(images, labels)))


def within_class_distance(images, labels):
    """Mean distance between two images of a class, however many it has, averaged over the classes present."""
    labels, points = check_labels(images, labels), features(images)
    means = []
    for label in np.unique(labels):
        members = points[labels == label]
        if len(members) < 2:
            raise ValueError(f"`images` must hold at least two images of each class, got one of class {label}.")
        means.append(pairwise_distances(members)[np.triu_indices(len(members), k=1)].mean())
    return float(np.mean(means))


def nearest_distance(images, labels, training_images):
    """Mean distance to the nearest training image, averaged within each class, then over the classes present."""
    labels = check_labels(images, labels)
    nearest = pairwise_distances(features(images), features(training_images)).min(axis=1)
    return float(np.mean([nearest[labels == label].mean() for label in np.unique(labels)]))


def within_class_ratio(images, labels, held_out):
    """`within_class_distance` of samples over that of the real digits of the same classes in `held_out`."""
    return within_class_distance(images, labels) / within_class_distance(*same_classes(held_out, labels))


def nearest_training_ratio(images, labels, held_out, train):
    """`nearest_distance` of samples over that of the real digits of the same classes in `held_out`."""
    real = nearest_distance(*same_classes(held_out, labels), train.images)
    return nearest_distance(images, labels, train.images) / real


def check_labels(images, labels):
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"`labels` must hold one digit per image, got shape {labels.shape} for {len(images)} images.")
    return labels


def same_classes(digits, labels):
    keep = np.flatnonzero(np.isin(digits.labels, labels))
    return [digits.images[i] for i in keep], digits.labels[keep]


@torch.no_grad()
def reconstruct(vae, images):
    """Grey images after one pass through the VAE: the decoded mean of the posterior, as a pipeline delivers it."""
    processor = VaeImageProcessor(do_convert_grayscale=True)
    reconstructions = vae.decode(vae.encode(processor.preprocess(images)).latent_dist.mode()).sample
    return processor.postprocess(reconstructions)


# What is drawn


def plot_losses(metrics_file, image_file):
    """Training and validation loss over updates."""
    entries = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, label, marker in (("train", "training", ""), ("validation", "held out, averaged weights", "o")):
        points = [(entry["step"], entry[f"{name}/loss"]) for entry in entries if f"{name}/loss" in entry]
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, alpha=0.8)
    axes.set(xlabel="update", ylabel="loss (squared error + bound in bits)", yscale="log", title="MPDiT on digits")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(image_file, dpi=150, bbox_inches="tight")


# The demo


def train_transformer(args, data, vae, model):
    """Run the trainer as a user would, but in this process: one that is killed leaves none behind."""
    model_config = args.output_dir / "model.json"
    write_json(model_config, MODEL)
    options = {
        "--train_data_dir": data / "train",
        "--vae": vae,
        "--resolution": IMAGE_SIZE,
        "--model_config_name_or_path": model_config,
        "--output_dir": model,
        "--total_batch_size": 64,
        "--max_train_steps": args.max_train_steps,
        # Above the paper's 1e-2, which is for 400 000 updates: so short a run has to take longer steps.
        "--learning_rate": 3e-2,
        "--checkpointing_steps": 250,
        "--checkpoints_total_limit": 1,
        "--validation_steps": 250,
        "--validation_guidance_scale": args.guidance_scale,
        "--seed": args.seed,
        "--resume_from_checkpoint": "latest",
    }
    sys.argv = ["train_mpdit.py", *map(str, sum(options.items(), ()))]
    try:
        runpy.run_path(str(EXAMPLES / "train_mpdit.py"), run_name="__main__")
    except SystemExit as end:
        if end.code == scripts.INTERRUPTED:  # before its first update
            raise KeyboardInterrupt from None
        raise
    if not (model / "model_index.json").is_file():
        raise KeyboardInterrupt  # The trainer was told to stop, and has saved a checkpoint.


def sample(args, model):
    """Images of the ten classes, as many of each, and the sheet of the first ten of them."""
    pipe = MPDiTPipeline.from_pretrained(model)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    images = pipe(
        class_labels=CLASS_NAMES,
        num_images_per_class=args.num_images_per_class,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    columns, first = min(10, args.num_images_per_class), range(0, len(images), args.num_images_per_class)
    shown = [image.convert("L") for i in first for image in images[i : i + columns]]
    shown = [image.resize((CELL_SIZE, CELL_SIZE), Image.Resampling.BICUBIC) for image in shown]
    title = f"MPDiT on digits: guidance {args.guidance_scale:g}, {args.num_inference_steps} steps, one class a row"
    return images, draw_sheet(shown, columns, row_names=CLASS_NAMES, title=title)


def print_judgement(images, splits, vae):
    """What the judge reads in samples, in real digits, and in those after the VAE, and how far samples are apart."""
    judge, held_out, labels = fit_judge(splits["judge"]), splits["held_out"], np.repeat(range(10), len(images) // 10)
    real, decoded = (held_out.images, held_out.labels), (reconstruct(vae, held_out.images), held_out.labels)
    read = [recognised(judge, *judged) for judged in ((images, labels), real, decoded)]
    within = within_class_ratio(images, labels, held_out)
    nearest = nearest_training_ratio(images, labels, held_out, splits["train"])
    print(f"{'':45}{'samples':>9}{'real digits':>13}{'real, through the VAE':>23}")
    print(f"{'read as the digit asked for':45}{read[0]:9.1%}{read[1]:13.1%}{read[2]:23.1%}")
    print(f"{'distance within a class (real digits = 1)':45}{within:9.2f}{1:13.2f}")
    print(f"{'distance to the nearest training image':45}{nearest:9.2f}{1:13.2f}")


def main(args, num_threads):
    torch.set_num_threads(num_threads)
    start = time.perf_counter()
    data, vae, model = args.output_dir / "digits", args.output_dir / "vae", args.output_dir / "model"

    print("1/5 Real handwritten digits, written as image folders", flush=True)
    splits = split_digits()
    for name, split in splits.items():
        write_image_folder(data / name, split)

    print(f"2/5 A VAE of factor 4, {args.vae_steps:,} updates on {num_threads} threads", flush=True)
    train_vae(vae, splits["train"], args.vae_steps, args.seed)

    print(f"3/5 A magnitude-preserving diffusion transformer, {args.max_train_steps:,} updates", flush=True)
    train_transformer(args, data, vae, model)
    plot_losses(model / "logs" / "metrics.jsonl", args.output_dir / "loss.png")

    print(f"4/5 Samples of the ten classes, {args.num_images_per_class} of each", flush=True)
    images, sheet = sample(args, model)
    sheet.save(args.output_dir / "samples.png")

    print("5/5 A judge that neither the VAE nor the transformer has met reads them", flush=True)
    print_judgement(images, splits, AutoencoderKL.from_pretrained(vae))
    digest = hashlib.sha256((args.output_dir / "samples.png").read_bytes()).hexdigest()
    print(f"{time.perf_counter() - start:.0f} s on {num_threads} threads; SHA-256 of samples.png: {digest[:16]}")
    print(f"Look at {args.output_dir / 'samples.png'} and {args.output_dir / 'loss.png'}; the pipeline is {model}.")
    print("Next: your own images, a folder for each class: docs/train.md, or python examples/train_mpdit.py --help")


if __name__ == "__main__":
    # `kill` ends as Ctrl+C does, but in the trainer, which saves a checkpoint first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    run_script(functools.partial(main, num_threads=num_threads), arguments, make_parser(), INTERRUPTED)
