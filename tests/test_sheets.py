"""Sheets of samples, pixel by pixel where no letter is."""

import numpy as np
from PIL import Image

from diffusers_mp.sheets import CELL_SIZE, GAP, MARGIN, draw_sheet


def random_image(seed, size=8, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def cell(sheet, x, y, size=CELL_SIZE):
    return sheet.crop((x, y, x + size, y + size))


def test_small_images_are_enlarged_by_a_whole_factor_pixel_by_pixel():
    images = [random_image(seed) for seed in range(3)]
    sheet = draw_sheet(images, 2)
    assert (sheet.mode, sheet.size) == ("RGB", (2 * (CELL_SIZE + GAP), 2 * (CELL_SIZE + GAP)))
    for number, image in enumerate(images):
        row, column = divmod(number, 2)
        shown = np.asarray(cell(sheet, column * (CELL_SIZE + GAP), row * (CELL_SIZE + GAP)))
        assert np.array_equal(shown, np.kron(np.asarray(image), np.ones((12, 12, 1), np.uint8)))
    # 40 pixels become 120, the first multiple from 96 on; 128 stay.
    assert draw_sheet([random_image(0, 40)], 1).size == (120 + GAP, 120 + GAP)
    large = random_image(0, 128)
    assert cell(draw_sheet([large], 1), 0, 0, 128).tobytes() == large.tobytes()


def test_captions_stand_above_their_images_and_are_cut_to_their_width():
    images = [random_image(seed, mode="L") for seed in range(2)]
    sheet = draw_sheet(images, 2, captions=["cat", "a name that is much longer than its image is wide"])
    above = sheet.height - CELL_SIZE - GAP
    assert sheet.mode == "L"
    for x in (0, CELL_SIZE + GAP):
        assert sheet.crop((x, 0, x + CELL_SIZE, above)).getextrema()[0] < 128
        assert sheet.crop((x + CELL_SIZE, 0, x + CELL_SIZE + GAP, above)).getextrema() == (255, 255)
    assert np.array_equal(
        np.asarray(cell(sheet, 0, above)), np.kron(np.asarray(images[0]), np.ones((12, 12), np.uint8))
    )


def test_rows_have_names_and_the_sheet_a_title():
    images = [Image.new("L", (8, 8), value) for value in (10, 10, 10, 200, 200, 200)]
    sheet = draw_sheet(images, 3, row_names=["0", "1"], title="title")
    colours = [sheet.getpixel((sheet.width - CELL_SIZE, sheet.height - y)) for y in (150, 50)]
    assert colours == [10, 200]
    assert sheet.crop((0, MARGIN, MARGIN, sheet.height)).getextrema() == (0, 255)  # names
    assert sheet.crop((MARGIN, 0, sheet.width, MARGIN)).getextrema()[0] < 128  # title
