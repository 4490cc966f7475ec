"""Every kind of `tests/image_kinds.py` is read right by pixel values, or refused with a reason."""

import warnings

import PIL
import pytest
from image_kinds import MAKERS, outcome_of

from diffusers_mp.data.pixels import read_image


# What Pillow itself refuses before version 13, or reads though it is cut off.
SINCE_PILLOW_13 = {
    ("a.tif", "grey, alpha premultiplied"),
    ("a.tif", "grey, alpha unused"),
    ("a.tif", "YCbCr"),
    ("a.dds", "cut off"),
}


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_each_kind_is_read_right_or_refused_with_a_reason(maker):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged files, are no errors where people train
        outcomes = {(kind.name, kind.what): outcome_of(kind, read_image) for kind in maker()}
    failures = {kind: what for kind, what in outcomes.items() if what.startswith(("wrong", "unclear"))}
    if int(PIL.__version__.split(".")[0]) < 13:
        failures = {kind: what for kind, what in failures.items() if kind not in SINCE_PILLOW_13}
    assert failures == {}


def test_kinds_are_many():
    names = [(maker.__name__, kind.name, kind.what) for maker in MAKERS for kind in maker()]
    assert len(names) == len({*names}) >= 250
