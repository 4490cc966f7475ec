"""Which files count as images, what is said of the others, and what is never opened."""

import io
import subprocess
import tracemalloc

import numpy as np
import pytest
from image_files import COLOURS, png, saved, tiff
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from diffusers_mp.data.formats import HEAD_SIZE, format_of, open_image, why_no_image


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "JPEG2000", "QOI"])
def test_the_content_decides_under_any_name(format_):
    head = saved(COLOURS, format_)[:HEAD_SIZE]
    assert {format_of(head, name) for name in ("a.png", "a.jpg", "A.JPEG", "a.heic", "a")} == {format_}


@pytest.mark.parametrize(
    "name, head",
    [
        ("metadata.csv", b"P1,cat\n"),
        ("classes.txt", b"P2 is a class"),
        ("reader.c", b"/* C, and no X bitmap */"),
        ("notes.json", b"{}"),
        ("photos.zip", b"PK\3\4"),
        ("table.parquet", b"PAR1"),
        ("clip.mp4", b"\0\0\0\x20ftypisom\0\0\0\0isomavc1"),
        ("Thumbs.db", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
        ("README", b"BadMatch"),
        ("empty.txt", b""),
    ],
)
def test_other_files_are_no_images_and_need_no_reason(name, head):
    assert format_of(head, name) is None
    assert why_no_image(head, name) is None


@pytest.mark.parametrize(
    "name, head, reason",
    [
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pip install pillow-heif"),
        ("a.jpg", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "pip install pillow-heif"),
        ("a.jxl", b"\xff\x0a\xfa", "pip install pillow-jxl-plugin"),
        ("a.svg", b"<svg/>", "drawing"),
        ("a.nef", b"MM\0*\0\0\0\x08", "raw file"),
        ("a.CR2", b"II*\0\x10\0\0\0CR", "raw file"),
        ("a.exr", b"v/1\x01", "range"),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        ("a.wmf", b"\xd7\xcd\xc6\x9a\0\0", "drawing"),
        ("a.mpg", b"\0\0\x01\xb3", "video"),
        ("a.png", b"words", "no image"),
        ("a.png", b"", "empty"),
        ("a.heic", b"words", "no image"),
    ],
)
def test_images_that_cannot_be_read_have_a_reason(name, head, reason):
    if format_of(head, name) in ("HEIF", "JXL"):
        pytest.skip("the plugin is installed here")
    assert format_of(head, name) is None
    assert reason in why_no_image(head, name)


def test_the_extension_is_tried_only_for_formats_without_a_signature():
    head = saved(COLOURS, "TGA")[:HEAD_SIZE]
    assert format_of(head, "a.tga") == "TGA"  # though it begins as a cursor of Windows does
    assert format_of(head, "a.txt") is None
    with pytest.raises(UnidentifiedImageError, match="no image"):
        open_image(saved(COLOURS, "TGA"), "a.png")
    assert format_of(saved(COLOURS, "PNG")[:HEAD_SIZE], "a.tga") == "PNG"


def test_no_program_is_run(monkeypatch):
    """With Ghostscript installed, Pillow would give it the file."""
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    for name in ("run", "call", "check_call", "Popen"):
        monkeypatch.setattr(subprocess, name, lambda *args, **kwargs: pytest.fail("a program was started"))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(program)) as image, pytest.raises(BaseException, match="a program was"):
        image.load()  # as it would be
    for name in ("a.eps", "a.ps", "a.png", ""):
        with pytest.raises(UnidentifiedImageError, match="PostScript"):
            open_image(program, name)


def test_size_is_checked_before_decoding():
    """Without Pillow's warning: 100 million pixels are an ordinary camera's, and read."""
    bomb = png(COLOURS, 8, 2, size=(20000, 20000))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"from 1 to 178956970 pixels, got 20000 x 20000\. .*MAX_IMAGE_PIXELS"):
        open_image(bomb)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert open_image(png(COLOURS, 8, 2, size=(12000, 9000))).size == (9000, 12000)


def test_the_preview_of_a_raw_file_is_no_image():
    samples, bits = np.zeros((16, 16, 3), dtype=np.uint8).tobytes(), (8, 8, 8)
    for content, name in ((tiff(samples, bits, 2, subfile=1), "a.tif"), (tiff(samples, bits, 2, dng=1), "a")):
        with pytest.raises(ValueError, match="raw file"):
            open_image(content, name)
    assert open_image(tiff(samples, bits, 2), "a.tif").size == (16, 16)
    with pytest.raises(UnidentifiedImageError, match="raw file"):
        open_image(tiff(samples, bits, 2), "a.dng")
