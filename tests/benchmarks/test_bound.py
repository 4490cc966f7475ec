"""The screen of bounds: the cap itself, and a short training in which it holds."""

import pytest
import torch
from helpers import BENCHMARKS


@pytest.fixture
def bound(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "quality"))
    import bound

    return bound


def test_tokens_are_capped_and_small_ones_are_left_alone(bound):
    tokens = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    torch.testing.assert_close(
        bound.capped(tokens, 1.0), torch.tensor([[3.0, 4.0], [0.6, 0.8]]) / tokens.new_tensor([[12.5**0.5], [1.0]])
    )
    assert torch.equal(bound.capped(tokens, 4.0), tokens)


@pytest.mark.parametrize("place", ["stream", "both"])
def test_the_stream_of_a_training_stays_below_its_limit(bound, place):
    plain = bound.fused.gated_sum
    record = bound.train(bound.Run(place, 1.0, "rotate", 0.5, 0, width=32, num_layers=2, num_updates=7))
    assert record["ended"]
    assert 0.9 < record["largest_rms"] < 1.00001
    assert bound.fused.gated_sum is plain
    free = bound.train(bound.Run("none", 0.0, "rotate", 0.5, 0, width=32, num_layers=2, num_updates=7))
    assert free["largest_rms"] > 1.5
