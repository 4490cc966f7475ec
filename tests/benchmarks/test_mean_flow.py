"""MeanFlow on digits: what the loss asks for, and the experiment in small."""

import inspect

import mean_flow
import pytest
import torch
from helpers import ROOT


# PyTorch's forward mode imports what it has itself deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

TINY = {"width": 32, "num_layers": 1, "num_updates": 4}


def test_the_target_is_that_of_the_mean_velocity(monkeypatch):
    # Of a point x of data, noise starts at z_t and ends at x: the mean velocity is v = (z_t - x) / t for all r. A
    # function that knows it has no loss, and one that is off by a (t - r) has an error of a ((t - r) + (t - r)).
    image = torch.randn(1, 1, 8, 8).expand(64, 1, 8, 8)

    def loss_of(offset):
        def mean_velocity(model, noisy, r, t, class_labels):
            return (noisy - image) / t[:, None, None, None] + offset * (t - r)[:, None, None, None]

        monkeypatch.setattr(mean_flow, "mean_velocity", mean_velocity)
        return mean_flow.mean_flow_loss(None, image, None, 0.0, torch.Generator().manual_seed(0)).item()

    assert loss_of(0.0) < 1e-6
    times = (torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) - 0.4).sigmoid()
    error = (2 * 0.5 * (times[0] - times[1])).square()
    assert loss_of(0.5) == pytest.approx((error / (error + 1e-3)).mean().item(), rel=1e-3)


def test_the_page_has_the_loss_of_the_experiment():
    page = (ROOT / "docs" / "derivatives.md").read_text()
    for function in (mean_flow.mean_velocity, mean_flow.mean_flow_loss):
        assert inspect.getsource(function) in page


@pytest.mark.slow  # trains two models, and a judge for each
def test_a_record_and_its_table(monkeypatch, capsys):
    for name, value in (("NUM_SAMPLES", 20), ("NUM_JUDGE_STEPS", 3)):
        monkeypatch.setattr(mean_flow, name, value)
    records = []
    for arm in mean_flow.ARMS:
        run = mean_flow.Run(arm, 0, **TINY)
        records.append(run._asdict() | mean_flow.train(run))
        assert mean_flow.train(run)["recognised"] == records[-1]["recognised"]
    mean_flow.report(records)
    assert "| mean flow | 0." in capsys.readouterr().out
