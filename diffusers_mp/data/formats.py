"""Which files are images: told by their first bytes, opened by Pillow and its plugins, or refused with the reason."""

import contextlib
import functools
import importlib
import io
import math
import os
import struct
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError, features


# Bytes of a file from its start that `format_of` needs.
HEAD_SIZE = 64
# What Pillow knows by name but cannot turn into pixels here, and what it must not: EPS is a program for Ghostscript.
_NO_PIXELS = {
    "EPS": "PostScript is a program that would have to be run: export it as PNG",
    "WMF": "a Windows metafile is a drawing: export it as PNG",
    "MPEG": "it is a video",
    "BUFR": "it holds measurements",
    "GRIB": "it holds measurements",
    "HDF5": "it holds arrays",
}
# Without a signature, or with one as short as two bytes: a text may begin with "P1" or "/*".
_WEAK = set("BMP CUR DIB FLI GBR ICO IM IMT IPTC MCIDAS MPEG MSP PCD PCX PIXAR PPM SGI SPIDER TGA WMF XBM XPM".split())
_HEIF = "`pip install pillow-heif` lets it be read"
_AVIF = "`pip install pillow-avif-plugin` lets it be read"
_JXL = "`pip install pillow-jxl-plugin` lets it be read"
_RAW = "a camera's raw file gives a small preview only: develop it to JPEG, PNG or TIFF"
_HINTS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), _HEIF),
    ".jxl": _JXL,
    **dict.fromkeys(".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mrw .nef .nrw".split(), _RAW),
    **dict.fromkeys(".orf .pef .raf .rw2 .sr2 .srw .x3f".split(), _RAW),
    **dict.fromkeys((".svg", ".svgz", ".ai", ".cdr"), "it is a drawing: export it as PNG"),
    **dict.fromkeys((".exr", ".hdr"), "its values have no fixed range: save it with 8 or 16 bits"),
    **dict.fromkeys((".xcf", ".kra", ".jxr"), "Pillow cannot read it: export it as PNG"),
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_SUBFILE_TYPE, _DNG_VERSION = 254, 50706  # tags of TIFF; type 1 is "a reduced-resolution version of another image"


@functools.cache
def register_formats() -> None:
    """Load all of Pillow's readers, and the plugins for further formats that are installed. Does it once."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    for name, wanted in (("pillow_avif", not features.check("avif")), ("pillow_jxl", True)):
        with contextlib.suppress(ImportError):
            wanted and importlib.import_module(name)  # the import registers it


@functools.cache
def _extensions() -> dict[str, str]:
    register_formats()
    return {extension: format_ for extension, format_ in Image.EXTENSION.items() if format_ in Image.OPEN}


def _accepts(format_: str, head: bytes) -> bool:
    accept = Image.OPEN[format_][1]
    if accept is None:
        return False
    if format_ == "AVIF" and b"avi" not in head[8:]:  # HEIC comes in the same container, by the same main brand
        return False
    try:
        return accept(head[:16]) is True  # Pillow gives as many; an answer in words says why not
    except (IndexError, TypeError, struct.error):  # of a shorter file
        return False


def _extension_of(name: str) -> str:
    if "://" in name:  # zip://a.png::https://host/b.zip?token is an a.png
        name = name.split("::")[0].split("?")[0]
    return os.path.splitext(name)[1].lower()


def _candidates(head: bytes, extension: str) -> Iterator[str]:
    """Formats that a file may be of: by extension and first bytes, by those alone, by the extension alone."""
    named = _extensions().get(extension)
    if not head:
        return
    if named is not None and _accepts(named, head):
        yield named
    others = [format_ for format_ in Image.ID if format_ != named and _accepts(format_, head)]
    if "TIFF" in others and _HINTS.get(extension) is _RAW:
        others.remove("TIFF")  # of which it would be a preview
    yield from (format_ for format_ in others if format_ not in _WEAK)
    if named is not None and Image.OPEN[named][1] is None:
        yield named
    yield from (format_ for format_ in others if format_ in _WEAK)


def format_of(head: bytes, name: str = "") -> str | None:
    """Pillow's name for the format of an image that can be read here, judged by content; None for other files.

    Args:
        head (bytes): the first `HEAD_SIZE` bytes of the file.
        name (str): of the file. Only formats without a signature (TGA and the like), or one as short as two letters,
            need the extension. Raw files of cameras are none by theirs: Pillow would read a small preview.
    Returns:
        str or None: such as "JPEG". The rest of the file may still be damaged.
    """
    extension = _extension_of(name)
    is_named_image = extension in _extensions() or extension in _HINTS or not extension
    for format_ in _candidates(head, extension):
        if format_ not in _NO_PIXELS and (is_named_image or format_ not in _WEAK):
            return format_
    return None


def why_no_image(head: bytes, name: str) -> str | None:
    """Why a file that is none for `format_of` cannot be read, though its name or content is that of an image.

    Args:
        head (bytes): the first `HEAD_SIZE` bytes of the file.
        name (str): of the file.
    Returns:
        str or None: the reason, and what helps; None for files that nobody takes for images, such as texts.
    """
    extension = _extension_of(name)
    named = _extensions().get(extension)
    if not head and (named is not None or extension in _HINTS):
        return "it is empty"
    if head[4:8] == b"ftyp" and b"avi" in head[8:]:
        return _AVIF
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return _HEIF
    if extension in _HINTS and _HINTS[extension] not in (_HEIF, _JXL):
        return _HINTS[extension]
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return _JXL
    for format_ in (*_candidates(head, extension), named):
        if format_ in _NO_PIXELS and (named is not None or format_ not in _WEAK):
            return _NO_PIXELS[format_]
    return "it holds no image that Pillow reads" if named is not None or extension in _HINTS else None


def open_image(content: bytes, name: str = "") -> Image.Image:
    """An image opened by its content, nothing decoded yet: `PIL.Image.open` without what must not be opened.

    Formats with a weak signature are tried under any name: here it is known that the file should be an image.

    Args:
        content (bytes): the whole file.
        name (str): of the file, as in `format_of`.
    Returns:
        PIL.Image.Image: at its first frame.
    Raises:
        PIL.UnidentifiedImageError: if it is no image that is read here.
        ValueError: if it has no pixels, more than Pillow's limit, or is a preview.
    """
    head, damage = content[:HEAD_SIZE], None
    for format_ in _candidates(head, _extension_of(name)):
        if format_ in _NO_PIXELS:
            continue
        try:
            image = Image.OPEN[format_][0](io.BytesIO(content), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # what Pillow's readers raise to decline
            if format_ not in _WEAK:
                damage = damage or f"it is damaged, or no {format_}: {error}"
            continue
        _check_opened(image)
        return image
    reason = "it is empty" if not content else damage or why_no_image(head, name)
    raise UnidentifiedImageError(reason or "it holds no image that Pillow reads")


def _check_opened(image: Image.Image) -> None:
    width, height = image.size
    limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if not 1 <= width * height <= limit:
        raise ValueError(
            f"an image must have from 1 to {limit} pixels, got {width} x {height}. Make it smaller, or raise "
            "`PIL.Image.MAX_IMAGE_PIXELS`, half of Pillow's limit for files that would fill the memory."
        )
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and (_DNG_VERSION in tags or tags.get(_SUBFILE_TYPE, 0) == 1):
        raise ValueError(_RAW)
