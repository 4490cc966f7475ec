"""One image as a square of bytes, without torchvision: decoding, turning upright, resizing, cropping."""

import io

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps


def prepare_image(image: Image.Image, resolution: int, num_channels: int) -> torch.Tensor:
    """A square image as bytes: upright, shorter side resized to `resolution`, centre cropped.

    Halved by box averages while at least twice too large, then bicubic.

    Args:
        image (PIL.Image.Image): any mode with a known range; transparency is dropped.
        resolution (int): side of the result.
        num_channels (int): 1 for grey, 3 for RGB.
    Returns:
        torch.Tensor: uint8, shape (num_channels, resolution, resolution); `/ 127.5 - 1` is what a VAE takes.
    Raises:
        ValueError: if the mode has no fixed range (32-bit images).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"an image must have 8 or 16 bits per channel, got mode {image.mode!r}")
    if image.mode.startswith("I;16"):  # PIL's own conversion clips everything above 255 to white
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert({1: "L", 3: "RGB"}[num_channels])
    while min(image.size) >= 2 * resolution:
        image = image.reduce(2)
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    pixels = np.array(image.crop((left, top, left + resolution, top + resolution)))
    return torch.from_numpy(pixels).reshape(resolution, resolution, num_channels).permute(2, 0, 1).contiguous()


def read_bytes(cell: dict | None) -> bytes:
    """The file of an image: none at all of an empty cell.

    Args:
        cell (dict): of an undecoded image column: `bytes`, or None and a `path` or an address that fsspec opens.
    Returns:
        bytes: its content.
    Raises:
        OSError: if a file cannot be read, missing ones among them. Trouble of a disk or a network is no damage of an
            image, which could be left out for good.
    """
    content, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if content is None and path is not None:
        with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
            content = file.read()
    return content or b""


def read_image(cell: dict | None, resolution: int, num_channels: int) -> tuple[torch.Tensor, None] | tuple[None, str]:
    """What `prepare_image` makes of a cell of an undecoded image column, or the reason why it cannot be read.

    Args:
        cell (dict): as in `read_bytes`.
        resolution, num_channels (int): as in `prepare_image`.
    Returns:
        tuple: pixels and None, or None and the error in words: the caller decides what a damaged image means.
    Raises:
        OSError: if a file cannot be read at all, missing ones among them.
    """
    content = read_bytes(cell)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return prepare_image(image, resolution, num_channels), None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises whatever the parser of its format stumbles over
        return None, f"{type(error).__name__}: {error}"
