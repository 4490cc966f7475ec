"""What does each part of the magnitude-preserving transformer do? Real digits, and for every arm a rate of its own.

    python benchmarks/quality/ablate.py --output_dir ablation --report docs/results/ablation.md \
        --records benchmarks/records/ablation.jsonl

Arms are configurations A to D with DiT's own modulation, and E with ten modulations. All have equal data, updates and
batches, and runs of one seed the same order and noise. Every arm first tries its rates on the first seed; the one of
the lowest validation loss is that of the other seeds, and if it fails there the next best is taken for all. All
training is done by `train_mpdit.py`, on pixels.

Every run leaves `records/<run>.json`; what has one is not done again, and a run that was broken off goes on at its
last checkpoint. Several processes may share a folder, each at a run of its own: on models this small a thread each
(`OMP_NUM_THREADS=1`) is the best use of cores. Reports are made of records alone; `--max_hours 0` trains nothing.
"""

import argparse
import contextlib
import datetime
import fcntl
import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import ablation_report
import numpy as np
import torch
from ablation_judge import distance, facts_of_judge, fit_judge, load_judge
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from safetensors.torch import save_file
from shared import demo, facts_of_run, read_log, train_mpdit
from sklearn.datasets import load_digits

from diffusers_mp import MPDiTPipeline, get_preset
from diffusers_mp.data.encoding import encode_dataset
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.data.settings import EncodingSettings
from diffusers_mp.diagnostics.history import load_history
from diffusers_mp.evaluation.generation import NonFiniteImageError, generate_images
from diffusers_mp.files import read_json, sha256_of_file, whole_file, write_json
from diffusers_mp.training import (
    NonFiniteError,
    find_checkpoints,
    read_state,
    resolve_checkpoint,
    split_validation,
)


class Arm(NamedTuple):
    """A configuration of the paper and its modulations."""

    configuration: str
    modulation: str

    @property
    def name(self):
        return f"{self.configuration}_{self.modulation}"


class Run(NamedTuple):
    """One training."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self):
        return f"{self.arm.name}_lr{self.learning_rate:g}_seed{self.seed}"


# In the order in which they are run: what the main claims of the paper are about comes first.
BASELINE = Arm("A", "scale+shift+gate")
ADALN, ROTATION = Arm("E", "scale+shift+gate"), Arm("E", "scale+rotate+gate")
ARMS = (
    *(BASELINE, ROTATION, ADALN),
    *(Arm(configuration, "scale+shift+gate") for configuration in "BCD"),
    *(Arm("E", f"{kinds}+gate") for kinds in ("scale", "shift", "rotate")),
    *(Arm("E", kinds) for kinds in ("scale+rotate", "scale+shift", "scale", "shift", "rotate")),
)
# What numbers depend on: records with other settings are refused.
SETTINGS = (
    *("max_train_steps", "train_batch_size", "num_layers", "num_attention_heads", "attention_head_dim"),
    *("num_validation_images", "num_samples", "num_inference_steps"),
)
FAILURES = (NonFiniteError, NonFiniteImageError)
EMA_STD = 0.05
# Guidance hides what a model has not learnt: what is reported first is without.
GUIDANCE_SCALES = (1.0, 2.0)
JUDGE_STEPS = 1500
MAGNITUDES = r"magnitude/(activations|weights)/transformer_blocks\.\d+"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("ablation"), help="folder for everything but the report")
    add("--report", type=Path, help="write the tables of all records here, and the figures beside them")
    add("--records", type=Path, help="with --report: write all records here, a line for each run")
    add("--only", default="", help="regular expression: arms to run, by a part of their names, as in E_scale")
    add("--max_hours", type=float, default=math.inf, help="begin no run after these; 0 trains nothing")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, data and noise; the first one for rates")
    add("--learning_rates", type=float, nargs="+", default=[5e-3, 2e-2, 1e-1, 5e-1], help="tried by C, D and E")
    add("--plain_learning_rates", type=float, nargs="+", default=[5e-4, 2e-3, 1e-2, 5e-2], help="tried by A and B")
    add("--max_train_steps", type=int, default=3000, help="updates of each run")
    add("--train_batch_size", type=int, default=64, help="samples of an update")
    add("--num_layers", type=int, default=6, help="blocks of the model")
    add("--num_attention_heads", type=int, default=3, help="attention heads")
    add("--attention_head_dim", type=int, default=32, help="channels of a head; width is their product")
    add("--num_validation_images", type=int, default=256, help="held out of training, others for each seed")
    add("--num_samples", type=int, default=2000, help="samples of each run, of each guidance scale")
    add("--num_inference_steps", type=int, default=25, help="sampling steps, of DPM-Solver")
    return parser.parse_args(argv)


def main(args):
    disable_progress_bar()
    facts = prepare(args)
    deadline = time.monotonic() + 3600 * args.max_hours
    while runs := [run for run in plan(args, facts) if not record_file(args, run).is_file()]:
        if time.monotonic() >= deadline:
            print(f"--max_hours {args.max_hours:g}: stopped, {len(runs)} runs can be done now, more may follow")
            break
        for run in runs:
            with lock(args, run.name, blocking=False) as is_mine:
                # Another process may have finished it between the look at its record and the lock.
                if is_mine and not record_file(args, run).is_file():
                    do(args, run, facts)
                    break
        else:
            # Others are at work on all of them, and what follows depends on the results.
            time.sleep(5)
    if args.report is not None:
        report(args, facts)


# The plan


def plan(args, facts):
    """Runs that can be done now, finished ones too: an arm's other seeds need its sweep."""
    for arm in ARMS:
        if re.search(args.only, arm.name):
            yield from (Run(arm, rate, args.seeds[0]) for rate in rates_of(args, arm))
            rate = best_rate(args, arm, facts)
            if rate is not None:
                yield from (Run(arm, rate, seed) for seed in args.seeds[1:])


