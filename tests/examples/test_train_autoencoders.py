"""Each class of autoencoder through the trainer: encoded, cached, trained on, sampled, saved and reloaded."""

import json
import shutil

import pytest
import torch
from helpers import pixels_of
from tiny_autoencoders import CASES, STANDARDISED, images_of_diffusers, latents_of_diffusers, make
from training_runs import train

from diffusers_mp import MPDiTPipeline
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.evaluation.model import EvaluatedModel
from diffusers_mp.publishing.hub import files_to_publish


pytestmark = pytest.mark.usefixtures("examples_run_here")
FAST = ("flux2", "rae_mae")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_from_images_to_a_reloaded_pipeline(data, tmp_path, case):
    images = pixels_of(load_image_dataset(data / "images", cache_dir=str(tmp_path / "cache"))[0])
    vae = make(case, images)
    vae.save_pretrained(tmp_path / "vae")
    model = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 1}
    (tmp_path / "model.json").write_text(json.dumps(model))
    more = ("--vae", tmp_path / "vae", "--model_config_name_or_path", tmp_path / "model.json")
    run = train(data, tmp_path / "run", *map(str, more), "--validation_steps", "6")

    latents, (mean, std) = LatentDataset(run / "latents"), latents_of_diffusers(case, vae, images)
    torch.testing.assert_close(latents[5]["mean"], mean[5], rtol=1e-5, atol=1e-6)
    assert ("std" in latents[5]) == (std is not None)
    assert (latents.latents_std == [1.0] * mean.shape[1]) == (case in STANDARDISED)

    # What is published of it is a pipeline, whose images are those of diffusers' own calls.
    for name in files_to_publish(run):
        (tmp_path / "published" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, tmp_path / "published" / name)
    pipe = MPDiTPipeline.from_pretrained(tmp_path / "published")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.vae) is type(vae)

    def sample(output_type, generator):
        return pipe(["dark", 1], num_inference_steps=2, generator=generator, output_type=output_type).images

    decoded, generator = sample("pt", torch.Generator().manual_seed(3)), torch.Generator().manual_seed(3)
    latents_mean, latents_std = (
        torch.tensor(pipe.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std")
    )
    drawn = sample("latent", generator) * latents_std + latents_mean
    assert pipe.config.latents_mean == latents.latents_mean
    # A decoder that draws goes on from where the sampler has left the generator.
    expected = images_of_diffusers(case, vae, drawn, generator)
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert decoded.shape == (2, 3, 16, 16)
    assert EvaluatedModel(run).image_shape() == (16, 3)

    channels, factor = CASES[case][2]
    card = " ".join((run / "README.md").read_text().split())
    assert f"`{CASES[case][0]}` of the author's own, {channels} latent channels, factor {factor}, " in card
    assert ("standardised by the statistics that the VAE brings" in card) == (case in STANDARDISED)
