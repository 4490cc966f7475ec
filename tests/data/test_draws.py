"""Random numbers of training samples: NumPy's own generator as reference, and what independence means."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffusers_mp.data.draws import keyed_generator, sample_draws


def draws_of(*keys, num_normal=16):
    """Uniform and both normal numbers of samples, of keys (seed, epoch, index) with one seed."""
    (seed,) = {key[0] for key in keys}
    epochs, indices = np.array([key[1:] for key in keys], np.int64).T
    return sample_draws(seed, epochs, indices, num_normal)


def normal_of(*keys, **options):
    return torch.cat(draws_of(*keys, **options)[1:], 1)


def assert_uncorrelated(first, second):
    """The correlation of independent numbers is 0 with standard error n^-1/2; the bound is 4.5 of them."""
    pair = torch.stack([first.double().flatten(), second.double().flatten()])
    assert torch.corrcoef(pair)[0, 1].abs() < 4.5 / math.sqrt(first.numel())


def test_draws_are_those_of_numpys_sfc64():
    """Its words after the rounds of its own seeding; the formula of Box and Muller in float64."""
    keys = [(3, 5, 7), (3, 5, 8), (3, 6, 7), (3, 0, 2**40)]
    uniform, *normal = draws_of(*keys, num_normal=75)
    for row, (seed, epoch, index) in enumerate(keys):
        bits = np.random.SFC64(0)
        state = bits.state
        key = np.random.SeedSequence(seed, spawn_key=(epoch, 0)).generate_state(2, np.uint64)
        state["state"]["state"][:] = [*key, index, 1]
        bits.state = state
        bits.random_raw(12)
        assert np.array_equal(uniform[row], np.random.Generator(bits).random(3))
        halves = bits.random_raw(75).view(np.int32).astype(np.float64).reshape(2, 75)
        radius = np.sqrt(-2 * np.log(np.minimum((np.abs(halves[0]) + 0.5) / 2**31, 1)))
        angle = np.pi * halves[1] / 2**31
        for ours, wave in zip(normal, (np.cos, np.sin), strict=True):
            np.testing.assert_allclose(ours[row], radius * wave(angle), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("num_normal", [1, 3, 64, 75, 4096])
def test_neighbours_in_a_batch_change_no_bit(num_normal):
    keys = [(1, epoch, index) for epoch in (0, 4) for index in range(30)]
    together = draws_of(*keys, num_normal=num_normal)
    for start, size in ((0, 1), (7, 1), (29, 3), (11, 17), (59, 1)):
        for whole, part in zip(together, draws_of(*keys[start : start + size], num_normal=num_normal), strict=True):
            assert torch.equal(part, whole[start : start + size])


def test_every_part_of_a_key_counts():
    """PyTorch's CPU generator takes 32 bits of a seed: seeds 2³² apart were one run."""
    seeds, epochs, indices = (0, 1, 2**32, 2**64), (0, 1, 2, 2**33), (*range(40), 2**32, 2**33, 2**40)
    rows = [
        normal_of(*((seed, epoch, index) for epoch, index in itertools.product(epochs, indices)), num_normal=2)
        for seed in seeds
    ]
    rows = torch.cat(rows)
    assert len(rows.unique(dim=0)) == len(rows) == 4 * 4 * 43


def test_numbers_are_normal():
    """Moments within 5 standard errors, tails within 5 of theirs; the distance of Kolmogorov and Smirnov below 2."""
    keys = [(0, epoch, index) for epoch in range(2) for index in range(256)]
    for normal in draws_of(*keys, num_normal=1024)[1:]:
        values = normal.double().flatten()
        count = values.numel()
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
            assert abs(values.pow(power).mean() - moment) < 5 * math.sqrt(variance / count)
        for bound in (2, 3, 4):
            tail = math.erfc(bound / math.sqrt(2))
            assert abs((values.abs() > bound).double().mean() - tail) < 5 * math.sqrt(tail / count)
        cumulative = 0.5 * (1 + torch.erf(values.sort().values / math.sqrt(2)))
        distance = (cumulative - (torch.arange(count) + 0.5) / count).abs().max()
        assert distance * math.sqrt(count) < 2  # exceeded by chance once in 1500 times


def test_samples_are_independent_of_their_neighbours():
    rows = normal_of(*((0, epoch, index) for epoch in range(8) for index in range(256)), num_normal=64)
    grid = rows.view(8, 256, 128)
    others = normal_of(*((1, epoch, index) for epoch in range(8) for index in range(256)), num_normal=64)
    for of in (torch.Tensor.clone, torch.abs):  # abs: of their sizes
        assert_uncorrelated(of(grid[:, 1:]), of(grid[:, :-1]))  # indices
        assert_uncorrelated(of(grid[1:]), of(grid[:-1]))  # epochs
        assert_uncorrelated(of(rows), of(others))  # seeds
        assert_uncorrelated(of(rows[:, 1:]), of(rows[:, :-1]))  # places
    # Each number of all samples by itself: a generator that is badly seeded shows first in the first numbers.
    assert grid.mean((0, 1)).abs().max() < 5 / math.sqrt(8 * 256)


def test_the_draws_of_one_sample_are_independent():
    keys = [(0, epoch, index) for epoch in range(16) for index in range(512)]
    uniform, first, second = draws_of(*keys, num_normal=16)
    for of in (torch.Tensor.clone, torch.abs):
        assert_uncorrelated(of(first), of(second))
    for one, other in itertools.combinations(uniform.unbind(1), 2):
        assert_uncorrelated(one, other)
    for one in uniform.unbind(1):
        assert 0 <= one.min() < 0.001 < 0.999 < one.max() < 1
        assert abs(one.mean() - 0.5) < 5 / math.sqrt(12 * len(keys))
        for normal in (first, second):
            for summary in (normal.mean(1), normal.square().mean(1), normal[:, 0], normal[:, 0].abs()):
                assert_uncorrelated(one, summary)
                assert_uncorrelated((one - 0.5).abs(), summary)


def test_kinds_of_keys_do_not_meet():
    """Of the hold-out, of the order of an epoch, of a lone number and of a list with a zero at its end."""
    seeds = [keyed_generator(seed, *key).initial_seed() for seed in (1, 2**32) for key in ((), (1,), (1, 0), (0, 1))]
    assert len(set(seeds)) == len(seeds)
