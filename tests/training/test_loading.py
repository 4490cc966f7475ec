"""Batches of samples from loaders: the same for any number of workers, on their way to any device."""

import datasets
import numpy as np
import pytest
import torch
from helpers import encode
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_mp.training.loading import load_batches, load_in_order
from diffusers_mp.training.samples import StreamBatchSampler, TrainingSamples


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(7)]
    table = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image(decode=False))
    return TrainingSamples(encode(table, tmp_path_factory.mktemp("pixels")), seed=0)


def assert_equal_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_torchs_own_loader(samples, num_workers):
    """Which asks for one sample after another, and stacks them."""
    sampler = StreamBatchSampler(len(samples), seed=0, train_batch_size=3, max_train_steps=5)
    batches = load_batches(samples, sampler, CPU, num_workers)
    assert len(batches) == 5
    assert_equal_batches(batches, DataLoader(samples, batch_sampler=sampler))


def test_held_out_images_come_in_order_and_alike(samples):
    batches = load_in_order(samples, 3, CPU)
    keys = [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)], [(0, 6)]]
    assert_equal_batches(batches, (samples[each] for each in keys))
    assert_equal_batches(batches, batches)


def test_workers_are_the_default_where_a_device_computes(samples):
    loaders = [load_batches(samples, [], torch.device(name), None) for name in ("cpu", "cuda")]
    assert loaders[0].num_workers == 0 < loaders[1].num_workers <= 4
    assert not loaders[0].pin_memory
    assert load_batches(samples, [], torch.device("cuda"), 0).num_workers == 0
