"""Random numbers as functions of what they are for: training samples and images of an evaluation hold no state."""

import numpy as np
import torch


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A generator of a seed and a key; other keys, of other lengths too, are other streams.

    Args:
        seed (int): of the run or the evaluation.
        *key (int): such as epoch and sample index; training uses keys of up to two numbers.
    Returns:
        torch.Generator: on the CPU.
    """
    # `SeedSequence([seed, epoch])` and `SeedSequence([seed, epoch, 0])` are the same stream. Spawn keys keep apart the
    # hold-out (), the order of an epoch (epoch) and its samples (epoch, index).
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
