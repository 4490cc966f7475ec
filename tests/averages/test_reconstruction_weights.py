"""Weights of snapshots for an average of any width: golden numbers, limits, and averages tracked directly."""

import json

import numpy as np
import pytest
from helpers import ROOT

from diffusers_mp.averages.reconstruction import reconstruction_weights


POSTHOC = json.loads((ROOT / "tests" / "fixtures" / "golden" / "ema.json").read_text())["posthoc"]
SNAPSHOT_STEPS, SNAPSHOT_STDS = zip(*POSTHOC["snapshots_step_std"], strict=True)


@pytest.mark.parametrize("std", POSTHOC["weights_for_std_at_step_1000"])
def test_reconstruction_weights_are_the_golden_ones(std):
    weights = reconstruction_weights(SNAPSHOT_STEPS, SNAPSHOT_STDS, 1000, float(std))
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, POSTHOC["weights_for_std_at_step_1000"][std], rtol=0, atol=1e-9)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_reconstructing_a_snapshot_takes_that_snapshot():
    weights = reconstruction_weights(SNAPSHOT_STEPS, SNAPSHOT_STDS, 750, 0.10)
    np.testing.assert_allclose(weights, np.eye(8)[5], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "steps, stds, step, message",
    [
        ([], [], 10, "same length, at least 1, got 0 and 0"),
        ([5, 10], [0.05], 10, "same length, at least 1, got 2 and 1"),
        ([5, 5], [0.05, 0.05], 10, "snapshots must differ in step or std"),
        ([0, 5], [0.05, 0.05], 10, "steps must be 1 or more"),
        ([5], [0.05], 0, "steps must be 1 or more, got `step` 0"),
        ([5], [0.5], 5, "`std` must lie in"),
    ],
)
def test_snapshots_that_make_no_system_are_refused(steps, stds, step, message):
    with pytest.raises(ValueError, match=message):
        reconstruction_weights(steps, stds, step, 0.05)
