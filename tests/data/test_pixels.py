"""Reading and preparing single images, on small real files."""

import zipfile

import numpy as np
import pytest
import torch
from helpers import random_image
from PIL import Image

from diffusers_mp.data.pixels import prepare_image, read_image


def test_read_image_from_an_address(tmp_path):
    """Streams name images by addresses that fsspec opens."""
    image = random_image(np.random.default_rng(0), 16, 16)
    image.save(tmp_path / "a.png")
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    addresses = (f"file://{tmp_path}/a.png", f"zip://a.png::file://{tmp_path}/a.zip", str(tmp_path / "a.png"))
    for path in addresses:
        pixels, error = read_image({"path": path, "bytes": None}, 16, 3)
        assert error is None
        assert torch.equal(pixels, expected)
    with pytest.raises(FileNotFoundError, match="b.png"):
        read_image({"path": f"file://{tmp_path}/b.png", "bytes": None}, 16, 3)


def test_prepare_image_keeps_the_centre_square():
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = np.random.default_rng(3).integers(0, 256, (16, 16, 3))
    pixels = prepare_image(Image.fromarray(wide), 16, 3)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(wide[:, 16:32]).permute(2, 0, 1))
    tall = prepare_image(Image.fromarray(wide.transpose(1, 0, 2)), 16, 3)
    assert torch.equal(tall, pixels.transpose(1, 2))


def test_prepare_image_halves_by_averages():
    fine = np.random.default_rng(4).integers(0, 256, (64, 64), dtype=np.uint8)
    blocks = fine.reshape(16, 4, 16, 4).mean((1, 3))
    pixels = prepare_image(Image.fromarray(fine), 16, 1)
    assert pixels.shape == (1, 16, 16)
    assert np.abs(pixels[0].numpy() - blocks).max() <= 1  # each of the two halvings rounds by half a level


def test_prepare_image_of_other_modes():
    deep = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = torch.arange(256).view(1, 16, 16)
    assert torch.equal(prepare_image(Image.fromarray(deep), 16, 1).long(), expected)
    assert torch.equal(prepare_image(Image.fromarray(deep), 16, 3).long(), expected.expand(3, -1, -1))
    palette = Image.fromarray(expected[0].numpy().astype(np.uint8)).convert("P")
    palette.info["transparency"] = b"\x00\xff"
    on_ground = expected.clone()
    on_ground[0, 0, 0] = 128  # the one colour without alpha
    assert torch.equal(prepare_image(palette, 16, 1, "gray").long(), on_ground)
    with pytest.raises(ValueError, match="mode 'F'"):
        prepare_image(Image.fromarray(np.zeros((16, 16), dtype=np.float32)), 16, 1)


def test_prepare_image_is_upright(tmp_path):
    stored = np.zeros((16, 16), dtype=np.uint8)
    stored[:4] = 255  # bright on top as stored; orientation 3 says: show it upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        pixels = prepare_image(image, 16, 1)
    assert torch.equal(pixels[0], torch.from_numpy(stored).flip(0))


def test_trouble_of_the_disk_is_no_damaged_image(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_image({"bytes": None, "path": str(tmp_path / "gone.png")}, 8, 3)
    (tmp_path / "a.png").write_bytes(b"no image")
    assert read_image({"bytes": None, "path": str(tmp_path / "a.png")}, 8, 3)[1].startswith("UnidentifiedImageError")
    assert read_image({"bytes": None, "path": None}, 8, 3)[1].startswith("UnidentifiedImageError")
