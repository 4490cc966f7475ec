import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from evaluation_runs import make_pipeline, save_photos
from helpers import EXAMPLES, tiny_vae
from PIL import Image
from training_runs import MODEL, train


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two classes of 20 images 16x16, a VAE of factor 4, a model config."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 128, (16, 16, 3)) + (0 if name == "dark" else 127)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"{i:02d}.png")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    (folder / "model.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture(scope="session")
def _train(data, tmp_path_factory):
    """A run for many tests. To be read; what goes on with it takes a copy."""

    def run(*more):
        sys.path.insert(0, str(EXAMPLES))
        try:
            return train(data, tmp_path_factory.mktemp("run") / "run", *more)
        finally:
            sys.path.remove(str(EXAMPLES))

    return run


@pytest.fixture(scope="session")
def plain(_train):
    """The run that the arguments alone describe."""
    return _train()


@pytest.fixture(scope="session")
def coarse(_train):
    """One in which Adam divides by more than rounding makes: sums in another order give nearly the same weights."""
    return _train("--adam_epsilon", "1e-2")


@pytest.fixture
def plain_copy(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "run")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Real images without classes, to compare with."""
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A pipeline of the classes cat, dog and owl, to be evaluated."""
    make_pipeline(tiny_vae()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def arguments(photos, dinov2, folder, tmp_path):
    """A call of the script that evaluates, to which options are appended; the last of each counts."""
    return [
        *("--pretrained_model_name_or_path", folder),
        *("--reference_dir", photos),
        *("--extractors", dinov2),
        *("--cache_dir", tmp_path / "cache"),
        *("--num_samples", 12),
        *("--batch_size", 5),
        *("--num_inference_steps", 3),
        *("--output_dir", tmp_path / "evaluation"),
    ]
