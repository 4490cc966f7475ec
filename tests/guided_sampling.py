"""Small guided pipelines, and sampling loops written out by hand to compare with."""

import torch
from diffusers import DDIMScheduler
from helpers import tiny_model

from diffusers_mp import MPDiTPipeline


LABELS = torch.tensor([2, 5])
NULL = torch.full_like(LABELS, 10)
NUM_STEPS = 5
DDPM = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def ddim():
    return DDIMScheduler(**DDPM)


def pipeline(transformer=None, scheduler=None, vae=None, **components):
    pipe = MPDiTPipeline(transformer or tiny_model().eval(), scheduler or ddim(), vae, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weak_model(**overrides):
    return tiny_model(seed=7, **{"num_layers": 1, **overrides}).eval()


def sample(pipe, class_labels=LABELS, **arguments):
    arguments = {"latents": LATENTS, "num_inference_steps": NUM_STEPS, "output_type": "latent", **arguments}
    return pipe(class_labels, generator=torch.Generator().manual_seed(0), **arguments).images


@torch.no_grad()
def predict(transformer, latents, timestep, labels):
    """Of this package's small models as they are: float32, one batch."""
    return transformer(latents, torch.as_tensor(timestep).expand(len(latents)), labels).sample


def by_hand(transformer, scheduler, guide):
    """A sampling loop that asks `guide(step, timestep, latents)` for the prediction."""
    scheduler.set_timesteps(NUM_STEPS)
    latents, generator = LATENTS, torch.Generator().manual_seed(0)
    for step, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(guide(step, timestep, latents), timestep, latents, generator=generator).prev_sample
    return latents


def count_rows(transformer):
    """Rows of each forward pass from here on."""
    rows = []
    transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows
