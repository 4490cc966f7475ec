"""Each supported class on a tiny real instance, against what diffusers' own pipelines do with it; the refused ones."""

import importlib.util
import json
from importlib.metadata import version

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models import autoencoders as classes
from helpers import ROOT, encode, pixels_of, tiny_model, tiny_vae
from tiny_autoencoders import (
    CASES,
    STANDARDISED,
    images_of_diffusers,
    latents_of_diffusers,
    make,
    random_images,
    unscaled_by_diffusers,
)

from diffusers_mp import MPDiTPipeline, autoencoders
from diffusers_mp.data.encoding import load_vae
from diffusers_mp.training import TrainingSamples


POINTS = {"dc", "rae_dinov2", "rae_mae", "tiny", "vq", "vq_spatial"}


@pytest.fixture(scope="module", params=CASES)
def made(request):
    """A case, its autoencoder, images, and their latents as diffusers has them."""
    images = random_images()
    vae = make(request.param, images)
    return request.param, vae, images, latents_of_diffusers(request.param, vae, images)


def generator(seed):
    """Not PyTorch's own, which a decoder that is given none would draw from."""
    return torch.Generator().manual_seed(seed)


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_latents_are_those_of_diffusers(made):
    case, vae, images, (mean, std) = made
    latents = autoencoders.encode(vae, images)
    close(latents["mean"], mean)
    assert ("std" not in latents) == (std is None) == (case in POINTS)
    assert autoencoders.is_posterior(vae) == (case not in POINTS)
    if std is not None:
        close(latents["std"], std)


@torch.no_grad()
def test_images_are_those_of_diffusers(made):
    case, vae, images, (mean, _) = made
    decoded = autoencoders.decode(vae, mean, generator(1))
    close(decoded, images_of_diffusers(case, vae, mean, generator(1)))
    assert decoded.shape == images.shape
    assert decoded.min() < -0.01  # not an image in [0, 1]