def rates_of(args, arm):
    rates = args.plain_learning_rates if arm.configuration in "AB" else args.learning_rates
    # The paper's rate of A, which is said to fail for E.
    return sorted({ablation_report.PROBE_RATE, *rates}) if arm in (BASELINE, ROTATION) else rates


def sweep_of(args, arm, facts):
    """Rates to records of the first seed, None where there is none yet; what else was once tried is among them."""
    sweep = {rate: None for rate in rates_of(args, arm)}
    for file in (args.output_dir / "records").glob(f"{arm.name}_lr*_seed{args.seeds[0]}.json"):
        rate = json.loads(file.read_text())["learning_rate"]
        sweep[rate] = read(args, Run(arm, rate, args.seeds[0]), facts)
    return sweep


def failed_seeds(args, arm, rate, facts):
    """Seeds whose run at this rate became not finite."""
    records = {seed: read(args, Run(arm, rate, seed), facts) for seed in args.seeds}
    return [seed for seed, record in records.items() if record is not None and "failure" in record]


def best_rate(args, arm, facts):
    """The rate of the lowest validation loss on the first seed, of those at which no seed has failed.

    None before all rates were tried, or if all have failed.
    """
    sweep = sweep_of(args, arm, facts)
    if None in sweep.values():
        return None
    sound = [rate for rate in sweep if not failed_seeds(args, arm, rate, facts)]
    return min(sound, key=lambda rate: sweep[rate]["validation"]["loss"], default=None)


def settings_of(args, arm, facts):
    return {
        **{name: getattr(args, name) for name in SETTINGS},
        "guidance_scales": list(GUIDANCE_SCALES),
        "judge": facts["sha256"],
        "model": model_config(args, arm),
    }


def model_config(args, arm):
    return get_preset(
        "XS/2",
        arm.configuration,
        arm.modulation.split("+"),
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
    )


def record_file(args, run):
    return args.output_dir / "records" / f"{run.name}.json"


def read(args, run, facts):
    """The record of a run, None if there is none yet; refuses that of another experiment."""
    file = record_file(args, run)
    if not file.is_file():
        return None
    record, wanted = json.loads(file.read_text()), settings_of(args, run.arm, facts)
    found = record["settings"]
    differences = [f"{key} {found.get(key)} (now {value})" for key, value in wanted.items() if found.get(key) != value]
    if differences:
        raise ValueError(
            f"`--output_dir` must hold runs with the settings of this command, {file} has {', '.join(differences)}: "
            "choose another folder for other settings."
        )
    return record


