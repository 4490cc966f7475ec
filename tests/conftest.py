from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_picture, reset_accelerate

from diffusers_mp.images import load_image_dataset


# On models this small, two threads spend their time waiting for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """Ten pictures in the classes cat (4), dog (3) and test (3); "test" is also the name of a split."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in (("cat", 4), ("dog", 3), ("test", 3)):
        (folder / name).mkdir()
        for k in range(count):
            random_picture(rng).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(picture_folder, tmp_path_factory):
    """The data set of `picture_folder` and its class names."""
    return load_image_dataset(picture_folder, cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def examples_run_here(monkeypatch):
    """Scripts of `examples` can be imported, and leave Accelerate as they found it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    yield
    reset_accelerate()


@pytest.fixture
def few_digits(examples_run_here, monkeypatch):
    """A hundred digits of each part instead of all: what is run and written is the same."""
    import digits

    few = {
        part: digits.LabelledImages(of_part.images[:100], of_part.labels[:100], of_part.numbers[:100])
        for part, of_part in digits.split_digits().items()
    }
    monkeypatch.setattr(digits, "split_digits", lambda: few)
