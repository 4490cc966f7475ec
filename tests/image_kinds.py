"""Image files of many kinds, and what a person sees in each: `python tests/image_kinds.py` reads them all.

Formats x modes x depths x EXIF x ICC x alpha x damage. What a file shows is an array from `image_files`, by closed
forms; a file that shows nothing must be refused, in one line that says why.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from image_files import (
    ADOBE,
    ALPHA,
    COLOURS,
    D50,
    D65,
    DEEP,
    GREY,
    P3,
    PROPHOTO,
    REC2020,
    SIDE,
    SRGB,
    SWAPPED,
    X,
    Y,
    bmp_with_alpha,
    cmyk_profile,
    eight_bits,
    exif,
    fits,
    grey_profile,
    iccp,
    light_of_lightness,
    on_ground,
    png,
    pnm,
    psd,
    rgb_profile,
    saved,
    srgb_encoded,
    through_profile,
    tiff,
    turned,
    xbm,
)
from PIL import Image


RGBA, LA = np.dstack([COLOURS, ALPHA]), np.dstack([GREY, ALPHA])
CMYK = np.dstack([COLOURS, 255 - ALPHA // 2])
# The formula of uncalibrated inks: (1 - C)(1 - K).
INKS = np.rint((255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255)
BITS = (X + Y) % 2 * 255


class Kind(NamedTuple):
    """A file, and what it shows: an array (H, W) or (H, W, 3) of levels; or None, and a part of the reason."""

    name: str
    content: bytes
    shown: np.ndarray | None
    tolerance: float = 0
    reason: str = ""
    background: str = "white"
    what: str = ""


def formats() -> Iterator[Kind]:
    """The same colours in each format that Pillow writes, and in some by hand."""
    palette = Image.fromarray(COLOURS).quantize(256)
    exact = np.asarray(palette.convert("RGB"))
    yield Kind("a.png", saved(COLOURS, "PNG"), COLOURS)
    yield Kind("a.bmp", saved(COLOURS, "BMP"), COLOURS)
    yield Kind("a.dib", saved(COLOURS, "DIB"), COLOURS)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd"):
        yield Kind("a.tif", saved(COLOURS, "TIFF", compression=compression), COLOURS, what=compression)
    yield Kind("a.tiff", saved(COLOURS, "TIFF", big_tiff=True), COLOURS, what="BigTIFF")
    yield Kind("a.webp", saved(COLOURS, "WEBP", lossless=True), COLOURS, what="lossless")
    yield Kind("a.webp", saved(COLOURS, "WEBP", quality=95), COLOURS, 12, what="lossy")
    yield Kind("a.gif", saved(palette, "GIF"), exact)
    yield Kind("a.tga", saved(COLOURS, "TGA"), COLOURS)
    yield Kind("a.tga", saved(COLOURS, "TGA", compression="tga_rle"), COLOURS, what="run lengths")
    yield Kind("a.ppm", saved(COLOURS, "PPM"), COLOURS)
    yield Kind("a.pcx", saved(COLOURS, "PCX"), COLOURS)
    yield Kind("a.sgi", saved(COLOURS, "SGI"), COLOURS)
    yield Kind("a.jp2", saved(COLOURS, "JPEG2000"), COLOURS)
    yield Kind("a.j2k", saved(COLOURS, "JPEG2000", no_jp2=True), COLOURS)
    yield Kind("a.qoi", saved(COLOURS, "QOI"), COLOURS)
    yield Kind("a.ico", saved(COLOURS, "ICO", sizes=[(SIDE, SIDE)]), COLOURS)
    yield Kind("a.dds", saved(COLOURS, "DDS"), COLOURS)
    yield Kind("a.avif", saved(COLOURS, "AVIF", quality=100, subsampling="4:4:4"), COLOURS, 3)
    yield Kind("a.jpg", saved(COLOURS, "JPEG", quality=98, subsampling=0), COLOURS, 4)
    yield Kind("a.jpg", saved(COLOURS, "JPEG", quality=98, progressive=True), COLOURS, 14, what="progressive, 4:2:0")
    yield Kind("a.psd", psd(COLOURS), COLOURS)
    yield Kind("a.fits", fits(GREY), GREY)
    yield Kind("a.xbm", xbm(BITS), 255 - BITS)
    yield Kind("a.msp", saved(BITS.astype(np.uint8), "MSP", "1"), BITS)
    # Several frames: the first.
    later = [Image.fromarray(255 - COLOURS)]
    for name, format_ in (("a.png", "PNG"), ("a.tif", "TIFF"), ("a.webp", "WEBP")):
        options = {"lossless": True} if format_ == "WEBP" else {}
        content = saved(COLOURS, format_, save_all=True, append_images=later, **options)
        yield Kind(name, content, COLOURS, what="2 frames")
    yield Kind("a.gif", saved(palette, "GIF", save_all=True, append_images=later), exact, what="2 frames")
    yield Kind("a.mpo", saved(COLOURS, "MPO", save_all=True, append_images=later, quality=98), COLOURS, 14)
    # The content decides, not the name.
    yield Kind("a.png", saved(COLOURS, "JPEG", quality=98, subsampling=0), COLOURS, 4, what="a JPEG")
    yield Kind("a.jpg", saved(COLOURS, "PNG"), COLOURS, what="a PNG")
    yield Kind("a.tga", saved(COLOURS, "PNG"), COLOURS, what="a PNG")
    yield Kind("a.heic", saved(COLOURS, "PNG"), COLOURS, what="a PNG")
    yield Kind("a.dng", saved(COLOURS, "PNG"), COLOURS, what="a PNG")
    yield Kind("a.image", saved(COLOURS, "BMP"), COLOURS, what="a BMP")
    yield Kind("zip://a.ppm::https://host/b.zip?token=1", saved(COLOURS, "PPM"), COLOURS)
    yield Kind("a.JPG", saved(COLOURS, "WEBP", lossless=True), COLOURS, what="a WebP")
    yield Kind("a", saved(COLOURS, "BMP"), COLOURS, what="no extension")
    yield Kind("a.dat", saved(palette, "GIF"), exact, what="an unknown extension")
    yield Kind("a.b::c é.PNG", saved(COLOURS, "PNG"), COLOURS)


def modes_of_png() -> Iterator[Kind]:
    """Every colour type and depth of PNG, with and without a transparent colour."""
    palette = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
    opaque = np.full((SIDE, SIDE), 255)
    for bits in (1, 2, 4, 8):
        values, scale = (GREY >> (8 - bits)).astype(int), 255 // (2**bits - 1)
        yield Kind("a.png", png(values, bits, 0), values * scale, what=f"grey {bits}")
        key = int(values[5, 5])
        holes = np.where(values == key, 0, opaque)
        content = png(values, bits, 0, tRNS=key.to_bytes(2, "big"))
        yield Kind("a.png", content, on_ground(values * scale, holes), what=f"grey {bits}, transparent colour")
        colours = palette[values]
        yield Kind("a.png", png(values, bits, 3, PLTE=palette[: 2**bits].tobytes()), colours, what=f"palette {bits}")
        content = png(values, bits, 3, PLTE=palette[: 2**bits].tobytes(), tRNS=b"\xff" * key + b"\0")
        yield Kind("a.png", content, on_ground(colours, holes), what=f"palette {bits}, transparent index")
        alphas = np.linspace(10, 240, 2**bits).astype(np.uint8)
        content = png(values, bits, 3, PLTE=palette[: 2**bits].tobytes(), tRNS=alphas.tobytes())
        yield Kind("a.png", content, on_ground(colours, alphas[values]), 1, what=f"palette {bits}, alphas")
    yield Kind("a.png", png(DEEP, 16, 0), eight_bits(DEEP), what="grey 16")
    key = int(DEEP[5, 5])
    content = png(DEEP, 16, 0, tRNS=key.to_bytes(2, "big"))
    yield Kind("a.png", content, on_ground(eight_bits(DEEP), np.where(DEEP == key, 0, opaque)), what="grey 16, key")
    deep = np.dstack([DEEP, DEEP.T, 65535 - DEEP])
    yield Kind("a.png", png(deep, 16, 2), eight_bits(deep), 1, what="RGB 16")
    content = png(deep, 16, 2, tRNS=deep[5, 5].astype(">u2").tobytes())
    holes = np.where((deep == deep[5, 5]).all(-1), 0, opaque)
    yield Kind("a.png", content, on_ground(eight_bits(deep), holes), 1, what="RGB 16, transparent colour")
    content = png(COLOURS, 8, 2, tRNS=COLOURS[5, 5].astype(">u2").tobytes())
    holes = np.where((COLOURS == COLOURS[5, 5]).all(-1), 0, opaque)
    yield Kind("a.png", content, on_ground(COLOURS, holes), what="RGB 8, transparent colour")
    yield Kind("a.png", png(LA, 8, 4), on_ground(GREY, ALPHA), 1, what="grey 8 and alpha")
    yield Kind("a.png", png(LA.astype(np.uint16) * 257, 16, 4), on_ground(GREY, ALPHA), 1, what="grey 16 and alpha")
    yield Kind("a.png", png(RGBA.astype(np.uint16) * 257, 16, 6), on_ground(COLOURS, ALPHA), 1, what="RGBA 16")


def modes_of_tiff() -> Iterator[Kind]:
    """Every photometric interpretation and depth that Pillow takes, and those that have no range."""
    bits, deep = np.packbits(BITS > 0, axis=1).tobytes(), DEEP.astype("<u2").tobytes()
    yield Kind("a.tif", tiff(bits, (1,), 1), BITS, what="1")
    yield Kind("a.tif", tiff(bits, (1,), 0), 255 - BITS, what="1, white is 0")
    four = (GREY >> 4).astype(np.uint8)
    yield Kind("a.tif", tiff((four[:, ::2] << 4 | four[:, 1::2]).tobytes(), (4,), 1), four * 17, what="grey 4")
    yield Kind("a.tif", tiff(GREY.tobytes(), (8,), 0), 255 - GREY, what="grey 8, white is 0")
    yield Kind("a.tif", tiff(deep, (16,), 1), eight_bits(DEEP), what="grey 16")
    yield Kind("a.tif", tiff(DEEP.astype(">u2").tobytes(), (16,), 1, endian=">"), eight_bits(DEEP), what="grey 16 MM")
    yield Kind("a.tif", tiff(deep, (16,), 0), eight_bits(65535 - DEEP), what="grey 16, white is 0")
    twelve = (DEEP >> 4).reshape(-1, 2)
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], -1)
    yield Kind("a.tif", tiff(packed.astype(np.uint8).tobytes(), (12,), 1), eight_bits(DEEP >> 4, 4095), what="grey 12")
    alpha = {"straight": 2, "premultiplied": 1, "unused": 0}
    lit = np.rint(RGBA[..., :3] * (ALPHA[..., None] / 255)).astype(np.uint8)
    grey_lit = np.rint(GREY * (ALPHA / 255)).astype(np.uint8)
    for name, extra in alpha.items():
        colours, grey = (lit, grey_lit) if name == "premultiplied" else (COLOURS, GREY)
        seen, grey_seen = (COLOURS, GREY) if name == "unused" else (on_ground(COLOURS, ALPHA), on_ground(GREY, ALPHA))
        samples = np.dstack([colours, ALPHA]).tobytes()
        yield Kind("a.tif", tiff(samples, (8,) * 4, 2, extra=extra), seen, 1, what=f"RGB, alpha {name}")
        samples = (np.dstack([colours, ALPHA]).astype("<u2") * 257).tobytes()
        yield Kind("a.tif", tiff(samples, (16,) * 4, 2, extra=extra), seen, 1, what=f"RGB 16, alpha {name}")
        samples = np.dstack([grey, ALPHA]).tobytes()
        yield Kind("a.tif", tiff(samples, (8, 8), 1, extra=extra), grey_seen, 1, what=f"grey, alpha {name}")
    palette = np.random.default_rng(1).integers(0, 256, (256, 3))
    table = tuple((palette.T * 257).ravel().tolist())
    yield Kind("a.tif", tiff(GREY.tobytes(), (8,), 3, palette=table), palette[GREY], what="palette")
    content = tiff(LA.tobytes(), (8, 8), 3, palette=table, extra=2)
    yield Kind("a.tif", content, on_ground(palette[GREY], ALPHA), 1, what="palette and alpha")
    yield Kind("a.tif", tiff(CMYK.tobytes(), (8,) * 4, 5), INKS, 1, what="CMYK")
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    blue, red = 128 + (COLOURS[..., 2] - luma) / 1.772, 128 + (COLOURS[..., 0] - luma) / 1.402
    samples = np.rint(np.dstack([luma, blue, red])).astype(np.uint8).tobytes()
    yield Kind("a.tif", tiff(samples, (8,) * 3, 6), COLOURS, 3, what="YCbCr")
    lab = np.dstack([GREY, np.zeros_like(GREY), np.zeros_like(GREY)]).tobytes()
    seen = srgb_encoded(light_of_lightness(GREY / 2.55))
    yield Kind("a.tif", tiff(lab, (8,) * 3, 8), seen, 3, what="L*a*b*")
    content = tiff(lab, (8,) * 3, 8, profile=rgb_profile(PROPHOTO, 1.8))
    yield Kind("a.tif", content, seen, 3, what="L*a*b*, profile of colours")
    for kind, number, depth in (("<i4", 2, 32), ("<u4", 1, 32), ("<f4", 3, 32), ("<i2", 2, 16)):
        content = tiff((DEEP >> 1).astype(kind).tobytes(), (depth,), 1, sample_format=number)
        yield Kind("a.tif", content, None, reason="no fixed range", what=f"numbers {kind}")
    yield Kind("a.tif", tiff(COLOURS.tobytes(), (8,) * 3, 2, subfile=1), None, reason="raw file", what="a preview")
    yield Kind("a.tif", tiff(COLOURS.tobytes(), (8,) * 3, 2, dng=1), None, reason="raw file", what="a DNG")
    yield Kind("a.nef", tiff(COLOURS.tobytes(), (8,) * 3, 2), None, reason="raw file")


def modes_of_others() -> Iterator[Kind]:
    """Grey, palettes, alpha, inks and depths of the other formats."""
    seen = on_ground(COLOURS, ALPHA)
    for name, format_ in (("a.tga", "TGA"), ("a.sgi", "SGI"), ("a.ico", "ICO"), ("a.qoi", "QOI"), ("a.dds", "DDS")):
        options = {"sizes": [(SIDE, SIDE)]} if format_ == "ICO" else {}
        yield Kind(name, saved(RGBA, format_, **options), seen, what="alpha")
    yield Kind("a.bmp", bmp_with_alpha(RGBA), seen, what="alpha")
    yield Kind("a.bmp", saved(RGBA, "BMP"), COLOURS, what="32 bits, no alpha")
    yield Kind("a.jp2", saved(RGBA, "JPEG2000"), seen, what="alpha")
    yield Kind("a.psd", psd(RGBA), seen, what="alpha")
    yield Kind("a.webp", saved(RGBA, "WEBP", lossless=True, exact=True), seen, what="alpha")
    yield Kind("a.avif", saved(RGBA, "AVIF", quality=100, subsampling="4:4:4"), seen, 4, what="alpha")
    for name, format_ in (("a.bmp", "BMP"), ("a.tga", "TGA"), ("a.pcx", "PCX"), ("a.sgi", "SGI"), ("a.gif", "GIF")):
        yield Kind(name, saved(GREY, format_), GREY, what="grey")
    yield Kind("a.bmp", saved(BITS.astype(np.uint8), "BMP", "1"), BITS, what="1")
    palette = Image.fromarray(COLOURS).quantize(200)
    exact = np.asarray(palette.convert("RGB"))
    for name, format_ in (("a.bmp", "BMP"), ("a.tga", "TGA"), ("a.pcx", "PCX"), ("a.tif", "TIFF")):
        yield Kind(name, saved(palette, format_), exact, what="palette")
    index = int(np.asarray(palette)[5, 5])
    holes = np.where(np.asarray(palette) == index, 0, 255)
    content = saved(palette, "GIF", transparency=index, optimize=False)
    yield Kind("a.gif", content, on_ground(exact, holes), what="transparent index")
    key = int(GREY[5, 5])
    shown = on_ground(GREY, np.where(GREY == key, 0, 255))
    yield Kind("a.gif", saved(GREY, "GIF", transparency=key, optimize=False), shown, what="grey, transparent index")
    yield Kind("a.jp2", saved(Image.fromarray(DEEP), "JPEG2000"), eight_bits(DEEP), what="grey 16")
    yield Kind("a.jpg", saved(GREY, "JPEG", quality=98), GREY, 3, what="grey")
    inks = Image.fromarray(CMYK, "CMYK")
    # Adobe's programs, and Pillow, write inks inverted and say so by a marker.
    yield Kind("a.jpg", saved(inks, "JPEG", quality=98, subsampling=0), INKS, 5, what="CMYK")
    small = (GREY >> 4).astype(int)
    yield Kind("a.pbm", pnm("P1", BITS // 255, None), 255 - BITS)
    yield Kind("a.pgm", pnm("P2", small, 15), small * 17, what="text, largest 15")
    yield Kind("a.pgm", pnm("P2", DEEP, 65535), eight_bits(DEEP), what="text, 16 bits")
    yield Kind("a.ppm", pnm("P3", COLOURS), COLOURS, what="text")
    yield Kind("a.pbm", pnm("P4", BITS // 255, None), 255 - BITS, what="binary")
    yield Kind("a.pgm", pnm("P5", GREY), GREY)
    yield Kind("a.pgm", pnm("P5", DEEP, 65535), eight_bits(DEEP), what="16 bits")
    yield Kind("a.pgm", pnm("P5", DEEP >> 6, 1023), eight_bits(DEEP >> 6, 1023), what="largest 1023")
    yield Kind("a.pnm", pnm("P6", COLOURS), COLOURS)
    floats = b"Pf\n16 16\n-1.0\n" + GREY.astype("<f4").tobytes()
    yield Kind("a.pfm", floats, None, reason="no fixed range")


def exif_notes() -> Iterator[Kind]:
    for orientation in range(1, 9):
        shown, what = turned(COLOURS, orientation), f"orientation {orientation}"
        note = exif(orientation)
        yield Kind("a.png", saved(COLOURS, "PNG", exif=note), shown, what=what)
        yield Kind("a.jpg", saved(COLOURS, "JPEG", quality=98, subsampling=0, exif=note), shown, 4, what=what)
        yield Kind("a.webp", saved(COLOURS, "WEBP", lossless=True, exif=note), shown, what=what)
        yield Kind("a.tif", tiff(COLOURS.tobytes(), (8,) * 3, 2, orientation=orientation), shown, what=what)
        content = saved(COLOURS, "AVIF", quality=100, subsampling="4:4:4", exif=note)
        yield Kind("a.avif", content, shown, 3, what=what)
    deep = png(DEEP, 16, 0, eXIf=exif(6)[6:])
    yield Kind("a.png", deep, turned(eight_bits(DEEP), 6), what="orientation 6, grey 16")
    yield Kind("a.png", png(RGBA, 8, 6, eXIf=exif(8)[6:]), turned(on_ground(COLOURS, ALPHA), 8), what="8, alpha")
    content = tiff(DEEP.astype(">u2").tobytes(), (16,), 1, endian=">", orientation=6)
    yield Kind("a.tif", content, turned(eight_bits(DEEP), 6), what="orientation 6, grey 16 MM")
    for orientation in (0, 9, 77, 65535):
        yield Kind("a.png", saved(COLOURS, "PNG", exif=exif(orientation)), COLOURS, what=f"orientation {orientation}")
    damaged = {"without entries": exif(6)[:14] + b"\0\xff", "nonsense": b"Exif\0\0nonsense", "cut": exif(6)[:20]}
    for name, note in damaged.items():
        yield Kind("a.png", png(COLOURS, 8, 2, eXIf=note[6:]), COLOURS, what=f"EXIF {name}")
        content = saved(COLOURS, "JPEG", quality=98, subsampling=0, exif=note)
        yield Kind("a.jpg", content, COLOURS, 4, what=f"EXIF {name}")


def profiles() -> Iterator[Kind]:
    """Tolerances: 2 levels for the curves of 8 bits, more where a format is lossy."""
    spaces = {
        "Display P3": (P3, None, D65),
        "Adobe RGB": (ADOBE, 563 / 256, D65),
        "ProPhoto": (PROPHOTO, 461 / 256, D50),
        "Rec. 2020": (REC2020, 2.25, D65),
        "linear light": (SRGB, 1.0, D65),
        "swapped primaries": (SWAPPED, None, D65),
    }
    for name, space in spaces.items():
        profile, seen = rgb_profile(*space), through_profile(COLOURS, *space)
        yield Kind("a.png", png(COLOURS, 8, 2, iCCP=iccp(profile)), seen, 2, what=name)
        content = saved(COLOURS, "JPEG", quality=100, subsampling=0, icc_profile=profile)
        yield Kind("a.jpg", content, seen, 12 if name == "linear light" else 9, what=name)
        yield Kind("a.tif", tiff(COLOURS.tobytes(), (8,) * 3, 2, profile=profile), seen, 2, what=name)
        yield Kind("a.webp", saved(COLOURS, "WEBP", lossless=True, icc_profile=profile), seen, 2, what=name)
    space = spaces["swapped primaries"]
    profile, seen = rgb_profile(*space), through_profile(COLOURS, *space)
    content = saved(COLOURS, "AVIF", quality=100, subsampling="4:4:4", icc_profile=profile)
    yield Kind("a.avif", content, seen, 8, what="swapped primaries")
    yield Kind("a.png", png(RGBA, 8, 6, iCCP=iccp(profile)), on_ground(seen, ALPHA), 3, what="profile and alpha")
    content = png(RGBA, 8, 6, iCCP=iccp(profile))
    shown = on_ground(seen, ALPHA, "#2040ff")
    yield Kind("a.png", content, shown, 3, background="#2040ff", what="profile and alpha on a colour")
    content = png(COLOURS, 8, 2, iCCP=iccp(profile), eXIf=exif(6)[6:])
    yield Kind("a.png", content, turned(seen, 6), 2, what="profile and orientation")
    palette = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
    content = png(GREY, 8, 3, PLTE=palette.tobytes(), iCCP=iccp(profile))
    yield Kind("a.png", content, through_profile(palette[GREY], *space), 2, what="profile and palette")
    # A curve in 20 points is that of sRGB but for roundings: its conversion would change some pixels by a level.
    for entries in (1024, 20):
        content = png(COLOURS, 8, 2, iCCP=iccp(rgb_profile(SRGB, None, entries=entries)))
        yield Kind("a.png", content, COLOURS, what=f"sRGB in {entries} points, bit for bit")
    for gamma in (1.0, 1.8):
        profile, seen = iccp(grey_profile(gamma)), srgb_encoded((GREY / 255) ** round(gamma * 256 / 256, 9))
        yield Kind("a.png", png(GREY, 8, 0, iCCP=profile), seen, 2, what=f"grey of gamma {gamma}")
        yield Kind("a.png", png(LA, 8, 4, iCCP=profile), on_ground(seen, ALPHA), 3, what=f"gamma {gamma}, alpha")
        deep = srgb_encoded((DEEP / 65535) ** gamma)
        # Between the levels of 8 bits the curve is a chord: up to 6 levels off in the darkest of linear light.
        yield Kind("a.png", png(DEEP, 16, 0, iCCP=profile), deep, 6, what=f"grey 16 of gamma {gamma}")
    inks = Image.fromarray(CMYK, "CMYK")
    seen = srgb_encoded(light_of_lightness(100 * (1 - CMYK[..., 3] / 255)))
    yield Kind("a.tif", tiff(CMYK.tobytes(), (8,) * 4, 5, profile=cmyk_profile()), seen, 3, what="CMYK profile")
    content = saved(inks, "JPEG", quality=98, subsampling=0, icc_profile=cmyk_profile())
    yield Kind("a.jpg", content, seen, 6, what="CMYK profile")
    whole = rgb_profile(*space)
    wrong = {
        "cut": whole[:300],
        "nonsense": b"no profile" * 30,
        "of inks": cmyk_profile(),
        "of grey": grey_profile(1.0),
    }
    for name, profile in wrong.items():
        yield Kind("a.png", png(COLOURS, 8, 2, iCCP=iccp(profile)), COLOURS, what=f"profile {name}")
    yield Kind("a.png", png(GREY, 8, 0, iCCP=iccp(whole)), GREY, what="profile of colours")


def grounds() -> Iterator[Kind]:
    glyph = np.dstack([np.zeros((SIDE, SIDE, 3)), BITS]).astype(np.uint8)  # black on nothing
    for ground in ("white", "black", "#2040ff"):
        for what, values in (("RGBA", RGBA), ("a glyph", glyph)):
            shown = on_ground(values[..., :3], values[..., 3], ground)
            yield Kind("a.png", png(values, 8, 6), shown, background=ground, what=f"{what} on {ground}")
        yield Kind("a.png", png(LA, 8, 4), on_ground(GREY, ALPHA, ground), 0, "", ground, f"grey on {ground}")


def sizes() -> Iterator[Kind]:
    """Strips show their middle; of slopes, bicubic interpolation and averages make slopes again."""
    for length in (300, 3000, 60000):
        slope = np.rint(np.arange(length) * (255 / (length - 1))).astype(np.uint8)
        middle = np.full((SIDE, SIDE), 127.5)
        yield Kind("a.png", png(slope[None], 8, 0), middle, 1, what=f"{length} x 1")
        yield Kind("a.png", png(slope[:, None], 8, 0), middle, 1, what=f"1 x {length}")
    yield Kind(
        "a.png", png(np.full((1, 1, 3), (7, 80, 200)), 8, 2), np.full((SIDE, SIDE, 3), (7, 80, 200)), what="1 x 1"
    )
    for factor in (2, 4):
        content = png(COLOURS.repeat(factor, 0).repeat(factor, 1), 8, 2)
        yield Kind("a.png", content, COLOURS, what=f"{factor} times too large")
    wide = np.concatenate([255 - COLOURS, COLOURS, 255 - COLOURS], 1)
    yield Kind("a.png", png(wide, 8, 2), COLOURS, what="wide")
    bomb = png(COLOURS, 8, 2, size=(30000, 30000))
    yield Kind("a.png", bomb, None, reason="30000 x 30000", what="a decompression bomb")
    yield Kind("a.png", png(COLOURS, 8, 2, size=(0, 16)), None, what="no pixels")


def damage() -> Iterator[Kind]:
    whole = {
        name: saved(COLOURS, format_)
        for name, format_ in {
            "a.png": "PNG",
            "a.jpg": "JPEG",
            "a.bmp": "BMP",
            "a.tif": "TIFF",
            "a.webp": "WEBP",
            "a.avif": "AVIF",
            "a.jp2": "JPEG2000",
            "a.ppm": "PPM",
            "a.tga": "TGA",
            "a.gif": "GIF",
            "a.sgi": "SGI",
            "a.ico": "ICO",
            "a.qoi": "QOI",
            "a.dds": "DDS",
        }.items()
    }
    for name, content in whole.items():
        yield Kind(name, content[: len(content) * 6 // 10], None, what="cut off")
    for name in ("a.png", "a.jpg", "a.tga", "a"):
        yield Kind(name, b"", None, reason="empty", what="empty")
        yield Kind(name, bytes(2000), None, reason="no image", what="zeros")
        yield Kind(name, b"These are words.\n" * 40, None, reason="no image", what="text")
        yield Kind(name, np.random.default_rng(7).bytes(3000), None, reason="no image", what="noise")
    yield Kind("a.jpg", b"<!DOCTYPE html><html>404</html>", None, reason="no image", what="a web page")
    yield Kind(
        "a.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None, reason="no image", what="LFS"
    )
    yield Kind("a.png", png(COLOURS, 8, 2, damage="header"), None, reason="IHDR", what="a flipped header")
    yield Kind("a.png", png(COLOURS, 8, 2, damage="data"), None, what="flipped data")
    yield Kind("a.jpg", b"\xff\xd8\xff" + bytes(500), None, what="a signature alone")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    hint = "damaged" if "HEIF" in Image.OPEN else "pillow-heif"
    yield Kind("a.heic", heic, None, reason=hint)
    yield Kind("a.jpg", heic, None, reason=hint, what="a HEIC")
    yield Kind(
        "a.heic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100), None, reason=hint, what="by another brand"
    )
    yield Kind("a.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), None, reason="jxl")
    yield Kind("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", None, reason="drawing")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    for name in ("a.eps", "a.png", "a"):
        yield Kind(name, program, None, reason="PostScript", what="a program")
    yield Kind("a.wmf", b"\xd7\xcd\xc6\x9a\0\0" + bytes(100), None, reason="drawing")
    yield Kind("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), None, reason="arrays")
    yield Kind("a.mpg", b"\0\0\x01\xb3" + bytes(100), None, reason="video")


MAKERS = (formats, modes_of_png, modes_of_tiff, modes_of_others, exif_notes, profiles, grounds, sizes, damage)


def outcome_of(kind: Kind, read: Callable) -> str:
    """What `read(cell, resolution, num_channels, background)` makes of a kind, in colour and in grey.

    "read right" or "refused with a reason"; else "unclear: …" of a refusal that does not say why, or "wrong: …".
    """
    for num_channels in (3, 1):
        pixels, reason = read({"bytes": kind.content, "path": kind.name}, SIDE, num_channels, kind.background)
        if pixels is None:
            if kind.shown is not None:
                return f"wrong: refused, {reason}"
            if kind.reason.lower() not in reason.lower() or "\n" in reason or "0x" in reason:
                return f"unclear: {kind.reason!r} expected, got {reason!r}"
            continue
        if kind.shown is None:
            return "wrong: read, though it shows nothing"
        shown = np.broadcast_to(kind.shown if kind.shown.ndim == 3 else kind.shown[..., None], (SIDE, SIDE, 3))
        tolerance = kind.tolerance
        if num_channels == 1:
            shown, tolerance = shown @ np.array([[0.299], [0.587], [0.114]]), tolerance + 0.501
        error = np.abs(np.asarray(pixels).transpose(1, 2, 0).astype(float) - shown).max()
        if error > tolerance:
            return f"wrong: up to {error:.1f} levels off"
    return "refused with a reason" if pixels is None else "read right"


if __name__ == "__main__":
    from diffusers_mp.data.pixels import read_image

    counts = Counter()
    for maker in MAKERS:
        for kind in maker():
            outcome = outcome_of(kind, read_image)
            counts[outcome.split(":")[0]] += 1
            print(f"{kind.name:15} {kind.what:32} {outcome}")
    print(", ".join(f"{outcome}: {count}" for outcome, count in sorted(counts.items())), f"of {counts.total()} kinds")