@contextlib.contextmanager
def lock(args, name, blocking=True):
    """Whether this process has the name to itself, until the block ends or the process does, however it does."""
    folder = args.output_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


# Data and judge


def prepare(args):
    """Digits as the trainer reads them, and the judge with what is known of it; made once, by one process."""
    file = args.output_dir / "judge.json"
    with lock(args, "prepare"):
        if not file.is_file():
            scans, judged = load_digits(), demo.split_digits()["judge"].numbers
            scaled = [Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)) for scan in scans.images]
            others = np.setdiff1d(np.arange(len(scaled)), judged)
            demo.write_image_folder(
                args.output_dir / "digits",
                demo.LabelledImages([scaled[number] for number in others], scans.target[others], others),
            )
            dataset, id2label, _ = load_image_dataset(
                args.output_dir / "digits", cache_dir=str(args.output_dir / "cache")
            )
            settings = EncodingSettings(demo.SCAN_SIZE, num_channels=1)
            encode_dataset(dataset, args.output_dir / "latents", settings, vae=None, id2label=id2label)
            images = np.stack([np.asarray(scaled[number]) for number in judged])
            judge = fit_judge(torch.tensor(images)[:, None], torch.tensor(scans.target[judged]), JUDGE_STEPS)
            save_file(judge.state_dict(), args.output_dir / "judge.safetensors")
            sha256 = sha256_of_file(args.output_dir / "judge.safetensors")
            write_json(file, {"sha256": sha256, **facts_of_judge(judge, *read_digits(args))})
    return json.loads(file.read_text())


def read_digits(args):
    """All digits that the judge has not seen: uint8, (N, 1, 8, 8), and their labels, in the order of training data."""
    latents = LatentDataset(args.output_dir / "latents")
    samples = [latents.read(index) for index in range(len(latents))]
    images = torch.stack([sample["mean"] for sample in samples])
    return ((images + 1) * 127.5).round().byte(), torch.tensor([sample["label"] for sample in samples])


# One run


def do(args, run, facts):
    """Train and measure one run, from its last checkpoint if it was broken off, and leave its record."""
    print(f"--- {datetime.datetime.now():%m-%d %H:%M} {run.name}", flush=True)
    folder = args.output_dir / "runs" / run.name
    record = {
        "settings": settings_of(args, run.arm, facts),
        "arm": run.arm.name,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        **facts_of_run(),
    }
    start = time.process_time()
    try:
        record |= train(args, run, folder)
        record |= measure(args, run, folder, load_judge(args.output_dir))
    except FAILURES as error:
        record["failure"] = str(error)
    record["cpu_seconds"] = time.process_time() - start
    write_json(record_file(args, run), record)
    # Weights and averages stay, for other measures; what training would need to go on does not.
    for checkpoint in find_checkpoints(folder):
        shutil.rmtree(checkpoint)


