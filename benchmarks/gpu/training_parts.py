"""Parts of the run that need the tests or the trainer: right values, the loader's share of an update."""

import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import train_mpdit
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
OUTCOME = re.compile(r"^(tests/\S+?)::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "patch_size": 2}
# Updates that no time is taken of: they load kernels.
NUM_FIRST = 10


def correctness(run) -> None:
    """The tests that need a GPU, in a separate process; names of their files end in gpu."""
    files = sorted((ROOT / "tests").rglob("test_*gpu.py"), key=lambda path: path.name)
    # Versions are those of this machine: what they warn of fails no test.
    options = [
        "-m",
        "gpu",
        "-v",
        "--tb=short",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        "default",
    ]
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "pytest", *options, *files]
        try:
            subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=run.seconds_left() / 3)
        except subprocess.TimeoutExpired:
            run.leave_out("the rest of the tests, which may take a third of the time")
        output.seek(0)
        printed = output.read()
    outcomes = OUTCOME.findall(printed)
    for _, test, outcome in outcomes:
        run.row("Tests that need a GPU", test, outcome=outcome.lower())
    if not outcomes or {"FAILED", "ERROR"} & {outcome for *_, outcome in outcomes}:
        run.failure("tests", printed)


def loader(run) -> None:
    """Time of an update of the trainer, and of one whose batch is there already: the difference is the loader's."""
    batch_size, resolution, num_steps = (4, 32, NUM_FIRST + 3) if run.tiny else (256, 128, NUM_FIRST + 50)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_noise(folder, resolution)
        options = {
            "--train_data_dir": folder / "images",
            "--vae": folder / "vae",
            "--resolution": resolution,
            "--latents_dir": folder / "latents",
            "--num_validation_images": 0,
            "--validation_steps": 0,
        }
        table = f"The loader: S/2, {(resolution // 16) ** 2} tokens, {batch_size} images, encoded"
        updates = []
        for what, follow in (("with the loader", timed), ("the same batch each time", repeated)):
            update, waiting = run_trainer(run, folder, options, batch_size, num_steps, follow.__name__, follow)
            run.row(table, what, ms_of_an_update=1000 * update, ms_of_waiting_for_a_batch=1000 * waiting)
            updates.append(update)
    run.row(table, "the loader's share of an update", share=1 - updates[1] / updates[0])


# The trainer


def run_trainer(
    run, folder: Path, options: dict, batch_size: int, num_steps: int, name: str, follow: Callable
) -> tuple[float, float]:
    """Run train_mpdit.py in this process, with what it does by default; seconds of an update, and of its waiting.

    Args:
        folder (Path): gets a folder for the run.
        options (dict): flags and values.
        batch_size, num_steps (int): images in an update, and updates.
        name (str): of the folder.
        follow (callable): makes other batches of the loader and a list, which gets the time before and after each.
    """
    options = {
        **options,
        "--preset": "S/2",
        "--total_batch_size": batch_size,
        "--train_batch_size": batch_size,
        "--max_train_steps": num_steps,
        "--checkpointing_steps": num_steps,
        "--mixed_precision": "bf16" if run.device == "cuda" else "no",
        "--output_dir": folder / name,
    }
    if "--validation_steps" not in options:
        options["--validation_steps"] = num_steps
    if run.tiny:
        (folder / "model.json").write_text(json.dumps(TINY))
        options["--model_config_name_or_path"] = folder / "model.json"
        del options["--preset"]
    times, training_batches = [], train_mpdit.training_batches
    train_mpdit.training_batches = lambda *given: follow(training_batches(*given), times)
    try:
        train_mpdit.main(train_mpdit.parse_args([str(word) for pair in options.items() for word in pair]))
    finally:
        train_mpdit.training_batches = training_batches
        # As in a new process.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    first, last = times[NUM_FIRST][0], times[-1][0]
    waiting = statistics.median(after - before for before, after in times[NUM_FIRST:])
    return (last - first) / (len(times) - 1 - NUM_FIRST), waiting


def timed(batches: Iterable[dict], times: list) -> Iterator[dict]:
    """The same batches; `times` gets when each was asked for, and when it came."""
    batches = iter(batches)
    while True:
        before = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        times.append((before, time.perf_counter()))
        yield batch


def repeated(batches: Iterable[dict], times: list) -> Iterator[dict]:
    """As many, the first each time."""
    first = next(iter(batches))
    return timed((dict(first) for _ in range(len(batches))), times)


def write_noise(folder: Path, resolution: int) -> None:
    """Random images in four classes, and a small autoencoder of factor 8."""
    generator = np.random.default_rng(0)
    for label, number in itertools.product(range(4), range(4 if resolution < 64 else 64)):
        path = folder / "images" / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (resolution, resolution, 3), np.uint8)).save(path)
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
