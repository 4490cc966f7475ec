"""From tensors to magnitudes: norms and counts on the device, one read of all of them, and named values."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ..functional import compute_dtype
from ..sharding import local
from .history import HISTOGRAM


# Equal bins of angles over (-pi, pi].
NUM_ANGLE_BINS = 256


@torch.no_grad()
def norm_of(tensor: torch.Tensor) -> torch.Tensor:
    """Norm of what this process holds of a tensor, in float32 at least."""
    tensor, dtype = local(tensor), compute_dtype(tensor.dtype)
    if tensor.is_sparse:  # the gradient of a sparse embedding
        tensor = tensor.coalesce().values()
    # PyTorch takes no norms of float8, in which layerwise casting stores weights.
    return torch.linalg.vector_norm(tensor.to(dtype) if tensor.itemsize == 1 else tensor, dtype=dtype)


def norm_of_difference(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Norm of `new - old`, of what this process holds of them."""
    dtype = compute_dtype(new.dtype)
    return torch.linalg.vector_norm(local(new).to(dtype) - local(old).to(dtype))


def angle_counts(angles: torch.Tensor) -> torch.Tensor:
    """Number of angles, modulo a turn, in each bin."""
    # Sorted, because no histogram of CUDA is deterministic.
    turns = angles / (2 * math.pi)
    turns = (turns - turns.round()).sort().values
    edges = torch.linspace(-0.5, 0.5, NUM_ANGLE_BINS + 1, device=angles.device, dtype=angles.dtype)[1:]
    up_to = torch.searchsorted(turns, edges, right=True)
    return torch.diff(up_to, prepend=torch.zeros_like(up_to[:1])).to(angles.dtype)


def numbers_of(kind: str, module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """What a recorder keeps of a call: the norm of activations; of a map sum, norm, largest entry, angles' counts."""
    if kind == "activations":
        return norm_of(tensor)
    rows = local(tensor).to(compute_dtype(tensor.dtype)).flatten()
    numbers = torch.stack([rows.sum(), torch.linalg.vector_norm(rows), rows.abs().max()])
    return torch.cat([numbers, angle_counts(rows)]) if kind == "rotate" else numbers


def norms_over_shards(norms: list[torch.Tensor], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Norms of whole parameters from those of their shards, by one reduction for each mesh of processes."""
    norms, shards = list(norms), {}
    for index, parameter in enumerate(parameters):
        for dim, placement in enumerate(getattr(parameter, "placements", ())):
            if placement.is_shard():
                shards.setdefault((parameter.device_mesh, dim), []).append(index)
    for (mesh, dim), indices in shards.items():
        squares = torch.stack([norms[index] for index in indices]).square()
        dist.all_reduce(squares, group=mesh.get_group(dim))
        for index, norm in zip(indices, squares.sqrt(), strict=True):
            norms[index] = norm
    return norms


def fetch(tensors: list[torch.Tensor]) -> list[list[float]]:
    """All numbers of all tensors, which are on one device or on several, in one read of the host."""
    device = tensors[0].device
    numbers = iter(torch.cat([tensor.reshape(-1).to(device) for tensor in tensors]).tolist())
    return [[next(numbers) for _ in range(tensor.numel())] for tensor in tensors]


def values_of_parameters(
    name: str, parameters: list[nn.Parameter], norms: dict[tuple[str, int], float]
) -> dict[str, float]:
    """Magnitudes of the parameters below a module, from their norms by quantity and `id`."""
    values = {}
    for quantity in ("weights", "gradients"):
        measured = [(norms[quantity, id(p)], p.numel()) for p in parameters if (quantity, id(p)) in norms]
        if measured:
            values[f"magnitude/{quantity}/{name}"] = _root_mean_square(measured)
    old, change = (
        math.hypot(*(norms.get((quantity, id(p)), 0.0) for p in parameters)) for quantity in ("old", "changes")
    )
    if old != 0:
        values[f"relative_update/{name}"] = change / old
    return values


def values_of_calls(kind: str, name: str, calls: list[tuple[list[float], int]]) -> dict:
    """Statistics of all calls of a module: numbers of each call, and of how many entries they are."""
    numbers, counts = zip(*calls, strict=True)
    if kind == "activations":
        return {f"magnitude/activations/{name}": _root_mean_square([(norm, n) for (norm,), n in calls])}
    sums, norms, maxima, *bins = zip(*numbers, strict=True)
    values = {
        f"{kind}/mean/{name}": sum(sums) / sum(counts),
        f"{kind}/rms/{name}": _root_mean_square(zip(norms, counts, strict=True)),
        f"{kind}/max/{name}": max(maxima),
    }
    if kind == "rotate":
        values[f"{HISTOGRAM}{name}"] = [round(sum(counts_of_bin)) for counts_of_bin in bins]
    return values


def _root_mean_square(norms_and_counts: Iterable[tuple[float, int]]) -> float:
    norms, counts = zip(*norms_and_counts, strict=True)
    return math.hypot(*norms) / math.sqrt(sum(counts))
