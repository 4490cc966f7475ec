"""The latent cache on real pictures and a tiny AutoencoderKL; expected values are computed directly from both."""

import json
import logging
import os
import pickle

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import random_picture, tiny_vae
from PIL import Image

from diffusers_mp.images import load_image_dataset, prepare_image
from diffusers_mp.latents import LatentDataset, _ChannelStatistics, encode_dataset, vae_fingerprint


RESOLUTION = 16


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def encoded(pictures, vae, tmp_path_factory):
    dataset, id2label = pictures
    folder = tmp_path_factory.mktemp("encoded")
    options = {"resolution": RESOLUTION, "random_flip": True, "batch_size": 2, "shard_size": 3}
    return encode_dataset(dataset, folder, vae=vae, id2label=id2label, vae_id="tiny", **options)


def pixels_of(dataset, num_channels=3):
    prepared = []
    for row in dataset:
        with Image.open(row["image"]["path"]) as image:
            prepared.append(prepare_image(image, RESOLUTION, num_channels))
    return torch.stack(prepared).float() / 127.5 - 1


def test_a_folder_without_classes_is_unlabelled(tmp_path, vae):
    rng = np.random.default_rng(1)
    (tmp_path / "flat").mkdir()
    for k in range(3):
        random_picture(rng).save(tmp_path / "flat" / f"{k}.png")
    dataset, id2label = load_image_dataset(tmp_path / "flat", cache_dir=str(tmp_path / "cache"))
    assert id2label is None
    latents = encode_dataset(dataset, tmp_path / "encoded", vae=vae, resolution=RESOLUTION, id2label=id2label)
    assert latents.id2label is None
    assert set(latents[0]) == {"mean", "std"}


@torch.no_grad()
def test_moments_are_those_of_the_vae_across_shard_borders(encoded, pictures, vae):
    dataset, _ = pictures
    pixels = pixels_of(dataset)
    assert [shard["num_samples"] for shard in encoded.index["shards"]] == [3, 3, 3, 1]
    assert len(encoded) == 10
    assert encoded.latent_shape == (4, 4, 4)
    for flip, variant in ((False, pixels), (True, pixels.flip(-1))):
        posterior = vae.encode(variant).latent_dist
        for index in (0, 2, 3, 5, 6, 8, 9):
            sample = encoded.read(index, flip=flip)
            # a batch of another size may sum in another order
            torch.testing.assert_close(sample["mean"], posterior.mean[index], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sample["std"], posterior.std[index], rtol=1e-5, atol=1e-5)
            assert sample["label"] == dataset[index]["label"]
    assert not torch.allclose(encoded.read(0, flip=True)["mean"], encoded.read(0)["mean"].flip(-1), atol=1e-3)
    assert torch.equal(encoded[4]["mean"], encoded.read(4)["mean"])
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"must be in \[0, 10\)"):
            encoded[index]


@torch.no_grad()
def test_statistics_are_those_of_the_drawn_latents(encoded, pictures, vae):
    pixels = pixels_of(pictures[0])
    posterior = vae.encode(torch.cat([pixels, pixels.flip(-1)])).latent_dist
    # a mixture of Gaussians: E[x] = E[mean], E[x²] = E[mean² + std²]
    mean, std = posterior.mean.double(), posterior.std.double()
    expected_mean = mean.mean((0, 2, 3))
    expected_std = ((mean.square() + std.square()).mean((0, 2, 3)) - expected_mean.square()).sqrt()
    torch.testing.assert_close(torch.tensor(encoded.latents_mean).double(), expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(encoded.latents_std).double(), expected_std, rtol=1e-5, atol=1e-6)


def test_index_explains_itself_and_survives_reloading(encoded):
    again = LatentDataset(encoded.folder)
    index = json.loads((encoded.folder / "index.json").read_text())
    assert index["vae"]["id"] == "tiny"
    assert index["resolution"] == RESOLUTION
    assert index["skipped"] == []
    assert again.id2label == {0: "cat", 1: "dog", 2: "test"}
    assert again.latents_std == encoded.latents_std
    assert not list(encoded.folder.glob("*.tmp"))


