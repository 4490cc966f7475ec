"""Small real evaluations on the CPU: pipelines, snapshots of a run, and the script in this process."""

import json

import numpy as np
import torch
from diffusers import DDPMScheduler
from helpers import random_image, tiny_model, tiny_vae

from diffusers_mp import MPDiTPipeline, PowerFunctionEMA, normalize_weights_
from diffusers_mp.averages.snapshots import save_snapshots


NUM_PHOTOS = 24


def save_photos(folder):
    rng = np.random.default_rng(0)
    for k in range(NUM_PHOTOS):
        random_image(rng, 40, 36).save(folder / f"{k:02d}.png")


def make_pipeline(vae=None, num_classes=3, names=("cat", "dog", "owl"), **config):
    config = {"num_classes": num_classes, "class_dropout_prob": 0.1 if num_classes else 0.0, **config}
    model = tiny_model(**config).eval()
    statistics = [0.0] * model.config.in_channels, [1.0] * model.config.in_channels
    scheduler = DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    return MPDiTPipeline(model, scheduler, vae, None if num_classes is None else dict(enumerate(names)), *statistics)


def snapshots_of_a_run(folder, last_step):
    """Snapshots of a run, step by step: the next call of the generator trains on."""
    pipe = make_pipeline(tiny_vae())
    ema = PowerFunctionEMA(pipe.transformer, (0.05, 0.10))
    for step in range(1, last_step + 1):
        with torch.no_grad():
            for parameter in pipe.transformer.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        normalize_weights_(pipe.transformer)
        ema.update(step)
        if step % 2 == 0:
            save_snapshots(ema, folder / "ema_snapshots", pipe)
            yield step


def evaluate(arguments, *more):
    import evaluate as script

    args = script.parse_args([str(argument) for argument in (*arguments, *more)])
    script.main(args)
    return json.loads((args.output_dir / "results.json").read_text())
