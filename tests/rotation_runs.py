"""Small real runs of the script that swaps and fine-tunes, and the base that they start from."""

import json

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from helpers import reset_accelerate, tiny_vae
from PIL import Image
from sklearn.datasets import load_digits


WIDTH = 16


def make_base(folder):
    """A stock pipeline whose shifts matter, and 60 digits, in ten classes."""
    digits = load_digits()
    for digit in range(10):
        (folder / "images" / str(digit)).mkdir(parents=True)
        for number in np.flatnonzero(digits.target == digit)[:6]:
            scan = Image.fromarray((digits.images[number] * (255 / 16)).round().astype(np.uint8))
            scan.save(folder / "images" / str(digit) / f"{number:04d}.png")
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=1,
        out_channels=2,
        sample_size=8,
        num_embeds_ada_norm=12,
    )
    with torch.no_grad():
        for module in [block.norm1.linear for block in transformer.transformer_blocks] + [transformer.proj_out_1]:
            module.bias.normal_(0, 0.5)
    vae = tiny_vae(in_channels=1, latent_channels=1)
    vae.register_to_config(scaling_factor=2.0)
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "pipeline")
    return folder


def arguments(base, output_dir, *more):
    return [
        *("--pretrained_model_name_or_path", str(base / "pipeline")),
        *("--train_data_dir", str(base / "images")),
        *("--latents_dir", str(base / "latents")),
        *("--cache_dir", str(base / "cache")),
        *("--output_dir", str(output_dir)),
        *("--total_batch_size", "8"),
        *("--max_train_steps", "4"),
        *("--learning_rate", "3e-3"),
        *("--num_validation_images", "12"),
        *("--num_validation_levels", "4"),
        *("--logging_steps", "2"),
        *("--num_calibration_samples", "32"),
        *map(str, more),
    ]


def finetune(base, output_dir, *more):
    import finetune_rotation

    finetune_rotation.main(finetune_rotation.parse_args(arguments(base, output_dir, *more)))
    reset_accelerate()
    return json.loads((output_dir / "evaluation.json").read_text())
