"""Shards of real images and a tiny AutoencoderKL; expected values are computed directly from both."""

import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import encode, pixels_of, random_image
from PIL import Image

from diffusers_mp.data import shards
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.data.shards import ChannelStatistics


RESOLUTION = 16


@torch.no_grad()
def test_statistics_are_those_of_the_drawn_latents(encoded, image_data, vae):
    pixels = pixels_of(image_data[0])
    posterior = vae.encode(torch.cat([pixels, pixels.flip(-1)])).latent_dist
    # a mixture of Gaussians: E[x] = E[mean], E[x²] = E[mean² + std²]
    mean, std = posterior.mean.double(), posterior.std.double()
    expected_mean = mean.mean((0, 2, 3))
    expected_std = ((mean.square() + std.square()).mean((0, 2, 3)) - expected_mean.square()).sqrt()
    torch.testing.assert_close(torch.tensor(encoded.latents_mean).double(), expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(encoded.latents_std).double(), expected_std, rtol=1e-5, atol=1e-6)


@pytest.fixture
def damaged_folder(tmp_path):
    folder, rng = tmp_path / "images", np.random.default_rng(5)
    folder.mkdir()
    for k in range(6):
        random_image(rng).save(folder / f"{k}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "4.png").write_text("not an image")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named(damaged_folder, tmp_path, vae, num_workers):
    dataset, *_ = load_image_dataset(damaged_folder, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Cannot read .*[/\\]1\.png: OSError.*--skip_corrupt"):
        encode(dataset, tmp_path / "encoded", vae=vae, num_workers=num_workers)
    with pytest.raises(FileNotFoundError, match="must hold a finished encoded data set"):
        LatentDataset(tmp_path / "encoded")


def test_corrupt_images_are_left_out_when_asked(damaged_folder, tmp_path, vae, caplog):
    dataset, *_ = load_image_dataset(damaged_folder, cache_dir=str(tmp_path / "cache"))
    options = {"vae": vae, "skip_corrupt": True, "batch_size": 1, "shard_size": 2}
    with caplog.at_level(logging.WARNING, logger="diffusers_mp.data"):
        encoded = encode(dataset, tmp_path / "encoded", **options)
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
    with pytest.raises(ValueError, match="None of the 2 images could be read"):
        encode(dataset.select([1, 4]), tmp_path / "none", **options)
    # Who did not ask is told.
    for asked, told in ((True, False), (False, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="diffusers_mp.data"):
            encode(dataset, tmp_path / "encoded", **{**options, "skip_corrupt": asked})
        assert ("lacks images that could not be read when it was encoded: 2 of them, such as" in caplog.text) is told


def test_a_corrupt_image_without_a_path_is_named_by_its_row(tmp_path):
    columns = {"image": [{"bytes": b"nonsense", "path": None}, None]}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(decode=False)}))
    for row in range(2):
        with pytest.raises(ValueError, match="Cannot read row 0: UnidentifiedImageError"):
            encode(dataset.select([row]), tmp_path / "a")


