"""Fréchet distance between Gaussians fitted to the features of two sets of images. Torch only.

    FD = ‖μ - μ_r‖² + tr(Σ + Σ_r - 2 (Σ Σ_r)^½)

arXiv 1706.08500, equation 6; with the Inception network it is called FID, with DINOv2 see arXiv 2306.04675. All of it
in float64. Nothing here knows processes: each takes its share, and `RunningStatistics` puts the parts together.
"""

import torch


class RunningStatistics:
    """Mean and covariance of rows that come in batches, in float64; parts from several processes can be merged.

        m = m_a + δ n_b / n,    S = S_a + S_b + δ δᵀ n_a n_b / n,    δ = m_b - m_a
    for the mean m and the scatter S = Σ (x - m)(x - m)ᵀ of n = n_a + n_b rows (Chan et al. 1983). Unlike sums of
    squares it loses nothing when the mean is large.

    Attributes:
        count (int): rows seen.
        mean (torch.Tensor): float64, shape (D,); None before the first rows.
        scatter (torch.Tensor): float64, shape (D, D); None before the first rows.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None

    def update(self, features: torch.Tensor) -> "RunningStatistics":
        """Add rows.

        Args:
            features (torch.Tensor): shape (B, D), the same D each time.
        Returns:
            RunningStatistics: itself.
        Raises:
            ValueError: if the shape is another, or a value is not finite.
        """
        if features.ndim != 2 or (self.mean is not None and features.shape[1] != len(self.mean)):
            wanted = "D" if self.mean is None else len(self.mean)
            raise ValueError(f"`features` must have shape (B, {wanted}), got {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError("`features` must be finite, got NaN or infinity.")
        part = RunningStatistics()
        if len(features):
            rows = features.detach().cpu().double()
            part.count, part.mean = len(rows), rows.mean(dim=0)
            rows = rows - part.mean
            part.scatter = rows.T @ rows
        return self.merge(part)

    def merge(self, other: "RunningStatistics") -> "RunningStatistics":
        """Add the rows that another has seen.

        Args:
            other (RunningStatistics): of the same D, left as it is.
        Returns:
            RunningStatistics: itself.
        """
        if self.count == 0 or other.count == 0:
            if self.count == 0:
                self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return self
        count, difference = self.count + other.count, other.mean - self.mean
        self.mean = self.mean + difference * (other.count / count)
        weight = self.count * other.count / count
        self.scatter = self.scatter + other.scatter + torch.outer(difference, difference) * weight
        self.count = count
        return self

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, float64, shape (D, D).

        Raises:
            ValueError: for fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, what FID is of Inception features.

        ‖μ - μ'‖² + tr Σ + tr Σ' - 2 ‖Σ^½ Σ'^½‖_*          (Dowson and Landau 1982)
    The nuclear norm, a sum of singular values, equals tr (Σ Σ')^½. Unlike the square root of the product, which is not
    symmetric, it is exact for covariances without full rank and never complex.

    Args:
        mean, other_mean (torch.Tensor or array): shape (D,).
        covariance, other_covariance (torch.Tensor or array): symmetric and positive semi-definite, shape (D, D).
    Returns:
        float: computed in float64, not negative.
    Raises:
        ValueError: if shapes differ, a value is not finite, or a matrix is no covariance.
    """
    tensors = {"mean": mean, "covariance": covariance, "other_mean": other_mean, "other_covariance": other_covariance}
    tensors = {name: torch.as_tensor(values) for name, values in tensors.items()}
    size = len(tensors["mean"]) if tensors["mean"].ndim == 1 else "D"
    for name, tensor in tensors.items():
        shape = (size,) * (1 + name.endswith("covariance"))
        if tensor.shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}.")
        if not tensor.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    mean, covariance, other_mean, other_covariance = (tensor.cpu().double() for tensor in tensors.values())
    roots = _matrix_root(covariance, "covariance") @ _matrix_root(other_covariance, "other_covariance")
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace()
    return max((distance - 2 * torch.linalg.svdvals(roots).sum()).item(), 0.0)


def _matrix_root(covariance: torch.Tensor, name: str) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    largest = values.abs().max()
    # What rounding leaves of a zero eigenvalue; its root would be 1e-8 of the largest one.
    rounding = len(values) * torch.finfo(torch.float64).eps * largest
    asymmetry = (covariance - covariance.T).abs().max()
    if values[0] < -1e-6 * largest or asymmetry > 1e-6 * largest:
        raise ValueError(
            f"`{name}` must be symmetric and positive semi-definite, got an asymmetry of {asymmetry:.2g} and "
            f"eigenvalues from {values[0]:.2g} to {values[-1]:.2g}."
        )
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


def rank_warning(num_images: int, num_features: int, what: str) -> str | None:
    """What to say of a covariance from too few images, if there is something to say.

    Args:
        num_images (int): images it was estimated from.
        num_features (int): its side D.
        what (str): which images, for the text.
    Returns:
        str or None: a warning where the covariance cannot have full rank, D images or fewer.
    """
    if num_images > num_features:
        return None
    return (
        f"{num_images} {what} for {num_features} features: their covariance has rank {num_images - 1} at most, so "
        f"that the Fréchet distance is far too large and not comparable. Take more than {num_features}, better ten "
        "times as many."
    )
