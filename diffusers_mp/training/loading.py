"""Training samples as batches, prepared while the device computes."""

from collections.abc import Iterable

import torch
from torch.utils.data import BatchSampler, DataLoader

from ..data.feeding import can_pin, default_num_workers
from .samples import TrainingSamples
from .signals import leave_signals_to_main_process


# A worker prepares 256 latents in some milliseconds, in which a GPU trains on as many.
MOST_WORKERS = 4


def load_batches(
    samples: TrainingSamples,
    batches: Iterable[list[tuple[int, int]]],
    device: torch.device,
    num_workers: int | None = 0,
) -> DataLoader:
    """Batches of samples, in pinned memory where the device copies from it.

    Args:
        samples (TrainingSamples): what the batches are of.
        batches (iterable): lists of keys, such as a `StreamBatchSampler`.
        device (torch.device): that the batches are for; it need not wait for their copies, see `to_device`.
        num_workers (int, optional): processes that prepare batches, each two ahead; 0 prepares them in this process
            when they are asked for. None: 0 on the CPU, else up to 4, as many as there are processors for.
    Returns:
        DataLoader: dicts as `TrainingSamples` makes them; the same batches for any number of workers.
    """
    if num_workers is None:
        num_workers = default_num_workers(device, MOST_WORKERS)
    return DataLoader(
        samples,
        sampler=batches,
        batch_size=None,  # the sampler's lists are the batches, and samples make each in one go
        num_workers=num_workers,
        pin_memory=can_pin(device),
        worker_init_fn=leave_signals_to_main_process,
    )


def load_in_order(samples: TrainingSamples, batch_size: int, device: torch.device) -> DataLoader:
    """All samples as they are in epoch 0, in batches: for losses of held-out images, which are always the same.

    Args:
        samples (TrainingSamples): held-out images.
        batch_size (int): samples per batch.
        device (torch.device): that the batches are for.
    """
    keys = [(0, position) for position in range(len(samples))]
    return load_batches(samples, BatchSampler(keys, batch_size, drop_last=False), device)
