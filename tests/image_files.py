"""Image files byte by byte, where Pillow cannot write them, and closed forms of what they show.

Nothing here comes from `diffusers_mp`: expected values are those of the standards.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image


SIDE = 16
Y, X = np.mgrid[:SIDE, :SIDE]
# Smooth, for lossy formats, and different after each turn.
COLOURS = np.stack([15 * X + 10, 12 * Y + 30, 240 - 7 * X - 6 * Y], -1).astype(np.uint8)
GREY = (15 * X + 2 * Y).astype(np.uint8)
ALPHA = (255 - 16 * Y - X).astype(np.uint8)  # all 256 values
DEEP = (4096 * Y + 257 * X).astype(np.uint16)
GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "#2040ff": (32, 64, 255)}


# Closed forms


def on_ground(colours: np.ndarray, alpha: np.ndarray, ground: str = "white") -> np.ndarray:
    """alpha * colours + (1 - alpha) * ground, rounded."""
    colours = np.broadcast_to(colours if colours.ndim == 3 else colours[..., None], (*alpha.shape, 3))
    share = alpha[..., None] / 255
    return np.rint(share * colours + (1 - share) * np.array(GROUNDS[ground]))


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF's orientation 1 to 8 says that the stored rows and columns are to be shown."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def eight_bits(values: np.ndarray, largest: int = 65535) -> np.ndarray:
    return np.rint(values * (255 / largest))


def srgb_encoded(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, light in [0, 1] as levels up to 255."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def srgb_decoded(level: np.ndarray) -> np.ndarray:
    level = np.asarray(level) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


def light_of_lightness(lightness: np.ndarray) -> np.ndarray:
    """Y of CIE L*."""
    root = (lightness + 16) / 116
    return np.where(root > 6 / 29, root**3, (root - 4 / 29) * 3 * (6 / 29) ** 2)


BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
D50, D65 = np.array([0.9642, 1, 0.8249]), np.array([0.95047, 1, 1.08883])


def to_d50(primaries: tuple, white: np.ndarray = D65) -> np.ndarray:
    """Columns: XYZ of red, green and blue (given as x, y), seen under D50, which profiles are relative to."""
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    xyz = xyz * np.linalg.solve(xyz, white)
    adapted = np.diag((BRADFORD @ D50) / (BRADFORD @ white))
    return np.linalg.inv(BRADFORD) @ adapted @ BRADFORD @ xyz


SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
REC2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
SWAPPED = (SRGB[1], SRGB[2], SRGB[0])  # red is green, green is blue, blue is red


def through_profile(levels: np.ndarray, primaries: tuple, gamma: float | None, white: np.ndarray = D65) -> np.ndarray:
    """Levels of a matrix profile as levels of sRGB; a gamma of None is the curve of sRGB."""
    light = srgb_decoded(levels) if gamma is None else (levels / 255) ** gamma
    return srgb_encoded(light @ (np.linalg.inv(to_d50(SRGB)) @ to_d50(primaries, white)).T)


# Profiles, as ICC.1:2001-04 lays them out


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50)} | tags
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(data), bytes(4), 0x02400000, kind, space, connection, bytes(12), b"acsp"
    )
    return (head + bytes(28) + _fixed(*D50)).ljust(128, b"\0") + table + data


def _curve(gamma: float | None, entries: int = 1024) -> bytes:
    if gamma is None:
        table = np.rint(65535 * srgb_decoded(np.linspace(0, 255, entries))).astype(">u2")
        return b"curv\0\0\0\0" + struct.pack(">I", entries) + table.tobytes()
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def rgb_profile(primaries: tuple, gamma: float | None, white: np.ndarray = D65, entries: int = 1024) -> bytes:
    tags = {}
    for name, xyz in zip((b"r", b"g", b"b"), to_d50(primaries, white).T, strict=True):
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + _fixed(*xyz), name + b"TRC": _curve(gamma, entries)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """L* = 100 (1 - K), whatever C, M and Y say: no formula that ignores the profile gives this."""
    ramp = bytes(range(256))
    corners = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))
    identity = _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + corners + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


# Files, byte by byte where Pillow cannot write them


def exif(orientation: int) -> bytes:
    entry = struct.pack(">HHIHH", 274, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + bytes(4)


def saved(pixels, format_: str, mode: str | None = None, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(file, format_, **options)
    return file.getvalue()


def _packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples of 1 to 16 bits, most significant first, each row from a byte on."""
    rows = values.reshape(len(values), -1)
    return b"".join(
        np.packbits((row[:, None].astype(int) >> np.arange(bits)[::-1] & 1).astype(np.uint8).ravel()).tobytes()
        for row in rows
    )