def test_pickled_after_reading(encoded):
    encoded[0]
    again = pickle.loads(pickle.dumps(encoded))
    assert all(torch.equal(again[index]["mean"], encoded[index]["mean"]) for index in range(10))


@pytest.mark.parametrize("key", ["mean", "std"])
def test_writing_to_a_sample_changes_nothing(encoded, key):
    before = encoded[0][key].clone()
    encoded[0][key].zero_()
    assert torch.equal(encoded[0][key], before)


def test_pixels_are_stored_as_bytes_and_mirrored_on_reading(pictures, tmp_path):
    dataset, id2label = pictures
    encoded = encode_dataset(
        dataset, tmp_path / "a", vae=None, resolution=RESOLUTION, id2label=id2label, shard_size=4, num_workers=2
    )
    pixels = pixels_of(dataset)
    assert encoded.latent_shape == (3, RESOLUTION, RESOLUTION)
    for index in range(10):
        sample = encoded.read(index, flip=index % 2 == 1)
        assert set(sample) == {"mean", "label"}
        assert torch.equal(sample["mean"], pixels[index].flip(-1) if index % 2 else pixels[index])
    num_bytes = sum(shard["num_bytes"] for shard in encoded.index["shards"])
    assert num_bytes < 1.2 * pixels.numel()
    expected_std, expected_mean = torch.std_mean(pixels.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(encoded.latents_mean).double(), expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(encoded.latents_std).double(), expected_std, rtol=1e-6, atol=1e-6)
    encoded.validate(vae=None, resolution=RESOLUTION, random_flip=True)
    grey = encode_dataset(dataset, tmp_path / "b", vae=None, resolution=RESOLUTION, num_channels=1)
    assert torch.equal(grey[3]["mean"], pixels_of(dataset, 1)[3])


@pytest.fixture
def damaged_folder(tmp_path):
    folder, rng = tmp_path / "pictures", np.random.default_rng(5)
    folder.mkdir()
    for k in range(6):
        random_picture(rng).save(folder / f"{k}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "4.png").write_text("not a picture")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_picture_is_named(damaged_folder, tmp_path, vae, num_workers):
    dataset, _ = load_image_dataset(damaged_folder, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Cannot read .*[/\\]1\.png: OSError.*--skip_corrupt"):
        encode_dataset(dataset, tmp_path / "encoded", vae=vae, resolution=RESOLUTION, num_workers=num_workers)
    with pytest.raises(FileNotFoundError, match="must hold a finished encoded data set"):
        LatentDataset(tmp_path / "encoded")


def test_corrupt_pictures_are_left_out_when_asked(damaged_folder, tmp_path, vae, caplog):
    dataset, _ = load_image_dataset(damaged_folder, cache_dir=str(tmp_path / "cache"))
    options = {"vae": vae, "resolution": RESOLUTION, "skip_corrupt": True, "batch_size": 1, "shard_size": 2}
    with caplog.at_level(logging.WARNING, logger="diffusers_mp.latents"):
        encoded = encode_dataset(dataset, tmp_path / "encoded", **options)
    assert len(encoded) == 4
    assert [os.path.basename(name) for name in encoded.index["skipped"]] == ["1.png", "4.png"]
    assert [str(damaged_folder / f"{k}.png") in caplog.text for k in range(6)] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    kept = pixels_of(dataset.select([0, 2, 3, 5]))
    with torch.no_grad():
        expected = vae.encode(kept).latent_dist.mean
    torch.testing.assert_close(torch.stack([encoded[k]["mean"] for k in range(4)]), expected, rtol=1e-5, atol=1e-5)
    # shards hold their own rows only: here rows 0-1 without 1, 2-3, 4-5 without 4
    assert [shard["num_samples"] for shard in encoded.index["shards"]] == [1, 2, 1]
    with pytest.raises(ValueError, match="None of the 2 pictures could be read"):
        encode_dataset(dataset.select([1, 4]), tmp_path / "none", **options)


def test_a_corrupt_picture_without_a_path_is_named_by_its_row(tmp_path):
    columns = {"image": [{"bytes": b"nonsense", "path": None}, None]}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(decode=False)}))
    for row in range(2):
        with pytest.raises(ValueError, match="Cannot read row 0: UnidentifiedImageError"):
            encode_dataset(dataset.select([row]), tmp_path / "a", vae=None, resolution=RESOLUTION)


