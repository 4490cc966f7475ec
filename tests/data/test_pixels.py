"""Reading and preparing single images, on small real files."""

import re
import resource
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from helpers import encode, random_image
from image_files import ADOBE, ALPHA, COLOURS, on_ground, rgb_profile, saved, through_profile
from PIL import Image

from diffusers_mp.data import pixels as pixels_module
from diffusers_mp.data.pixels import prepare_image, read_image
from diffusers_mp.data.settings import EncodingSettings


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


@pytest.mark.parametrize(
    "mode, values, shown",
    [
        ("HSV", (0, 255, 200), (200, 0, 0)),
        ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
        ("RGBa", (50, 0, 100, 100), (205, 155, 255)),  # lit by 100 of 255, the rest is white
        ("La", (50, 100), (205, 205, 205)),
        ("LA", (50, 0), (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x8080, (128, 128, 128)),
        ("I;16B", 0x8080, (128, 128, 128)),
    ],
)
def test_modes_of_images_that_are_no_files(mode, values, shown):
    pixels = prepare_image(Image.new(mode, (8, 8), values), 8, 3)
    assert (pixels - torch.tensor(shown).view(3, 1, 1)).abs().max() <= 1


def test_only_the_middle_of_a_strip_is_made():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((1, 3000), (3000, 1), (20000, 3)):
        assert prepare_image(Image.new("RGB", size, (1, 2, 3)), 512, 3)[:, 9, 9].tolist() == [1, 2, 3]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # 512 x 1 536 000 pixels would be 3 GB. Linux counts in KiB, macOS in bytes.
    assert grown * (1 if sys.platform == "darwin" else 1024) < 200e6


@pytest.mark.parametrize("size", [(50, 40), (31, 47), (199, 60), (23, 100)])
def test_the_middle_is_that_of_the_whole_resized_image(size):
    # Levels away from both ends: which of the two passes clips first is Pillow's choice.
    values = np.random.default_rng(2).integers(64, 192, (size[1], size[0], 3), dtype=np.uint8)
    scale = 32 / min(size)
    width, height = (round(side * scale) for side in size)
    whole = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    top, left = (height - 32) // 2, (width - 32) // 2
    pixels = prepare_image(Image.fromarray(values), 32, 3).permute(1, 2, 0).numpy()
    assert np.abs(pixels - whole[top : top + 32, left : left + 32]).max() <= 2


def test_threads_share_a_profile():
    profile = rgb_profile(ADOBE, 563 / 256)
    images = [Image.fromarray(np.roll(COLOURS, shift, 0)) for shift in range(40)]
    for image in images:
        image.info["icc_profile"] = profile
    with ThreadPoolExecutor(8) as pool:
        for shift, pixels in enumerate(pool.map(lambda image: prepare_image(image, 16, 3), images)):
            expected = np.roll(through_profile(COLOURS, ADOBE, 563 / 256), shift, 0)
            assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 2


def test_a_background_that_is_no_colour_is_no_fault_of_an_image(tmp_path):
    for background in ("whiter", "#ff000080"):
        message = f"`background` must be a colour such as white, gray or #ff8800, got '{background}'"
        for call in (
            lambda: prepare_image(Image.new("L", (8, 8)), 8, 1, background),  # noqa: B023
            lambda: read_image({"bytes": b"no image", "path": None}, 8, 1, background),  # noqa: B023
            lambda: EncodingSettings(8, background=background),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                call()


def test_the_ground_is_part_of_the_encoding(tmp_path):
    content = saved(np.dstack([COLOURS, ALPHA]), "PNG")
    features = datasets.Features({"image": datasets.Image(decode=False)})
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": "a.png"}] * 2}, features)
    for ground in ("white", "#2040ff"):
        encoded = encode(dataset, tmp_path / ground, resolution=16, background=ground)
        levels = (encoded[0]["mean"].permute(1, 2, 0) + 1) * 127.5
        assert np.abs(levels.numpy() - on_ground(COLOURS, ALPHA, ground)).max() < 1e-3
    with pytest.raises(ValueError, match=r'`background` "white" \(now "black"\)'):
        encode(dataset, tmp_path / "white", resolution=16, background="black")


def test_an_image_that_does_not_fit_into_memory_is_named(monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr(pixels_module, "prepare_image", full)
    content = saved(COLOURS, "PNG")
    with pytest.raises(MemoryError, match=f"photos/a.png, a file of {len(content)} bytes"):
        read_image({"bytes": content, "path": "photos/a.png"}, 8, 3)


def test_trouble_of_the_disk_is_no_damaged_image(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_image({"bytes": None, "path": str(tmp_path / "gone.png")}, 8, 3)
    (tmp_path / "a.png").write_bytes(b"no image")
    assert read_image({"bytes": None, "path": str(tmp_path / "a.png")}, 8, 3)[1].startswith("UnidentifiedImageError")
    assert read_image({"bytes": None, "path": None}, 8, 3)[1].startswith("UnidentifiedImageError")
