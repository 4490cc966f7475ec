"""Sheets of samples: small images enlarged, in a grid with their names."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


CELL_SIZE = 96  # pixels, at least, of the shorter side of a cell
GAP, MARGIN = 6, 60


def draw_sheet(
    images: Sequence[Image.Image],
    columns: int,
    *,
    captions: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """A white sheet of images, row by row. Small ones are enlarged by a whole factor: a pixel becomes a square.

    Args:
        images (sequence of PIL.Image.Image): all of one size.
        columns (int): images in a row.
        captions (sequence of str, optional): of the images, above each; too long ones are cut.
        row_names (sequence of str, optional): short names of the rows, left of them.
        title (str, optional): above all.
    Returns:
        PIL.Image.Image: grey if all images are, else RGB.
    """
    factor = max(1, math.ceil(CELL_SIZE / min(images[0].size)))
    width, height = (factor * side for side in images[0].size)
    left, top = (MARGIN if row_names else 0), (MARGIN if title else 0)
    above = 20 if captions else 0
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(mode, (left + columns * (width + GAP), top + rows * (above + height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((left, top / 2), title, fill="black", font=ImageFont.load_default(24), anchor="lm")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        x, y = left + column * (width + GAP), top + row * (above + height + GAP)
        if row_names and not column:
            place = (left / 2, y + above + height / 2)
            draw.text(place, row_names[row], fill="black", font=ImageFont.load_default(36), anchor="mm")
        if captions:
            font = ImageFont.load_default(14)
            draw.text((x, y + above / 2), _cut(captions[number], width, font), fill="black", font=font, anchor="lm")
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y + above))
    return sheet


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    return next(cut for end in range(len(text), -1, -1) if font.getlength(cut := f"{text[:end]}…") <= width or not end)
