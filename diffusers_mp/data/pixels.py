"""One image as a square of bytes, as a person sees it: upright, in sRGB, on a ground; resized, cropped."""

import functools
import io

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageColor

from .formats import open_image


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow leaves of the first sample for the colour that a PNG calls transparent, by the bits of its samples.
_KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
_PHOTOMETRIC = 262  # tag of TIFF; 0 says that white is 0


def prepare_image(image: Image.Image, resolution: int, num_channels: int, background: str = "white") -> torch.Tensor:
    """A square image as bytes: as a person sees it, shorter side resized to `resolution`, centre cropped.

    Turned upright as EXIF says, brought to sRGB by its ICC profile, laid on `background` where it is transparent.
    Halved by box averages while at least twice too large, then bicubic.

    Args:
        image (PIL.Image.Image): any mode with a known range; of several frames the first.
        resolution (int): side of the result.
        num_channels (int): 1 for grey, 3 for RGB.
        background (str): colour of the ground, as `PIL.ImageColor` names it.
    Returns:
        torch.Tensor: uint8, shape (num_channels, resolution, resolution); `/ 127.5 - 1` is what a VAE takes.
    Raises:
        ValueError: if the mode has no fixed range (32-bit images), or the background is no colour.
    """
    image = _as_seen(image, ground_of(background)).convert({1: "L", 3: "RGB"}[num_channels])
    while min(image.size) >= 2 * resolution:
        image = image.reduce(2)
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    # Only the part that is kept is made: the whole of a strip of 1 x 3000 pixels would take gigabytes.
    x, y = image.size[0] / width, image.size[1] / height
    box = (left * x, top * y, min((left + resolution) * x, image.size[0]), min((top + resolution) * y, image.size[1]))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    pixels = np.array(image).reshape(resolution, resolution, num_channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def ground_of(background: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour as `PIL.ImageColor` names it.

    Raises:
        ValueError: if it is none, or is transparent itself.
    """
    try:
        red, green, blue = ImageColor.getrgb(background)
    except ValueError:
        raise ValueError(
            f"`background` must be a colour such as white, gray or #ff8800, got {background!r}."
        ) from None
    return red, green, blue


def _as_seen(image: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    """The first frame, upright, opaque, of mode L or RGB in sRGB."""
    rawmode = _rawmode(image)
    image.load()
    # L*a*b* is no colour of a device; a profile beside it is of what it was converted from.
    profile, key = None if image.mode == "LAB" else image.info.get("icc_profile"), image.info.get("transparency")
    if image.format == "XBM":  # Pillow shows its black as white
        image = ImageChops.invert(image.convert("L"))
    if rawmode in _KEY_SCALES and key is not None:
        scale = _KEY_SCALES[rawmode]
        image.info["transparency"] = tuple(int(v * scale) for v in key) if isinstance(key, tuple) else int(key * scale)
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image, alpha = _deep_grey(image, rawmode, key, profile)
    else:
        image, alpha = _colours_and_alpha(image)
        image = _to_srgb(image, profile)
    if alpha is not None and alpha.getextrema() != (255, 255):
        image = Image.composite(image.convert("RGB"), Image.new("RGB", image.size, ground), alpha)
    return image


def _rawmode(image: Image.Image) -> str | None:
    """How samples lie in the file, which the mode alone does not tell; known until they are decoded."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else None
    return args[0] if isinstance(args, tuple) and args else args


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever the parser of damaged notes stumbles over: they are no pixels
        orientation = None
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _deep_grey(image: Image.Image, rawmode, key, profile) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 16 bits as 8, and its alpha. Pillow's conversion would clip everything above 255 to white."""
    if image.mode == "F" or image.mode == "I" and image.format not in ("PPM", "PNG"):
        raise ValueError(
            f"an image must have 8 or 16 bits per channel, got mode {image.mode!r}: its values have no fixed range. "
            "Save it with 8 or 16 bits."
        )
    values = np.asarray(image)
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    largest = 4095 if rawmode == "I;12" else 65535
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        values = largest - values
    # From 16 bits, not from 8: a profile of linear light spreads the dark ones apart.
    levels = np.array(_to_srgb(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), profile).convert("L"))[0]
    if profile is None or np.array_equal(levels, np.arange(256)):
        grey = (values.astype(np.uint32) * 255 + largest // 2) // largest
    else:
        grey = np.interp(values, np.linspace(0, largest, 256), levels).round()
    return Image.fromarray(grey.astype(np.uint8)), alpha


def _colours_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours, of mode L, RGB or CMYK, and the alpha if the image has any."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    is_grey, alpha = image.mode in ("1", "L", "LA"), None
    if image.has_transparency_data:
        image = image.convert("LA" if is_grey else "RGBA")
        alpha = image.getchannel("A")
    return image.convert("L" if is_grey else "CMYK" if image.mode == "CMYK" else "RGB"), alpha


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = None if profile is None else _transform_to_srgb(profile, image.mode)
    if transform is not None:
        return ImageCms.applyTransform(image, transform)
    return image.convert("RGB") if image.mode == "CMYK" else image


@functools.lru_cache(maxsize=32)  # images of one camera or program share their profile
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if it changes nothing, is damaged, or is of other colours."""
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        # Grey is optimised to a table too coarse for its dark levels: up to 10 off for a profile of linear light.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, target, mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    # Profiles of sRGB itself differ by roundings: such images stay as they are, bit for bit.
    levels = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
    colours = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform), dtype=int)
    unchanged = colours[..., None] if mode == "L" else colours
    return None if np.abs(changed - unchanged).max() <= 1 else transform


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


def read_image(
    cell: dict | None, resolution: int, num_channels: int, background: str = "white"
) -> tuple[torch.Tensor, None] | tuple[None, str]:
    """What `prepare_image` makes of a cell of an undecoded image column, or the reason why it cannot be read.

    Args:
        cell (dict): as in `read_bytes`; with `bytes`, the `path` still says what a file without a signature is.
        resolution, num_channels, background: as in `prepare_image`.
    Returns:
        tuple: pixels and None, or None and the reason in a line: the caller decides what a damaged image means.
    Raises:
        OSError: if a file cannot be read at all, missing ones among them.
        MemoryError: if the image does not fit, which is no damage either; it names the file.
        ValueError: if the background is no colour.
    """
    ground_of(background)  # no fault of the image
    content, name = read_bytes(cell), (cell or {}).get("path") or ""
    try:
        with open_image(content, name) as image:
            return prepare_image(image, resolution, num_channels, background), None
    except MemoryError as error:
        raise MemoryError(f"Not enough memory for {name or 'an image'}, a file of {len(content)} bytes.") from error
    except Exception as error:  # a damaged file raises whatever the parser of its format stumbles over
        return None, " ".join(f"{type(error).__name__}: {error}".split())