@pytest.mark.parametrize(
    "kind, empty, message",
    [
        ("int64", None, "must hold a class for each image, 'species' of .*{name} is empty"),
        ("float64", None, "must hold a class for each image, 'species' of .*{name} is empty"),
        ("float64", float("nan"), "must hold a class for each image, 'species' of .*{name} is empty"),
        ("string", "", "must hold a class for each image, 'species' of .*{name} is empty"),
        ("string", None, "must hold a class for each image, 'species' of .*{name} is empty"),
        ("int64", 7, "must hold ids of `id2label`, 'species' of .*{name} is 7"),
        ("float64", 0.5, "must hold ids of `id2label`, 'species' of .*{name} is 0.5"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_label_that_is_none_is_named_with_its_image(image_data, tmp_path, kind, empty, message, streaming):
    dataset, id2label = image_data
    path = dataset[0]["image"]["path"]
    # The first alone: a column of floats or of text holds no ids, and is refused before.
    rows = datasets.Dataset.from_dict(
        {"image": [path], "species": [empty]},
        features=datasets.Features({"image": datasets.Image(decode=False), "species": datasets.Value(kind)}),
    )
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(ValueError, match="`label_column` " + message.format(name=os.path.basename(path))):
        encode(rows, tmp_path, id2label=id2label, label_column="species")
    anonymous = {"image": [{"path": None, "bytes": Path(path).read_bytes()}] * 2, "species": [empty] * 2}
    rows = datasets.Dataset.from_dict(anonymous, features=rows.features)
    with pytest.raises(ValueError, match="'species' of row 0 is"):
        encode(rows, tmp_path / "b", id2label=id2label, label_column="species")


def test_a_device_is_never_without_a_batch(vae, monkeypatch):
    """It is at work on one while the next is read, and while what it made of the one before is looked at."""
    events, encode_batch = [], vae.encode

    def batches():
        for number in range(3):
            events.append(f"read {number}")
            yield torch.full((2, 3, 16, 16), number, dtype=torch.uint8), number

    def encode_and_note(pixels):
        events.append(f"encode {round((pixels.mean().item() + 1) * 127.5)}")
        return encode_batch(pixels)

    monkeypatch.setattr(vae, "encode", encode_and_note)
    with torch.no_grad():
        for moments, number in shards._encoded(batches(), vae, False):
            events.append(f"look {number}")
            assert moments["mean"].device.type == "cpu"
    assert events == [
        *("read 0", "encode 0", "read 1", "encode 1", "look 0", "read 2", "encode 2", "look 1", "look 2"),
    ]


def test_latents_that_are_not_finite_are_named(image_folder, tmp_path, vae, monkeypatch):
    dataset, *_ = load_image_dataset(image_folder, cache_dir=str(tmp_path / "cache"))
    encode_batch, batches = vae.encode, []

    def encode_with_a_hole(pixels):
        batches.append(len(pixels))
        if len(batches) == 2:
            pixels[1] = float("nan")
        return encode_batch(pixels)

    monkeypatch.setattr(vae, "encode", encode_with_a_hole)
    name = os.path.basename(dataset[3]["image"]["path"])
    with pytest.raises(ValueError, match=f"`vae` must make finite latents, in .*32 those of .*{name} are not"):
        encode(dataset, tmp_path / "encoded", vae=vae, batch_size=2)
    assert len(batches) == 3  # the next one had begun
    # Nothing of it stays: made anew, it is whole.
    monkeypatch.undo()
    assert len(encode(dataset, tmp_path / "encoded", vae=vae)) == len(dataset)


def test_an_encoder_that_another_one_overtakes_goes_on(image_data, tmp_path, vae, monkeypatch):
    dataset, id2label = image_data
    options = {"vae": vae, "id2label": id2label, "shard_size": 3}
    save, overtaken = shards.save_file, []

    def save_and_be_overtaken(tensors, path):
        save(tensors, path)
        if not overtaken:
            overtaken.append(path)
            monkeypatch.setattr(os, "getpid", lambda: 0)
            encode(dataset, tmp_path / "encoded", **options)

    monkeypatch.setattr(shards, "save_file", save_and_be_overtaken)
    encoded = encode(dataset, tmp_path / "encoded", **options)
    assert not os.path.exists(overtaken[0])
    encoded.verify()
    monkeypatch.undo()
    alone = encode(dataset, tmp_path / "alone", **options)
    assert encoded.index == alone.index


def test_a_constant_channel_is_named(tmp_path):
    rng = np.random.default_rng(6)
    (tmp_path / "images").mkdir()
    for k in range(3):
        image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image[..., 1] = 77
        Image.fromarray(image).save(tmp_path / "images" / f"{k}.png")
    dataset, *_ = load_image_dataset(tmp_path / "images", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Every channel must vary over the data, channels \[1\] have std"):
        encode(dataset, tmp_path / "encoded", resolution=16)
    assert not (tmp_path / "encoded" / "index.json").exists()


@pytest.mark.parametrize("square", [9.0 + 1e-14, float("nan")])
def test_rounding_does_not_hide_a_constant_channel(square):
    statistics = ChannelStatistics()
    statistics.count, statistics.sum = 1, torch.tensor([3.0, 3.0]).double()
    statistics.sum_of_squares = torch.tensor([square, 10.0], dtype=torch.float64)  # sums round in the 16th digit
    with pytest.raises(ValueError, match=r"channels \[0\] have std"):
        statistics.result()