def test_a_constant_channel_is_named(tmp_path):
    rng = np.random.default_rng(6)
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        picture[..., 1] = 77
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{k}.png")
    dataset, _ = load_image_dataset(tmp_path / "pictures", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Every channel must vary over the data, channels \[1\] have std"):
        encode_dataset(dataset, tmp_path / "encoded", vae=None, resolution=16)
    assert not (tmp_path / "encoded" / "index.json").exists()


@pytest.mark.parametrize("square", [9.0 + 1e-14, float("nan")])
def test_rounding_does_not_hide_a_constant_channel(square):
    statistics = _ChannelStatistics()
    statistics.count, statistics.sum = 1, torch.tensor([3.0, 3.0]).double()
    statistics.sum_of_squares = torch.tensor([square, 10.0], dtype=torch.float64)  # sums round in the 16th digit
    with pytest.raises(ValueError, match=r"channels \[0\] have std"):
        statistics.result()


def test_unfit_vaes_are_refused(pictures, tmp_path, vae):
    dataset, _ = pictures
    with pytest.raises(ValueError, match="`vae` must be in float32 to encode, received torch.bfloat16"):
        encode_dataset(dataset, tmp_path, vae=tiny_vae().to(torch.bfloat16), resolution=RESOLUTION)
    with pytest.raises(ValueError, match=r"1 \(grey\) or 3 \(RGB\) channels, .* wants 4"):
        encode_dataset(dataset, tmp_path, vae=tiny_vae(in_channels=4), resolution=RESOLUTION)
    with pytest.raises(ValueError, match="must be a multiple of the VAE's factor 4, received 18"):
        encode_dataset(dataset, tmp_path, vae=vae, resolution=18)
    grey = encode_dataset(dataset, tmp_path / "grey", vae=tiny_vae(in_channels=1), resolution=RESOLUTION)
    assert len(grey) == 10


def test_an_encoded_folder_is_not_overwritten(encoded, pictures, vae):
    with pytest.raises(FileExistsError, match="already holds an encoded data set"):
        encode_dataset(pictures[0], encoded.folder, vae=vae, resolution=RESOLUTION)


def test_fingerprint_tells_weights_and_configurations_apart(vae):
    same, other = vae_fingerprint(tiny_vae()), vae_fingerprint(tiny_vae(seed=1))
    assert same == vae_fingerprint(vae)
    assert other["config_hash"] == same["config_hash"]
    assert other["weights_hash"] != same["weights_hash"]
    assert vae_fingerprint(tiny_vae(in_channels=1))["config_hash"] != same["config_hash"]


def test_validate_accepts_a_reloaded_vae_and_names_each_difference(encoded, pictures, vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    reloaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    encoded.validate(vae=reloaded, resolution=RESOLUTION, random_flip=True)
    with pytest.raises(ValueError, match=r"weights_hash differs \(they were encoded with 'tiny'\); .* is 16, not 32"):
        encoded.validate(vae=tiny_vae(seed=1), resolution=32)
    with pytest.raises(ValueError, match="they hold latents"):
        encoded.validate(vae=None, resolution=RESOLUTION)
    unflipped = encode_dataset(pictures[0], tmp_path / "unflipped", vae=vae, resolution=RESOLUTION)
    with pytest.raises(ValueError, match="encoded without `random_flip`"):
        unflipped.validate(vae=vae, resolution=RESOLUTION, random_flip=True)
    with pytest.raises(ValueError, match="`flip=True` needs data encoded with `random_flip=True`"):
        unflipped.read(0, flip=True)


def test_damaged_folders_are_refused(pictures, tmp_path):
    folder = tmp_path / "encoded"
    encode_dataset(pictures[0], folder, vae=None, resolution=RESOLUTION, shard_size=6)
    shard, content = folder / "shard-00001.safetensors", (folder / "shard-00001.safetensors").read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=f"shard-00001.safetensors must have {len(content)} bytes, found"):
        LatentDataset(folder)
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors must have .* found 0"):
        LatentDataset(folder)
    shard.write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format_version": 99}))
    with pytest.raises(ValueError, match="`folder` must have format version 1, .* has 99"):
        LatentDataset(folder)
