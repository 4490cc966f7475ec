import gc
import os

import pytest


# Before a file of tests imports this package.
if "PYTEST_XDIST_WORKER" in os.environ:
    from processes import fork_server

    fork_server()


# Heavy imports are in the fixtures: the process that starts the workers needs none of them.


# The files that take longest begin first, so that the workers end together.
LONGEST_FIRST = """
    hub train_fsdp fused transformer_in_torch train_mpdit coverage train_failures docs finetune_rotation demo
    speed train_pretended pretended_device resume_kills secrets train_resume reconstruction encoding train_autoencoders
    train_optimizers compilation train_processes recorder_in_training installation evaluate ablate
    layers_elsewhere diffusers_testers schedulers table model_class
""".split()


def pytest_collection_finish():
    # What is imported by now stays: the collector need not look through it during thousands of tests.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem.removeprefix("test_"), len(places)))


@pytest.fixture(autouse=True)
def _seed():
    import torch

    # On models this small, two threads spend their time waiting for each other.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Ten images in the classes cat (4), dog (3) and test (3); "test" is also the name of a split."""
    import numpy as np
    from helpers import random_image

    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("cat", 4), ("dog", 3), ("test", 3)):
        (folder / name).mkdir()
        for k in range(count):
            random_image(rng).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture(scope="session")
def image_data(image_folder):
    """The data set of `image_folder` and its class names."""
    from diffusers_mp.data.images import load_image_dataset

    return load_image_dataset(image_folder)[:2]


@pytest.fixture
def examples_run_here(monkeypatch):
    """Scripts of `examples` can be imported, and leave Accelerate as they found it."""
    from helpers import EXAMPLES, reset_accelerate

    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    reset_accelerate()


@pytest.fixture
def few_digits(examples_run_here, monkeypatch):
    """A hundred digits of each part instead of all: what is run and written is the same."""
    import demo

    few = {
        part: demo.LabelledImages(of_part.images[:100], of_part.labels[:100], of_part.numbers[:100])
        for part, of_part in demo.split_digits().items()
    }
    monkeypatch.setattr(demo, "split_digits", lambda: few)


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory):
    """A real DINOv2 with two layers, its image processor beside it."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    size, crop = {"shortest_edge": 32}, {"height": 28, "width": 28}
    transformers.BitImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def running_server():
    from hub_server import HubServer

    with HubServer({}) as server:
        yield server


@pytest.fixture
def server(running_server):
    """A Hub on 127.0.0.1 that knows two tokens, empty."""
    from hub_client import READ_TOKEN, TOKEN

    running_server.reset({TOKEN: ("user", "write"), READ_TOKEN: ("user", "read")})
    yield running_server
    assert running_server.problems == []
