"""Tiny pipelines of diffusers around swapped transformers, with embeddings given; also run in a fresh process."""

import diffusers
import torch
from helpers import tiny_vae
from tiny_inputs_of_transformers import randn
from tiny_transformers import CASES, fill_


FLOW = diffusers.FlowMatchEulerDiscreteScheduler
TEXT = {"prompt_embeds": randn(1, 3, 12)}
NEGATIVE = {"negative_prompt_embeds": randn(1, 3, 12, seed=1)}
POOLED = {"pooled_prompt_embeds": randn(1, 6, seed=2)}
NEGATIVE_POOLED = {"negative_pooled_prompt_embeds": randn(1, 6, seed=3)}
MASK = torch.ones(1, 3, dtype=torch.long)
MASKS = {"prompt_attention_mask": MASK, "negative_prompt_attention_mask": MASK}

# Case of CASES → pipeline, its scheduler, arguments of its call, changes of the transformer's config.
PIPELINES = {
    "DiT": (
        diffusers.DiTPipeline,
        diffusers.DDIMScheduler,
        # Its label for no class is 1000.
        {"class_labels": [3]},
        {"num_embeds_ada_norm": 1000, "out_channels": 4},
    ),
    "SD3": (
        diffusers.StableDiffusion3Pipeline,
        FLOW,
        {**TEXT, **NEGATIVE, **POOLED, **NEGATIVE_POOLED, "height": 32, "width": 32},
        {},
    ),
    "SD3.5": (
        diffusers.StableDiffusion3Pipeline,
        FLOW,
        {**TEXT, **NEGATIVE, **POOLED, **NEGATIVE_POOLED, "height": 32, "width": 32},
        {},
    ),
    "Flux guided": (diffusers.FluxPipeline, FLOW, {**TEXT, **POOLED, "height": 32, "width": 32}, {}),
    "AuraFlow": (diffusers.AuraFlowPipeline, FLOW, {**TEXT, **NEGATIVE, **MASKS, "height": 32, "width": 32}, {}),
    "CogVideoX": (
        diffusers.CogVideoXPipeline,
        diffusers.CogVideoXDDIMScheduler,
        {**TEXT, **NEGATIVE, "height": 32, "width": 32, "num_frames": 5},
        {},
    ),
    "HunyuanDiT": (
        diffusers.HunyuanDiTPipeline,
        diffusers.DDPMScheduler,
        {
            **TEXT,
            **NEGATIVE,
            **MASKS,
            "prompt_embeds_2": randn(1, 3, 16, seed=4),
            "negative_prompt_embeds_2": randn(1, 3, 16, seed=5),
            "prompt_attention_mask_2": MASK,
            "negative_prompt_attention_mask_2": MASK,
            "height": 32,
            "width": 32,
            "use_resolution_binning": False,
        },
        {},
    ),
    "HunyuanVideo": (
        diffusers.HunyuanVideoPipeline,
        FLOW,
        {**TEXT, **POOLED, "prompt_attention_mask": MASK, "height": 32, "width": 32, "num_frames": 5},
        {},
    ),
    "QwenImage": (
        diffusers.QwenImagePipeline,
        FLOW,
        {
            **TEXT,
            **NEGATIVE,
            "prompt_embeds_mask": MASK,
            "negative_prompt_embeds_mask": MASK,
            "height": 32,
            "width": 32,
        },
        {},
    ),
}


def make_pipeline(case, swap):
    """A pipeline of a case without text encoders, its transformer changed by `swap`."""
    pipeline_class, scheduler_class, _, changes = PIPELINES[case]
    class_name, config, _ = CASES[case]
    transformer = fill_(getattr(diffusers, class_name)(**{**config, **changes})).eval()
    swap(transformer)
    components = {**absent(case), "transformer": transformer, "scheduler": scheduler_class()}
    if case == "DiT":
        components["vae"] = tiny_vae()
    pipeline = pipeline_class(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def absent(case):
    """Arguments that say which components are left out."""
    components, _ = PIPELINES[case][0]._get_signature_keys(PIPELINES[case][0])
    missing = dict.fromkeys(set(components) - {"transformer", "scheduler", *(["vae"] if case == "DiT" else [])})
    return {**missing, "requires_safety_checker": False} if case == "HunyuanDiT" else missing


def load(case, folder):
    """A saved pipeline."""
    pipeline = PIPELINES[case][0].from_pretrained(folder, **absent(case))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(case, pipeline):
    """What two steps give, latents where there is no VAE."""
    arguments = {**PIPELINES[case][2], "output_type": "np" if case == "DiT" else "latent"}
    generator = torch.Generator().manual_seed(0)
    output = pipeline(**arguments, num_inference_steps=2, generator=generator, return_dict=False)[0]
    return torch.as_tensor(output)
