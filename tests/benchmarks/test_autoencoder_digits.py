"""Models on other autoencoders, in small."""

from types import SimpleNamespace

import pytest
import shared
from diffusers import AutoencoderRAE
from helpers import reset_accelerate
from shared import train_mpdit


@pytest.mark.usefixtures("few_digits")
@pytest.mark.slow  # three runs of the trainer; each class has its own
def test_a_row_and_a_sheet_for_each_autoencoder(tmp_path, monkeypatch, run_here):
    def train(command):
        train_mpdit.main(train_mpdit.parse_args(command[2:]))
        reset_accelerate()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(shared, "subprocess", SimpleNamespace(run=train))
    small = ("--vae_steps", "3", "--max_train_steps", "3", "--num_images_per_class", "2", "--num_inference_steps", "2")
    printed = run_here("quality/autoencoder_digits.py", "--output_dir", str(tmp_path), *small)
    for row in ("AutoencoderKL | 1 x 8 x 8", "AutoencoderDC | 8 x 4 x 4", "AutoencoderRAE | 64 x 4 x 4"):
        assert f"| {row} | " in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {f"samples_{name}.png" for name in ("kl", "dc", "rae")}
    rae = AutoencoderRAE.from_pretrained(tmp_path / "rae" / "vae")
    assert rae._latents_std.std() > 0  # of its encoder's tokens
    assert not any(parameter.requires_grad for parameter in rae.encoder.parameters())
