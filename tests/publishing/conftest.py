import json
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from helpers import random_image, tiny_model, tiny_vae
from hub_client import DIT_OPTIONS, INPUTS, RECORD, make_pipeline
from PIL import PngImagePlugin

from diffusers_mp import save_rotation_adapter, swap_adaln_for_rotation
from diffusers_mp.publishing.model_card import write_model_card
from diffusers_mp.publishing.rotation_card import write_rotation_card


# What a run's folder also holds, and what might stray into it.
PRIVATE = (
    "checkpoint-10/optimizer.bin",
    "checkpoint-10/random_states_0.pkl",
    "checkpoint-10/transformer/diffusion_pytorch_model.safetensors",
    "checkpoint-10/transformer/config.json",
    "latents/shard-00000.safetensors",
    "logs/tensorboard/hparams.yml",
    "transformer/optimizer.bin",
    "transformer/training_arguments.json",
    "transformer/deeper/config.json",
    "transformer/notes.safetensors",
    "transformer_ema_0.1/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.ckpt",
    "scheduler/config.json",
    "pipeline.pkl",
    ".env",
)


def write_log(folder, num_steps=100):
    (folder / "logs").mkdir(exist_ok=True)
    with (folder / "logs" / "metrics.jsonl").open("w") as file:
        for step in range(5, num_steps + 1, 5):
            entry = {"step": step, "train/loss": 10 / step, "train/images_per_second": 40.0 if step <= 50 else 80.0}
            file.write(json.dumps(entry) + "\n")
            if step % 50 == 0:
                file.write(
                    json.dumps({"step": step, "validation/loss": 1 / step, "validation/mse": 0.5 / step}) + "\n"
                )
        file.write('{"step": 105, "train/lo')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as the trainer leaves it, with its card; what the pipeline generates; and its parameter count."""
    base = tmp_path_factory.mktemp("made")
    tiny_vae().save_pretrained(base / "home of the author" / "vae")
    vae, folder = AutoencoderKL.from_pretrained(base / "home of the author" / "vae"), base / "run"
    pipe = make_pipeline(folder, vae=vae)
    tiny_model(num_classes=3, seed=7).save_pretrained(folder / "transformer_ema_0.1")
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    write_log(folder)
    (folder / "samples").mkdir()
    rng = np.random.default_rng(0)
    for step in (999, 1000):
        notes = PngImagePlugin.PngInfo()
        notes.add_text("author", "private")
        image = random_image(rng)
        image.save(folder / "samples" / f"step-{step:d}.png", pnginfo=notes)
    latents = {"resolution": 32, "num_samples": 1234, "vae": {"id": str(base / "home of the author" / "vae")}}
    (folder / "latents" / "index.json").write_text(json.dumps(latents))
    arguments = {
        "train_data_dir": str(base / "home of the author" / "photos"),
        "dataset_name": None,
        "vae": str(base / "home of the author" / "vae"),
        "output_dir": str(folder),
        "logging_dir": "logs",
        "preset": "XS/2",
        "learning_rate": 0.01,
        "ema_stds": [0.05, 0.1],
        "validation_inference_steps": 50,
        "validation_guidance_scale": None,
    }
    (folder / "training_arguments.json").write_text(json.dumps(arguments))
    write_model_card(folder, "user/name", license="mit", num_images_seen=1600, hardware="2 CPU cores")
    images = pipe(**INPUTS, generator=torch.Generator().manual_seed(0)).images
    return Namespace(folder=folder, base=base, images=images, pipe=pipe, image=image)


@pytest.fixture
def run(made, tmp_path):
    """The folder of `made`, to be changed; its files are links, so replace them rather than write into them."""
    for path in made.folder.rglob("*"):
        if path.is_file():
            link = tmp_path / "run" / path.relative_to(made.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """A stock DiTPipeline, the same swapped with its card, and an adapter with its card; its output."""
    base = tmp_path_factory.mktemp("home of the author")
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(**DIT_OPTIONS, out_channels=8, num_embeds_ada_norm=3).eval()
    DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(base / "stock")
    pipe = DiTPipeline.from_pretrained(base / "stock")
    swap_adaln_for_rotation(pipe.transformer)
    for name, parameter in pipe.transformer.named_parameters():
        if ".rotation." in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    pipe.register_modules(transformer=pipe.transformer)
    pipe.save_pretrained(base / "run")
    write_rotation_card(base / "run", "user/name", base_model=str(base / "stock"), record=RECORD, license="mit")
    save_rotation_adapter(pipe.transformer, base / "adapter", base_model_name_or_path=str(base / "stock"))
    write_rotation_card(base / "adapter", "user/adapter", base_model="owner/dit", record=RECORD)
    for name in ("evaluation.json", "logs/metrics.jsonl", "latents/shard-00000.safetensors", "optimizer.bin"):
        for folder in ("run", "adapter"):
            (base / folder / name).parent.mkdir(exist_ok=True)
            (base / folder / name).write_text("private")
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([7]), torch.tensor([1])
    return Namespace(base=base, output=pipe.transformer(*inputs).sample.tolist())