def train(args, run, folder):
    """The trainer's run, and what it has recorded."""
    model_file = args.output_dir / "models" / f"{run.arm.name}.json"
    write_json(model_file, model_config(args, run.arm))
    options = {
        "--latents_dir": args.output_dir / "latents",
        "--model_config_name_or_path": model_file,
        "--output_dir": folder,
        "--resume_from_checkpoint": "latest",
        "--seed": run.seed,
        "--learning_rate": run.learning_rate,
        "--max_train_steps": args.max_train_steps,
        "--total_batch_size": args.train_batch_size,
        "--ema_stds": EMA_STD,
        "--num_validation_images": args.num_validation_images,
        "--validation_steps": math.ceil(args.max_train_steps / 4),
        "--validation_inference_steps": 10,
        "--record_magnitudes_steps": args.max_train_steps,
        "--checkpointing_steps": math.ceil(args.max_train_steps / 4),
        "--checkpoints_total_limit": 1,
        "--mixed_precision": "no",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = resolve_checkpoint("latest", folder)
    num_done = 0 if checkpoint is None else read_state(checkpoint)["step"]
    start = time.process_time()
    with (args.output_dir / "runs" / f"{run.name}.log").open("a") as log, contextlib.redirect_stderr(log):
        train_mpdit.main(train_mpdit.parse_args([*map(str, sum(options.items(), ()))]))
    seconds = time.process_time() - start
    if not (folder / "model_index.json").is_file():
        raise SystemExit(f"stopped by a signal in {run.name}; the same command goes on")
    log = read_log(folder)
    validations = [entry for entry in log if "validation/loss" in entry]
    speeds = [entry["train/images_per_second"] for entry in log if "train/images_per_second" in entry]
    magnitudes = load_history(folder / "logs" / "magnitudes.json")
    return {
        "validation": {
            name.removeprefix("validation/"): value
            for name, value in validations[-1].items()
            if name.startswith("validation/")
        },
        "curve": {entry["step"]: entry["validation/loss"] for entry in validations},
        "update_ms": 1000 * args.train_batch_size / float(np.median(speeds)),
        # Of this process alone, in which other work on the machine does not count; logging and validation do.
        "update_cpu_ms": 1000 * seconds / (args.max_train_steps - num_done)
        if num_done < args.max_train_steps
        else None,
        "magnitudes": [
            {name: value for name, value in entry.items() if name == "step" or re.fullmatch(MAGNITUDES, name)}
            for entry in (magnitudes[0], magnitudes[-1])
        ],
    }


@torch.no_grad()
def measure(args, run, folder, judge):
    """What the judge says of samples, and how near they are to training images."""
    images, labels = read_digits(args)
    pipeline = MPDiTPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    # As many of each digit as there are in the data.
    places = (torch.arange(args.num_samples) + 0.5) * (len(labels) / args.num_samples)
    wanted = labels.sort().values[places.long()]
    real = judge(images)[0]
    held_in, held_out = split_validation(len(images), args.num_validation_images, run.seed)
    pixels = images.flatten(1).float()
    usual = torch.cdist(pixels[held_out], pixels[held_in]).amin(1).mean()
    result = {"num_parameters": pipeline.transformer.num_parameters(), "samples": {}}
    for scale in GUIDANCE_SCALES:
        samples = torch.cat(
            [
                generate_images(
                    pipeline,
                    indices,
                    seed=run.seed,
                    class_ids=wanted.tolist(),
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=scale,
                )
                for indices in map(torch.Tensor.tolist, torch.arange(args.num_samples).split(500))
            ]
        )
        features, logits = judge(samples)
        nearest = torch.cdist(samples.flatten(1).float(), pixels[held_in]).amin(1).mean()
        result["samples"][f"{scale:g}"] = {
            "frechet": distance(features, real),
            "recognised": (logits.argmax(1) == wanted).double().mean().item(),
            "nearest_training_ratio": (nearest / usual).item(),
        }
    return result


# The report


def report(args, facts):
    """What the records say, of all arms."""
    sweeps, results = {}, {}
    for arm in ARMS:
        sweeps[arm.name] = {
            rate: record and {**record, "failed_seeds": failed_seeds(args, arm, rate, facts)}
            for rate, record in sweep_of(args, arm, facts).items()
        }
        rate = best_rate(args, arm, facts)
        if rate is not None:
            records = [read(args, Run(arm, rate, seed), facts) for seed in args.seeds]
            results[arm.name] = [record for record in records if record is not None and "failure" not in record]
    ablation_report.write_report(
        args.report,
        sweeps=sweeps,
        results=results,
        facts=facts,
        settings={name: getattr(args, name) for name in SETTINGS},
        num_planned=sum(len(sweep) + len(args.seeds) - 1 for sweep in sweeps.values()),
    )
    if args.records is not None:
        files = sorted((args.output_dir / "records").glob("*.json"))
        with whole_file(args.records) as unfinished:
            unfinished.write_text("".join(json.dumps(read_json(file)) + "\n" for file in files))


if __name__ == "__main__":
    main(parse_args())
