"""Precision and recall by hand and against brute force."""

import sys

import numpy as np
import pytest
import torch
from helpers import normal_rows

from diffusers_mp.evaluation.precision_recall import precision_recall


def brute_force(points, queries, k):
    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    radii = [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]
    return np.mean([any(distance(q, p) <= r for p, r in zip(points, radii, strict=True)) for q in queries])


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_hand(k, monkeypatch):
    real, made = normal_rows(40, 3), normal_rows(30, 3, seed=1, scale=0.6, offset=0.3)
    made[:5] += 50
    expected = brute_force(real.numpy(), made.numpy(), k), brute_force(made.numpy(), real.numpy(), k)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(real, made, k) == pytest.approx(expected)
    monkeypatch.setattr(sys.modules["diffusers_mp.evaluation.precision_recall"], "_BLOCK_SIZE", 100)
    assert precision_recall(real, made, k) == pytest.approx(expected)


def test_precision_and_recall_at_their_ends():
    real = normal_rows(50, 4, offset=1e4)
    assert precision_recall(real, real.clone()) == (1, 1)
    assert precision_recall(real, real + 1e3) == (0, 0)
    # A single mode out of two: all that is generated is real, half of what is real is generated.
    modes = torch.cat([normal_rows(50, 4, seed=1), normal_rows(50, 4, seed=2) + 100])
    assert precision_recall(modes, modes[:50]) == (1, 0.5)
    # Copies of one image: radii are 0, and so are distances.
    same = normal_rows(1, 4, offset=1e4).expand(10, 4)
    assert precision_recall(same, same.clone()) == (1, 1)


def test_precision_needs_more_images_than_neighbours():
    with pytest.raises(ValueError, match="less than the number of images, got 3 for 5 real and 3 generated"):
        precision_recall(normal_rows(5, 2), normal_rows(3, 2))
    with pytest.raises(ValueError, match=r"got \(5, 2\) and \(5, 3\)"):
        precision_recall(normal_rows(5, 2), normal_rows(5, 3))