def test_sizes_are_those_of_latents(made):
    case, vae, images, (mean, _) = made
    channels, factor = CASES[case][2]
    config = {**vae.config, "_class_name": type(vae).__name__}
    expected = (channels, factor, 3, 3, 16 if case.startswith("rae") else None)
    assert autoencoders.geometry(vae) == autoencoders.geometry(json.loads(json.dumps(config))) == expected
    assert mean.shape[1:] == (channels, 16 // factor, 16 // factor)


def test_standardised_latents_have_magnitude_1(made):
    case, vae, _, (mean, std) = made
    assert autoencoders.is_standardised(vae) == (case in STANDARDISED)
    if case in STANDARDISED:
        power = mean.square().mean() + (0 if std is None else std.square().mean())
        # 12 images, whose sample variance has 11 degrees of freedom; of FLUX.2's an epsilon of 0.01 takes a part.
        assert abs(power - (11 / 12 if case.startswith("rae") else 1)) < 0.03


@torch.no_grad()
def test_a_pipeline_without_statistics_takes_the_autoencoders(made):
    case, vae, _, (mean, _) = made
    model = tiny_model(in_channels=mean.shape[1], sample_size=mean.shape[-1], patch_size=1).eval()
    pipe = MPDiTPipeline(model, DDIMScheduler(clip_sample=False), vae)
    images = pipe.decode_latents(mean, generator(1))
    expected = unscaled_by_diffusers(case, vae, mean)
    close(images, images_of_diffusers(case, vae, expected, generator(1)))


def test_decoders_that_draw_follow_the_generator():
    vae = make("consistency", random_images())
    model = tiny_model(sample_size=8).eval()
    pipe = MPDiTPipeline(model, DDIMScheduler(clip_sample=False), vae)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    first, again, other = (pipe(3, generator=generator(seed), **options).images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_opacity_is_full_and_left_out():
    images = random_images(2)
    vae = make("qwen21", images, in_channels=4, out_channels=4)
    opaque = torch.cat([images, torch.ones(2, 1, 16, 16)], 1)
    with torch.no_grad():
        latents = autoencoders.encode(vae, images)["mean"]
        close(latents, vae.encode(opaque[:, :, None]).latent_dist.mean[:, :, 0])
        close(autoencoders.decode(vae, latents), vae.decode(latents[:, :, None]).sample[:, :3, 0])
    assert autoencoders.geometry(vae)[2:4] == (3, 3)


# Which classes there are


def test_every_autoencoder_of_diffusers_is_decided_on():
    names = {name for name, value in vars(classes).items() if isinstance(value, type) and hasattr(value, "encode")}
    decided = {*autoencoders.IMAGE_AUTOENCODERS, *autoencoders.REFUSED}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    if version("diffusers") != pinned["diffusers"]:
        pytest.skip(f"diffusers {version('diffusers')} has autoencoders that nobody decided on: {names - decided}")
    assert names == decided
    assert not autoencoders.IMAGE_AUTOENCODERS.keys() & autoencoders.REFUSED.keys()
    assert {name for name, *_ in CASES.values()} == autoencoders.IMAGE_AUTOENCODERS.keys()


@pytest.mark.parametrize(
    "name, reason",
    [("AutoencoderKLWan", "videos"), ("AutoencoderOobleck", "audio"), ("RFD4ProteinaAutoencoder", "proteins")],
)
def test_other_autoencoders_are_refused_with_the_reason(tmp_path, name, reason):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"`vae` must be an image autoencoder .*VQModel, got {name}: it .*{reason}"):
        load_vae(str(tmp_path))


def test_a_derived_class_is_its_base():
    class MyAutoencoder(AutoencoderKL):
        pass

    vae = MyAutoencoder()
    assert autoencoders.row_of(vae) is autoencoders.IMAGE_AUTOENCODERS["AutoencoderKL"]


def test_siglip2_is_refused_while_it_cannot_be_made(tmp_path):
    config = CASES["rae_mae"][1] | {"_class_name": "AutoencoderRAE", "encoder_type": "siglip2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    versions = f"diffusers {version('diffusers')} with transformers {version('transformers')}"
    with pytest.raises(ValueError, match=f"{versions} can make, with encoder 'mae' or 'dinov2', got 'siglip2'"):
        load_vae(str(tmp_path))


def test_tokens_that_are_no_image_are_refused(tmp_path):
    config = CASES["rae_mae"][1] | {"_class_name": "AutoencoderRAE", "reshape_to_2d": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`vae` must have `reshape_to_2d`"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("case", ["dc", "flux2", "rae_mae"])
def test_any_class_is_loaded_by_its_name(tmp_path, case):
    images = random_images()
    vae = make(case, images)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = load_vae(str(tmp_path / "pipeline"))
    assert type(loaded) is getattr(diffusers, CASES[case][0])
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(autoencoders.encode(loaded, images)["mean"], autoencoders.encode(vae, images)["mean"])


# The cache


@pytest.mark.parametrize("case", ["dc", "flux2", "kl", "rae_mae"])
def test_the_cache_says_what_it_holds_and_is_standardised_once(image_data, tmp_path, case):
    dataset, id2label = image_data
    images = pixels_of(dataset)
    vae = make(case, images)
    latents = encode(dataset, tmp_path, vae=vae, id2label=id2label, random_flip=True)
    assert latents.index["vae"]["class_name"] == CASES[case][0]
    assert latents.index["vae"]["latents"] == ("point" if case in POINTS else "posterior")
    assert latents.index["vae"]["is_standardised"] == (case in STANDARDISED)
    for flip, variant in ((False, images), (True, images.flip(-1))):
        mean, std = latents_of_diffusers(case, vae, variant)
        for index in range(3):
            sample = latents.read(index, flip)
            close(sample["mean"], mean[index])
            assert ("std" in sample) == (std is not None)
            if std is not None:
                close(sample["std"], std[index])
    is_identity = latents.latents_mean == [0.0] * mean.shape[1] and latents.latents_std == [1.0] * mean.shape[1]
    assert is_identity == (case in STANDARDISED)
    # What the model is trained on has magnitude 1, in one way or the other.
    samples = TrainingSamples(latents, seed=0)
    batch = samples[[(epoch, position) for epoch in range(8) for position in range(len(samples))]]
    assert abs(batch["latents"].square().mean().sqrt() - 1) < 0.1


def test_statistics_of_other_data_are_refused(image_data, tmp_path):
    vae = make("flux2", pixels_of(image_data[0]))
    vae.bn.running_var.mul_(9)
    with pytest.raises(
        ValueError, match=r"`vae` must make latents of magnitude 1, .* power between 0.5 and 2, .* 0.1"
    ):
        encode(image_data[0], tmp_path / "a", vae=vae)
    vae.bn.reset_running_stats()
    assert min(encode(image_data[0], tmp_path / "b", vae=vae).latents_std) not in (0, 1)


def test_other_sizes_than_the_only_one_are_refused(image_data, tmp_path):
    vae = make("rae_mae", random_images())
    with pytest.raises(
        ValueError, match="`resolution` must be 16, the only size that this AutoencoderRAE dec.* got 32"
    ):
        encode(image_data[0], tmp_path, vae=vae, resolution=32)
    model = tiny_model(in_channels=64, sample_size=2, patch_size=1).eval()
    pipe = MPDiTPipeline(model, DDIMScheduler(clip_sample=False), vae)
    with pytest.raises(ValueError, match="`height` and `width` must be 16, the only size .* got 16x32"):
        pipe(1, width=32)


# diffusers' own DiT


def test_scaling_for_dit_pipeline():
    assert autoencoders.scaling_for_dit_pipeline(tiny_vae(), 4) == 0.18215
    with pytest.raises(ValueError, match=r"`vae` must have as many latent channels .* \(3\), got 4"):
        autoencoders.scaling_for_dit_pipeline(tiny_vae(), 3)
    for case in ("flux2", "kvae", "rae_mae", "qwen", "consistency"):
        vae = make(case, random_images())
        with pytest.raises(
            ValueError, match=f"`vae` must be one that .* DiTPipeline decodes, .* {type(vae).__name__}"
        ):
            autoencoders.scaling_for_dit_pipeline(vae, 4)


def test_committed_table_is_the_generated_one():
    path = ROOT / "docs" / "write_autoencoders.py"
    spec = importlib.util.spec_from_file_location("write_autoencoders", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.table() in script.FILE.read_text(), "run `python docs/write_autoencoders.py`"
