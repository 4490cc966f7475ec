"""Weights back to their norms, many at once and in place: the arithmetic of rows and of pinned norms. Torch only.

A pinned weight is known by its module, which has its `Pin` as a plain attribute: outside of the state dict, where `to`
and `half` change nothing, and copied with the module.
"""

import collections
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import functional
from .sharding import is_sharded, local_rows


# Entries above which reading a weight once more takes longer than starting two kernels, on a large GPU.
LARGEST_IN_A_STACK = 2**21
# Attribute of a module: names of its pinned parameters and their `Pin`.
_PINS = "_pinned_norms"


@functools.cache
def row_tolerance(dtype: torch.dtype) -> float:
    """How far the relative norm of a row may be from 1 that was put there in a dtype."""
    # Rounding a normalised row to `dtype` moves its norm by eps / 2 at most; the rest is room for the norm's own sum.
    return torch.finfo(dtype).eps + 32 * torch.finfo(functional.compute_dtype(dtype)).eps


def row_norms(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Norm of each row of weights of two or more dimensions; a row is what their first index counts.

    Args:
        weights (sequence of torch.Tensor): shapes (rows, ...), local tensors.
    Returns:
        list of torch.Tensor: of each weight, shape (rows, 1), float32 or float64.
    """
    norms = {}
    for indices in _groups(weights):
        group = _stacked([weights[index] for index in indices])
        dtype = functional.compute_dtype(group.dtype)
        # float8, in which layerwise casting stores weights, knows no norm.
        group = group.to(dtype) if group.dtype.itemsize == 1 else group
        of_group = torch.linalg.vector_norm(group, dim=tuple(range(2, group.ndim)), dtype=dtype)
        norms.update(zip(indices, of_group.unsqueeze(-1).unbind(), strict=True))
    return [norms[index] for index in range(len(weights))]


def _groups(weights: Sequence[torch.Tensor]) -> Iterable[list[int]]:
    """Which weights are worked on at once: on an accelerator, small ones of a shape, since starting takes time."""
    groups = collections.defaultdict(list)
    for index, weight in enumerate(weights):
        is_alone = weight.is_cpu or weight.numel() > LARGEST_IN_A_STACK
        groups[index if is_alone else (weight.shape, weight.dtype, weight.device)].append(index)
    return groups.values()


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def divide_(weights: Sequence[torch.Tensor], norm: torch.Tensor, counts: Sequence[int]) -> None:
    """Divide rows by their norm relative to where it has to be; those that are there are left alone to the bit.

    Args:
        weights (sequence of torch.Tensor): shapes (rows, ...), of one device and dtype.
        norm (torch.Tensor): relative norms of all of them, shape (sum of `counts`, 1); overwritten.
        counts (sequence of int): how many norms each weight has: one for each row, or one for all of them.
    """
    dtype = weights[0].dtype
    # Without asking the device how many rows that are.
    settled = (norm - 1).abs_() <= row_tolerance(dtype)
    # Rows too long for a norm become NaN, which is noticed, rather than zeros, which are not.
    norm.masked_fill_(settled, 1).clamp_(min=functional.SMALLEST_NORMS[norm.dtype])
    norm.nan_to_num_(nan=math.nan, posinf=math.nan)
    norms = [norm.view(-1, *[1] * (weight.ndim - 1)) for weight, norm in zip(weights, norm.split(counts), strict=True)]
    for indices in _groups(weights):
        group, of_group = [weights[index] for index in indices], _stacked([norms[index] for index in indices])
        if dtype.itemsize == 1:  # float8 knows no division
            torch._foreach_copy_(group, (_stacked(group).to(of_group.dtype) / of_group).unbind())
        elif len(group) == 1:
            group[0].div_(of_group[0])
        else:
            torch._foreach_copy_(group, torch.stack(group).div_(of_group).unbind())


@dataclass
class Pin:
    """Norms that a weight is brought back to.

    Attributes:
        norms (torch.Tensor): of the whole weight, sharded or not: shape (rows,), 0 where a row is free, or () for the
            norm of the matrix. float32 or float64, on any device.
    """

    norms: torch.Tensor
    _here: torch.Tensor | None = None

    def here(self, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Norms of the rows of a weight that this process holds, on their device, shape (rows here, 1) or (1, 1)."""
        count = len(rows) if self.norms.ndim else 1
        if self._here is None or self._here.device != rows.device or len(self._here) != count:
            norms = self.norms.to(rows.device)
            if self.norms.ndim and len(norms) != len(weight):
                raise ValueError(
                    f"a pinned weight must keep its shape, got {tuple(weight.shape)} for {len(norms)} norms: pin the "
                    "norms again."
                )
            if self.norms.ndim and is_sharded(weight):
                from torch.distributed.tensor import DTensor, Replicate  # there already, where a weight is sharded

                # Cut as the weight is. Nothing is sent.
                mesh = weight.device_mesh
                norms = DTensor.from_local(norms, mesh, [Replicate()] * mesh.ndim, run_check=False)
                norms = norms.redistribute(placements=weight.placements).to_local()
            self._here = norms.reshape(-1, 1)
        return self._here


def pinned(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Pin]]:
    """The pinned weights of these modules: their module, their name in it, and their pin."""
    for module in modules:
        # Not `getattr`: a module looks long for what it has not.
        for name, pin in module.__dict__.get(_PINS, {}).items():
            yield module, name, pin


def set_pins(module: nn.Module, pins: dict[str, Pin]) -> None:
    """Give a module the pins of its parameters by their names; an empty dict takes them away."""
    if pins:
        module.__dict__[_PINS] = pins
    else:
        module.__dict__.pop(_PINS, None)


@torch.no_grad()
def restore_norms_(modules: Iterable[nn.Module]) -> None:
    """Bring the pinned weights of these modules that are trained back to their norms, in place."""
    kinds = collections.defaultdict(list)
    for module, name, pin in pinned(modules):
        weight = getattr(module, name)
        if weight.requires_grad:
            rows = local_rows(weight.detach())
            kinds[rows.device, rows.dtype, pin.norms.ndim].append((rows, weight, pin))
    for (*_, is_per_row), found in kinds.items():
        weights = [rows for rows, _, _ in found]
        norms = row_norms(weights)
        norm = torch.cat(norms) if is_per_row else _matrix_norms(norms, [weight for _, weight, _ in found])
        target = torch.cat([pin.here(weight, rows) for rows, weight, pin in found])
        norm.div_(target).masked_fill_(target == 0, 1)
        divide_(weights, norm, [len(of_rows) if is_per_row else 1 for of_rows in norms])


def _matrix_norms(norms: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norms of matrices, shape (matrices, 1), from those of the rows here: one all-reduce for all that are sharded."""
    norm = torch.stack(torch._foreach_norm(norms))
    shards = collections.defaultdict(list)
    for index, weight in enumerate(weights):
        if is_sharded(weight):
            shards[weight.device_mesh, tuple(weight.placements)].append(index)
    for (mesh, placements), indices in shards.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        sums = [Partial() if placement.is_shard() else Replicate() for placement in placements]
        norm[indices] = DTensor.from_local(norm[indices].square(), mesh, sums, run_check=False).full_tensor().sqrt()
    return norm.unsqueeze(-1)
