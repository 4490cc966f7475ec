"""The Fréchet distance against closed forms and another algorithm, moments against NumPy."""

import copy

import numpy as np
import pytest
import torch
from helpers import normal_rows
from scipy.linalg import sqrtm

from diffusers_mp import frechet_distance
from diffusers_mp.evaluation.frechet import RunningStatistics, rank_warning


def random_covariance(size, rank, seed):
    factor = normal_rows(size, rank, seed)
    return factor @ factor.T / rank


def test_distance_of_gaussians_with_commuting_covariances():
    # Σ = Q diag(a) Qᵀ, Σ' = Q diag(b) Qᵀ: the sum of (√a - √b)² and of the squared differences of the means.
    basis = torch.linalg.qr(normal_rows(12, 12))[0]
    a, b = normal_rows(12, 1, seed=1).flatten().abs(), normal_rows(12, 1, seed=2).flatten().abs()
    a[:4], b[3:6] = 0, 0
    mean, other = normal_rows(12, 1, seed=3).flatten(), normal_rows(12, 1, seed=4).flatten()
    expected = (a.sqrt() - b.sqrt()).square().sum() + (mean - other).square().sum()
    distance = frechet_distance(mean, basis @ a.diag() @ basis.T, other, basis @ b.diag() @ basis.T)
    assert distance == pytest.approx(expected.item(), rel=1e-12)


def test_distance_in_two_dimensions():
    # tr √M = √(tr M + 2 √det M) for 2x2.
    first, second = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, -0.7], [-0.7, 3.0]])
    product = first.double() @ second.double()
    cross = (product.trace() + 2 * (product[0, 0] * product[1, 1] - product[0, 1] * product[1, 0]).sqrt()).sqrt()
    tensors = torch.zeros(2), first, torch.tensor([3.0, 4.0]), second
    # Arrays too, as files of FID's statistics hold them.
    for arguments in (tensors, [tensor.numpy() for tensor in tensors], [tensor.tolist() for tensor in tensors]):
        assert frechet_distance(*arguments) == pytest.approx(25 + 3 + 4 - 2 * cross.item(), rel=1e-12)


@pytest.mark.parametrize("rank", [40, 8])
def test_distance_equals_the_square_root_by_schur(rank):
    first, second = random_covariance(24, rank, 1), random_covariance(24, rank, 2)
    mean, other = normal_rows(24, 1, seed=3).flatten(), normal_rows(24, 1, seed=4).flatten()
    # Without full rank the root of the product, which is not symmetric, is computed badly: hence the ridge.
    ridge = (1e-9 if rank < 24 else 0) * torch.eye(24, dtype=torch.float64)
    root = np.trace(sqrtm(((first + ridge) @ (second + ridge)).numpy())).real
    expected = (mean - other).square().sum() + first.trace() + second.trace() - 2 * root
    tolerance = 1e-5 if rank < 24 else 1e-11
    assert frechet_distance(mean, first, other, second) == pytest.approx(expected.item(), rel=tolerance)


def test_distance_is_a_metric_s_square():
    covariances = [random_covariance(6, rank, rank) for rank in (2, 4, 9)]
    means = [normal_rows(6, 1, seed=seed).flatten() for seed in range(3)]
    gaussians = list(zip(means, covariances, strict=True))
    distance = {(i, j): frechet_distance(*gaussians[i], *gaussians[j]) for i in range(3) for j in range(3)}
    for i in range(3):
        assert distance[i, i] < 1e-12 * covariances[i].trace()
        for j in range(3):
            assert distance[i, j] == pytest.approx(distance[j, i], rel=1e-12, abs=1e-12)
            assert all(distance[i, j] ** 0.5 <= distance[i, m] ** 0.5 + distance[m, j] ** 0.5 + 1e-6 for m in range(3))


def test_distance_of_samples_approaches_that_of_their_gaussians():
    first, second = (RunningStatistics().update(normal_rows(20_000, 5, k, scale=k, offset=k)) for k in (1, 2))
    estimate = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    # 5 · ((2 - 1)² + (1 - 0)²); errors of 1 / √20000 in each mean and std.
    assert estimate == pytest.approx(10, rel=0.03)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mean": torch.zeros(3)}, r"`covariance` must have shape \(3, 3\), got \(2, 2\)"),
        ({"other_mean": torch.tensor([0.0, torch.nan])}, "`other_mean` must be finite"),
        ({"covariance": -torch.eye(2)}, "`covariance` must be symmetric and positive semi-definite, .* from -1 to -1"),
        ({"other_covariance": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "got an asymmetry of 0.5"),
        ({"mean": torch.zeros(1, 2)}, r"`mean` must have shape \('D',\), got \(1, 2\)"),
    ],
)
def test_what_is_no_gaussian_is_refused(changes, message):
    gaussians = {"mean": torch.zeros(2), "covariance": torch.eye(2)}
    gaussians |= {f"other_{name}": tensor for name, tensor in gaussians.items()}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**gaussians | changes)


def test_moments_of_merged_batches_are_those_of_all_rows():
    # A mean of 1e6 times the deviation: sums of squares in float64 would keep 4 digits.
    features = normal_rows(100, 7, offset=1e6)
    parts = [RunningStatistics() for _ in range(4)]
    for part, start, end in zip(parts, (0, 1, 50, 100), (1, 50, 100, 100), strict=True):
        for batch in features[start:end].split(9):
            part.update(batch)
    merged = RunningStatistics()
    for part in parts:
        before = copy.deepcopy(part)
        merged.merge(part)
        assert part.count == before.count
        assert part.mean is before.mean or torch.equal(part.mean, before.mean)
    assert merged.count == 100
    assert torch.allclose(merged.mean, torch.from_numpy(features.numpy().mean(0)), rtol=1e-15)
    assert np.allclose(merged.covariance, np.cov(features.numpy().T), rtol=1e-8, atol=1e-9)


def test_moments_refuse_what_they_cannot_take():
    statistics = RunningStatistics()
    with pytest.raises(ValueError, match="at least 2 rows, got 0"):
        _ = statistics.covariance
    statistics.update(normal_rows(1, 3))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match=r"must have shape \(B, 3\), got \(2, 4\)"):
        statistics.update(normal_rows(2, 4))
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        statistics.update(torch.full((1, 3), torch.nan))
    assert statistics.count == 1


def test_rank_warning_says_when_the_covariance_cannot_have_full_rank():
    for count in (8, 9):
        rank = torch.linalg.matrix_rank(RunningStatistics().update(normal_rows(count, 8)).covariance)
        assert (rank < 8) == (rank_warning(count, 8, "images") is not None)
    assert "8 images for 8 features: their covariance has rank 7 at most" in rank_warning(8, 8, "images")
