"""Small real inputs of all scripts, made once, and ways to damage them."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from PIL import Image

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel


SIZE = 8
MODEL = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 4}
FEATURES = """
import torch

def means(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255
"""


def make_inputs(folder: Path) -> Path:
    """Images in two classes, a VAE, models and configs, a checkpoint of the original DiT; what is no image beside."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    )
    vae.save_pretrained(folder / "vae")
    (folder / "model.json").write_text(json.dumps(MODEL))
    transformer = MPDiTTransformer2DModel(**MODEL, in_channels=3, out_channels=6, sample_size=SIZE, num_classes=2)
    names = {0: "cat", 1: "dog"}
    MPDiTPipeline(transformer, DDPMScheduler(), id2label=names).save_pretrained(folder / "pipeline")
    sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8}
    dit = DiTTransformer2DModel(**sizes, sample_size=4, num_embeds_ada_norm=3)
    DiTPipeline(dit, vae, DDIMScheduler()).save_pretrained(folder / "dit")
    torch.save(original_weights(8, 3), folder / "dit.pt")
    (folder / "names.json").write_text(json.dumps({0: "cat", 1: "dog", 2: "cow"}))
    (folder / "fuzz_features.py").write_text(FEATURES)
    (folder / "file.txt").write_text("no image")
    (folder / "empty").mkdir()
    return folder


def original_weights(dim: int, num_classes: int) -> dict[str, torch.Tensor]:
    """A file of DiT's original release with one block, 2x2 patches of 4 channels and 2x2 positions."""
    sizes = {
        **{"t_embedder.mlp.0": (dim, 256), "t_embedder.mlp.2": (dim, dim), "final_layer.linear": (4 * 8, dim)},
        **{"final_layer.adaLN_modulation.1": (2 * dim, dim), "blocks.0.attn.qkv": (3 * dim, dim)},
        **{"blocks.0.attn.proj": (dim, dim), "blocks.0.mlp.fc1": (4 * dim, dim)},
        **{"blocks.0.mlp.fc2": (dim, 4 * dim), "blocks.0.adaLN_modulation.1": (6 * dim, dim)},
    }
    weights = {
        "pos_embed": get_2d_sincos_pos_embed(dim, 2, base_size=2, output_type="pt")[None].float(),
        "x_embedder.proj.weight": 0.3 * torch.randn(dim, 4, 2, 2),
        "x_embedder.proj.bias": 0.3 * torch.randn(dim),
        "y_embedder.embedding_table.weight": 0.3 * torch.randn(num_classes + 1, dim),
    }
    for name, shape in sizes.items():
        weights |= {f"{name}.weight": 0.3 * torch.randn(shape), f"{name}.bias": 0.3 * torch.randn(shape[0])}
    return weights


def damage(source: Path, target: Path, rng: random.Random) -> tuple[Path, str]:
    """A copy in which one file is damaged; where, and what was done to it."""
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.suffix in (".json", ".safetensors", ".jsonl", ".png"))
    path = rng.choice([path for path in files if ".lock" not in path.name])
    edits = ["edited"] * 3 if path.suffix == ".json" else []
    how = rng.choice(["cut", "emptied", "garbage", "removed", "a folder", *edits])
    content = path.read_bytes()
    if how == "edited":
        return path, f"{path.name} edited: {_edit(path, rng)}"
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "removed":
        path.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "garbage": b"\xff\x00{" * 9}[how])
    return path, f"{path.name} {how}"


def _edit(path: Path, rng: random.Random) -> str:
    """Give one key of a JSON object a value of another kind, or take it away."""
    content = json.loads(path.read_text())
    key = rng.choice(sorted(content))
    if rng.random() < 0.3:
        del content[key]
        said = f"without {key}"
    else:
        content[key] = rng.choice([None, "x", -1, 0, [], {}, [1], True, 1.5, float("nan")])
        said = f"{key} = {content[key]!r}"
    path.write_text(json.dumps(content))
    return said