def png(values: np.ndarray, bits: int, colour_type: int, *, size=None, damage: str = "", **chunks: bytes) -> bytes:
    """Colour types: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha."""
    height, width = size or values.shape[:2]
    row = len(_packed(values[:1], bits))
    packed = _packed(values, bits)
    data = zlib.compress(b"".join(b"\0" + packed[i : i + row] for i in range(0, len(packed), row)))
    if damage == "data":
        data = data[:20] + bytes([data[20] ^ 0xFF]) + data[21:]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), value) for name, value in chunks.items())]
    result = b"\x89PNG\r\n\x1a\n"
    for name, value in (*parts, (b"IDAT", data), (b"IEND", b"")):
        check = zlib.crc32(name + value) ^ (1 if damage == "header" and name == b"IHDR" else 0)
        result += struct.pack(">I", len(value)) + name + value + struct.pack(">I", check)
    return result


def iccp(profile: bytes) -> bytes:
    return b"test\0\0" + zlib.compress(profile)


def tiff(samples: bytes, bits: tuple, photometric: int, *, endian: str = "<", profile=None, **tags) -> bytes:
    """One uncompressed strip. Tags: `sample_format`, `extra`, `palette`, `orientation`, `subfile`, `dng`."""
    short, long, undefined = 3, 4, 7
    values = {256: (long, (SIDE,)), 257: (long, (SIDE,)), 258: (short, bits), 259: (short, (1,))}
    values |= {262: (short, (photometric,)), 273: (long, (0,)), 277: (short, (len(bits),)), 278: (long, (SIDE,))}
    values |= {279: (long, (len(samples),))}
    numbers = {"sample_format": 339, "extra": 338, "palette": 320, "orientation": 274, "subfile": 254, "dng": 50706}
    values |= {numbers[name]: (short, value if isinstance(value, tuple) else (value,)) for name, value in tags.items()}
    if profile is not None:
        values[34675] = (undefined, profile)
    place, table, data = 8 + 2 + 12 * len(values) + 4, b"", b""
    size_of = {short: "H", long: "I"}
    encoded = {}
    for tag, (kind, value) in sorted(values.items()):
        raw = value if kind == undefined else struct.pack(f"{endian}{len(value)}{size_of[kind]}", *value)
        encoded[tag] = (kind, len(value), raw)
    extra = sum(len(raw) + len(raw) % 2 for _, _, raw in encoded.values() if len(raw) > 4)
    encoded[273] = (long, 1, struct.pack(endian + "I", place + extra))
    for tag, (kind, count, raw) in encoded.items():
        inline = raw.ljust(4, b"\0")
        if len(raw) > 4:
            inline, data = struct.pack(endian + "I", place + len(data)), data + raw + bytes(len(raw) % 2)
        table += struct.pack(endian + "HHI", tag, kind, count) + inline
    head = (b"II*\0" if endian == "<" else b"MM\0*") + struct.pack(endian + "I", 8)
    return head + struct.pack(endian + "H", len(values)) + table + bytes(4) + data + samples


def psd(values: np.ndarray) -> bytes:
    """Photoshop's, flat and uncompressed, RGB or RGB and alpha."""
    height, width, channels = values.shape
    head = struct.pack(">4sH6sHIIHH", b"8BPS", 1, bytes(6), channels, height, width, 8, 3)
    return head + bytes(12) + b"\0\0" + values.transpose(2, 0, 1).tobytes()


def bmp_with_alpha(values: np.ndarray) -> bytes:
    """A header of version 4, whose masks name the byte of alpha; Pillow writes alpha where no reader may use it."""
    data = values[::-1][..., [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<IIII4s", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs") + bytes(48)
    head = struct.pack("<IiiHHIIiiII", 108, SIDE, SIDE, 1, 32, 3, len(data), 2835, 2835, 0, 0) + masks
    return struct.pack("<2sIII", b"BM", 14 + len(head) + len(data), 0, 14 + len(head)) + head + data


def xbm(black: np.ndarray) -> bytes:
    """A set bit is black, the lowest is the first."""
    numbers = ", ".join(f"{byte:#04x}" for byte in np.packbits(black, axis=1, bitorder="little").ravel())
    head = f"#define a_width {SIDE}\n#define a_height {SIDE}\n"
    return f"{head}static unsigned char a_bits[] = {{\n{numbers}}};\n".encode()


def fits(values: np.ndarray) -> bytes:
    cards = ("SIMPLE  = T", f"BITPIX  = {8}", "NAXIS   = 2", f"NAXIS1  = {SIDE}", f"NAXIS2  = {SIDE}", "END")
    head = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    return head + values[::-1].tobytes().ljust(2880, b"\0")


def pnm(magic: str, values: np.ndarray, largest: int | None = 255) -> bytes:
    head = f"{magic}\n{SIDE} {SIDE}\n" + ("" if largest is None else f"{largest}\n")
    if magic in ("P1", "P2", "P3"):
        return (head + " ".join(str(value) for value in values.ravel()) + "\n").encode()
    if magic == "P4":
        return head.encode() + _packed(values, 1)
    return head.encode() + values.astype(">u2" if largest > 255 else np.uint8).tobytes()
