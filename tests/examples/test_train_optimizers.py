"""Runs with each optimiser and schedule: what they learn, that they resume to the bit, what is refused."""

import json
import math

import numpy as np
import pytest
from helpers import NOT_IN_DEV, reset_accelerate
from PIL import Image
from training_runs import assert_same_weights, metrics, raw_weights, stored, train

from diffusers_mp import get_preset


pytestmark = pytest.mark.usefixtures("examples_run_here")

MUON = ["--optimizer", "muon"]
EIGHT_BITS = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Images of one grey each, which are quickly learned, and models for them: magnitude preserving, and DiT's."""
    folder, rng = tmp_path_factory.mktemp("grey"), np.random.default_rng(0)
    for name, shade in (("dark", 40), ("light", 215)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.full((8, 8), shade + rng.integers(-20, 20), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i:02d}.png")
    size = {"num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 8}
    for configuration in "AE":
        config = get_preset("XS/2", configuration, ("scale", "shift", "gate"), **size)
        (folder / f"{configuration}.json").write_text(json.dumps(config))
    return folder


def learn(grey, output_dir, configuration, *more):
    return train(
        grey,
        output_dir,
        *("--vae", "none", "--image_channels", "1", "--resolution", "8", "--num_validation_images", "0"),
        *("--model_config_name_or_path", str(grey / f"{configuration}.json"), "--train_batch_size", "16"),
        *("--max_train_steps", "60", "--checkpointing_steps", "60", "--logging_steps", "1"),
        *("--lr_constant_steps", "60", "--lr_warmup_steps", "0", *more),
    )


@pytest.mark.parametrize(
    "configuration, more",
    [
        ("E", []),
        ("E", ["--optimizer", "adamw"]),
        ("E", MUON),
        ("A", ["--optimizer", "adamw", "--adam_weight_decay", "0.1", "--learning_rate", "3e-3"]),
        ("A", [*MUON, "--adam_weight_decay", "0.1", "--learning_rate", "3e-3"]),
        pytest.param("E", ["--use_8bit_adam"], marks=EIGHT_BITS),
        pytest.param("E", ["--use_8bit_adam", "--optimizer", "adamw"], marks=EIGHT_BITS),
    ],
    ids=lambda value: " ".join(value) or "adam",
)
def test_each_optimizer_learns(grey, tmp_path, configuration, more):
    if "--use_8bit_adam" in more:
        pytest.importorskip("bitsandbytes", reason=NOT_IN_DEV)
    losses = list(metrics(learn(grey, tmp_path / "run", configuration, *more), "train/loss").values())
    # Noise that is not predicted at all has mean square 1.
    assert sum(losses[:3]) / 3 > 0.9
    assert sum(losses[-10:]) / 10 < 0.5


@pytest.mark.parametrize("more", [MUON, pytest.param(["--use_8bit_adam"], marks=EIGHT_BITS)], ids=" ".join)
def test_a_run_resumes_to_the_bit(data, tmp_path, more):
    if "--use_8bit_adam" in more:
        pytest.importorskip("bitsandbytes", reason=NOT_IN_DEV)
    more = [*more, "--max_grad_norm", "0.5"]
    whole = train(data, tmp_path / "whole", *more)
    at_4 = ("--resume_from_checkpoint", str(whole / "checkpoint-4"), "--latents_dir", str(whole / "latents"))
    resumed = train(data, tmp_path / "resumed", *more, *at_4)
    assert_same_weights(raw_weights(whole / "checkpoint-6"), raw_weights(resumed / "checkpoint-6"))


def test_adamw_without_decay_is_adam(data, plain, tmp_path):
    run = train(data, tmp_path / "run", "--optimizer", "adamw")
    assert_same_weights(raw_weights(plain / "checkpoint-6"), raw_weights(run / "checkpoint-6"))


@pytest.mark.parametrize(
    "more, rate_of, other",
    [
        (
            ["--lr_scheduler", "cosine_with_restarts", "--lr_num_cycles", "2"],
            lambda u: 0.5 * (1 + math.cos(math.pi * (2 * u / 6 % 1))) if u < 6 else 0,
            ["--lr_num_cycles", "3"],
        ),
        (
            ["--lr_scheduler", "polynomial", "--lr_power", "2"],
            lambda u: (1 - 1e-5) * (1 - u / 6) ** 2 + 1e-5,
            ["--lr_power", "3"],
        ),
    ],
    ids=["cosine_with_restarts", "polynomial"],
)
def test_a_schedule_and_its_shape_belong_to_the_run(data, tmp_path, more, rate_of, other):
    run = train(data, tmp_path / "run", *more)
    for step in (2, 4, 6):
        groups = stored(run / f"checkpoint-{step}")["optimizer"]["param_groups"]
        rates = {group["name"]: group["lr"] for group in groups}
        assert rates["as_published"] == pytest.approx(1e-2 * rate_of(step)), step
    with pytest.raises(ValueError, match=f"{other[0][2:]} 2(.0)? .now 3"):
        train(data, run, *more, *other, "--resume_from_checkpoint", "latest")
    reset_accelerate()
    with pytest.raises(ValueError, match=r"optimizer adam \(now muon\)"):
        train(data, run, *more, *MUON, "--resume_from_checkpoint", "latest")
