"""The part of the run that trains on digits: S/2 learns real ones for two minutes, and a judge reads what it draws."""

import functools
import json
import tempfile
import time
from pathlib import Path

import demo
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from training_parts import NUM_FIRST, run_trainer, timed

from diffusers_mp import MPDiTPipeline
from diffusers_mp.sheets import draw_sheet


def digits(run) -> None:
    """S/2 learns digits of 32x32 pixels for two minutes: its loss, a sheet of samples, what a judge reads in them."""
    splits = demo.split_digits()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo.write_image_folder(folder / "images", splits["train"])
        options = {
            "--train_data_dir": folder / "images",
            "--vae": "none",
            "--image_channels": 1,
            "--resolution": demo.IMAGE_SIZE,
            "--latents_dir": folder / "pixels",
            "--validation_inference_steps": 10,
        }
        batch_size = 16 if run.tiny else 256
        train = functools.partial(run_trainer, run, folder, options, batch_size)
        update, _ = train(NUM_FIRST + (3 if run.tiny else 20), "rate", timed)
        # What comes after it takes some of what is left.
        seconds = 0.1 if run.tiny else min(120.0, run.seconds_left() - 30)
        num_steps = max(NUM_FIRST + 3, int(seconds / update))
        start = time.perf_counter()
        update, _ = train(num_steps, "model", timed)
        seconds = time.perf_counter() - start
        entries = [json.loads(line) for line in (folder / "model/logs/metrics.jsonl").read_text().splitlines()]
        losses = {
            key: [entry[f"{key}/loss"] for entry in entries if f"{key}/loss" in entry]
            for key in ("train", "validation")
        }
        demo.plot_losses(folder / "model/logs/metrics.jsonl", run.plot("gpu_digits_loss.png", "losses over updates"))
        images, labels, sampled = sample_digits(run, folder / "model")
    table = f"S/2 on digits: {demo.IMAGE_SIZE}x{demo.IMAGE_SIZE} pixels, {batch_size} images"
    judge, held_out = demo.fit_judge(splits["judge"]), splits["held_out"]
    for what, value in {
        "updates": float(num_steps),
        "seconds, with start and end": seconds,
        "images a second": batch_size / update,
        "loss of the first ten updates": losses["train"][0],
        "loss of the last ten": losses["train"][-1],
        "loss of held-out images, averaged weights": losses["validation"][-1],
        "samples a second, 25 steps, guidance 2": len(images) / sampled,
        "samples read as the digit asked for": demo.recognised(judge, images, labels),
        "real digits read as what they are": demo.recognised(judge, held_out.images, held_out.labels),
        "distance within a class, of real digits 1": demo.within_class_ratio(images, labels, held_out),
        "distance to the nearest training image, of real digits 1": demo.nearest_training_ratio(
            images, labels, held_out, splits["train"]
        ),
    }.items():
        run.row(table, what, value=value)


def sample_digits(run, model: Path) -> tuple[list[Image.Image], np.ndarray, float]:
    """Ten images of each digit, and their sheet; images, labels and seconds."""
    pipe = MPDiTPipeline.from_pretrained(model).to(run.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    num_each, num_steps = (2, 2) if run.tiny else (10, 25)
    start = time.perf_counter()
    images = pipe(
        class_labels=demo.CLASS_NAMES,
        num_images_per_class=num_each,
        num_inference_steps=num_steps,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    seconds = time.perf_counter() - start
    images = [image.convert("L") for image in images]
    sheet = draw_sheet(images, num_each, row_names=demo.CLASS_NAMES, title="S/2 on digits, guidance 2")
    sheet.save(run.plot("gpu_digits.png", "samples, one digit a row"))
    return images, np.repeat(range(len(demo.CLASS_NAMES)), num_each), seconds
