"""Random numbers as functions of what they are for: training samples and images of an evaluation hold no state."""

import functools
import math

import numpy as np
import torch


# Uniform numbers of each sample, before its normal ones: time, flip, label dropout.
NUM_UNIFORM = 3
# Rounds of SFC64 after seeding, as its author and NumPy have it: from 10 on, any bit of a seed changes all bits.
_WARM_UP = 12
# Words drawn before they become normal numbers: few enough to stay in the processor's cache. PyTorch divides no
# operator of this size among threads.
_NUM_WORDS = 2**15


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A generator of a seed and a key; other keys, of other lengths too, are other seeds of 64 bits.

    PyTorch seeds its CPU generator with the lower 32 of them. That is enough for the order of an epoch and for some
    thousand images, not for all samples of a run, of which many would get the same noise: see `sample_draws`.

    Args:
        seed (int): of the run or the evaluation.
        *key (int): such as the epoch; training uses keys of up to two numbers.
    Returns:
        torch.Generator: on the CPU.
    """
    # `SeedSequence([seed, epoch])` and `SeedSequence([seed, epoch, 0])` are the same stream. Spawn keys keep apart the
    # hold-out (), the order of an epoch (epoch) and its samples (epoch, 0).
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def sample_draws(
    seed: int, epochs: np.ndarray, indices: np.ndarray, num_normal: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random numbers of training samples, each sample's a function of (seed, epoch, index) alone.

    SFC64 (Doty-Humphrey, PractRand; in NumPy since 1.17) is seeded anew for each sample, with its three words of 64
    bits: two are a hash of (seed, epoch), the third is the index, so that no two samples of an epoch share a stream.
    Pairs of normal numbers are made of pairs of 32 bits by Box and Muller's formula, for many samples at once.

    Args:
        seed (int): of the run, not negative.
        epochs (numpy.ndarray): how often the data were gone through before, int64, (B,).
        indices (numpy.ndarray): of the samples in the whole data set, int64, (B,).
        num_normal (int): normal numbers of a kind and sample.
    Returns:
        tuple: `uniform` in [0, 1) (torch.Tensor, float64, (B, 3)), and twice `normal` (float32, (B, num_normal)).
    """
    num_samples = len(indices)
    states = np.ones((num_samples, 4), np.uint64)  # the last word counts from 1
    states[:, 2] = indices
    for epoch in set(epochs.tolist()):
        states[epochs == epoch, :2] = _key(seed, epoch)
    uniform = np.empty((num_samples, NUM_UNIFORM), np.uint64)
    first, second = (torch.empty(num_samples, num_normal) for _ in range(2))
    head = _WARM_UP + NUM_UNIFORM
    step = max(1, _NUM_WORDS // num_normal)
    words = np.empty((min(step, num_samples), head + num_normal), np.uint64)
    generator, seeded = np.random.SFC64(0), {"bit_generator": "SFC64", "has_uint32": 0, "uinteger": 0}
    for start in range(0, num_samples, step):
        part = words[: num_samples - start]
        for row, state in zip(part, states[start:], strict=False):
            generator.state = seeded | {"state": {"state": state}}
            row[:] = generator.random_raw(head + num_normal)
        uniform[start : start + step] = part[:, _WARM_UP:head]
        bits = torch.from_numpy(part[:, head:]).view(torch.int32)
        _box_muller(bits, first[start : start + step], second[start : start + step])
    return torch.from_numpy((uniform >> np.uint64(11)) * 2.0**-53), first, second


@functools.lru_cache(maxsize=16)
def _key(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence(seed, spawn_key=(epoch, 0)).generate_state(2, np.uint64)


def _box_muller(bits: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """Fills `first` and `second`, (B, N), with independent normal numbers made of `bits`, int32, (B, 2N).

        sqrt(-2 ln u) · (cos a, sin a)              u ~ U(0, 1], a ~ U[-π, π)

    Each step is rounded for each number alone: what a sample gets does not depend on its neighbours in a batch.
    """
    num_normal = first.shape[1]
    radius = torch.empty_like(first).copy_(bits[:, :num_normal])
    # In the middle of its interval: never 0, the least is 2⁻³², for a radius of 6.66.
    radius.abs_().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = torch.empty_like(first).copy_(bits[:, num_normal:]).mul_(math.pi * 2.0**-31)
    torch.cos(angle, out=first).mul_(radius)
    torch.sin(angle, out=second).mul_(radius)
