"""What this process holds of a module or tensor that others share: `fully_shard`'s shards, and wrappers. Torch only.

Nothing here imports DTensor, which takes half a second: a sharded tensor is known by its `placements`.
"""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which other processes may hold the rest."""
    return hasattr(tensor, "placements")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it unless it is a DTensor. Shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_rows(weight: torch.Tensor) -> torch.Tensor:
    """The rows of a weight that this process holds. Shares its memory.

    Args:
        weight (torch.Tensor): shape (rows, ...).
    Returns:
        torch.Tensor: shape (rows here, ...).
    Raises:
        ValueError: if the weight is sharded through its rows.
    """
    placements = getattr(weight, "placements", ())
    if not all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in placements):
        raise ValueError(
            "a pinned weight, or one of a weight-normalised layer, must be sharded on dimension 0, which keeps its "
            f"rows whole, or replicated, got {tuple(placements)}."
        )
    return local(weight)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is without shards. Of a DTensor all processes gather it; any other is returned as it is.

    Args:
        tensor (torch.Tensor): sharded or not.
    Returns:
        torch.Tensor: of the same shape and device.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def return_to_shards(module: nn.Module) -> None:
    """Make the modules of `fully_shard` drop the parameters that they have gathered. Nothing happens to others.

    After a forward without a backward, the outermost of them still holds gathered copies as its parameters: what is
    written into these is lost, and what is written into the shards is not seen before they are gathered again.

    Args:
        module (nn.Module): any module.
    """
    for submodule in module.modules():
        # Of the class, because a module looks long for what it has not.
        if hasattr(type(submodule), "reshard"):
            submodule.reshard()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module within its wrappers: DistributedDataParallel's, and that of compilation."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
    return module
