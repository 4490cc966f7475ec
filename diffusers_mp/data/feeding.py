"""What keeps a device at work: helpers that prepare its next batch, and copies that it need not wait for."""

import os
from collections.abc import Mapping

import torch


def default_num_workers(device: torch.device, most: int) -> int:
    """How many helpers prepare what a device computes on, where nobody says a number.

    Args:
        device (torch.device): of this process.
        most (int): enough to keep an accelerator at work.
    Returns:
        int: 0 on the CPU, which has the work of both; else at most this process's share of the processors.
    """
    if device.type == "cpu":
        return 0
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(most, max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def can_pin(device: torch.device) -> bool:
    """Whether memory can be pinned, from where a device copies by itself while others compute."""
    if device.type in ("cpu", "mps"):  # DataLoader warns of the latter, which shares the memory anyway
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except RuntimeError:  # accelerators say so in different words
        return False


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on a device; what lies in pinned memory is copied while this process goes on.

    Args:
        batch (mapping): name to tensor; a pinned one is not to be written to afterwards.
        device (torch.device): where to copy it.
    """
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
