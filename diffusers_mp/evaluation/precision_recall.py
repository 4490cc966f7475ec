"""Improved precision and recall of features (arXiv 1904.06991), in float64. Torch only."""

import torch


# Features kept for precision and recall: as many as arXiv 1904.06991 compares.
MAX_FEATURES = 50_000
# Elements of a block of the distance matrix; half a gigabyte of float64.
_BLOCK_SIZE = 2**26


def precision_recall(
    reference: torch.Tensor, features: torch.Tensor, k: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall, arXiv 1904.06991, equations 1 and 2.

    A set of features covers the balls around each of its points that reach to the point's k-th nearest neighbour in
    the set. Precision is the share of `features` that `reference` covers (quality), recall the share of `reference`
    that `features` cover (variety). Both depend on the numbers of points: the paper compares sets of one size, 50,000.

    Args:
        reference (torch.Tensor): features of real images, shape (N, D).
        features (torch.Tensor): features of generated images, shape (M, D).
        k (int): which neighbour; 3 in the paper.
        device (str or torch.device): where distances are computed, in float64 (on the CPU for MPS, which has none).
    Returns:
        tuple of float: precision and recall.
    Raises:
        ValueError: if a set has `k` points or fewer, or the shapes do not fit.
    """
    if reference.ndim != 2 or features.ndim != 2 or reference.shape[1] != features.shape[1]:
        raise ValueError(
            "`reference` and `features` must have shapes (N, D) and (M, D), got "
            f"{tuple(reference.shape)} and {tuple(features.shape)}."
        )
    if k < 1 or min(len(reference), len(features)) <= k:
        raise ValueError(
            f"`k` must be at least 1 and less than the number of images, got {k} for {len(reference)} real and "
            f"{len(features)} generated ones."
        )
    device = "cpu" if torch.device(device).type == "mps" else device
    reference, features = reference.to(device, torch.float64), features.to(device, torch.float64)
    return _coverage(reference, features, k), _coverage(features, reference, k)


def _coverage(points: torch.Tensor, queries: torch.Tensor, k: int) -> float:
    # k + 1: each point is its own nearest neighbour.
    radii = torch.cat([block.kthvalue(k + 1).values for block in _squared_distances(points, points)])
    covered = [(block <= radii).any(dim=1) for block in _squared_distances(queries, points)]
    return torch.cat(covered).double().mean().item()


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor):
    """Blocks of rows of the matrix of squared distances."""
    norms = columns.square().sum(dim=1)
    for block in rows.split(max(1, _BLOCK_SIZE // len(columns))):
        sums = block.square().sum(dim=1, keepdim=True) + norms
        distances = sums - 2 * block @ columns.T
        # Points that are equal must be at distance 0, not at what rounding leaves.
        yield distances.where(distances > 1e-13 * sums, 0)
