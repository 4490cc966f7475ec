"""Held-out losses at fixed noise levels, of a model whose error is known."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.distributions import Normal

from diffusers_mp.training import DDPMObjective, FlowMatchObjective, validation_losses, validation_timesteps


def ddpm():
    return DDPMObjective(DDPMScheduler(variance_type="fixed_small", clip_sample=False))


def flow(**kwargs):
    return FlowMatchObjective(FlowMatchEulerDiscreteScheduler(), **kwargs)


def test_levels_are_the_middles_of_equally_likely_parts():
    assert validation_timesteps(ddpm(), 8).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert validation_timesteps(ddpm(), 10).tolist() == list(range(50, 1000, 100))
    levels = validation_timesteps(flow(), 8)
    assert levels.dtype == torch.float32
    expected = torch.sigmoid(Normal(0.0, 1.0).icdf((torch.arange(8) + 0.5) / 8))
    assert levels.tolist() == (1000 * expected).round().tolist()


def test_each_level_comes_once():
    assert validation_timesteps(ddpm(), 2000).tolist() == list(range(1000))
    assert validation_timesteps(flow(logit_std=1e-4), 8).tolist() == [500]


class Model(nn.Module):
    """Predicts nothing, and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, hidden_states, timestep, class_labels=None):
        self.asked.append((hidden_states, timestep, class_labels))

        class Output:
            sample = torch.zeros_like(hidden_states)

        return Output


@pytest.mark.parametrize("objective", [ddpm(), flow()], ids=["ddpm", "flow"])
@pytest.mark.parametrize("labelled", [True, False])
def test_losses_are_means_over_samples_and_levels(objective, labelled):
    latents, noise, labels = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4), torch.arange(5)
    batches = [{"latents": latents[part], "noise": noise[part]} for part in (slice(0, 3), slice(3, 5))]
    if labelled:
        batches[0]["class_label"], batches[1]["class_label"] = labels[:3], labels[3:]
    model, levels = Model(), validation_timesteps(objective, 4)
    losses = validation_losses(model, objective, batches, levels, torch.device("cpu"))

    # A prediction of 0 is off by the target, at all levels alike.
    expected = (noise if isinstance(objective, DDPMObjective) else noise - latents).square().mean().item()
    names = [f"mse_t{round(level):04d}" for level in levels.tolist()]
    assert list(losses) == ["loss", "mse", *names]
    assert losses == pytest.approx(dict.fromkeys(losses, expected))
    assert len(model.asked) == 8
    for call, (hidden_states, timestep, class_labels) in enumerate(model.asked):
        part, level = (slice(0, 3), slice(3, 5))[call // 4], levels[call % 4]
        assert torch.equal(timestep, level.expand(len(latents[part])))
        assert torch.equal(hidden_states, objective.add_noise(latents[part], noise[part], timestep))
        assert class_labels is None if not labelled else torch.equal(class_labels, labels[part])


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="`batches` must hold samples, got none"):
        validation_losses(Model(), flow(), [], torch.tensor([500.0]), torch.device("cpu"))


def test_levels_are_told_apart():
    objective, latents = flow(), torch.randn(3, 2, 4, 4)
    levels = torch.tensor([0.0, 500.0, 1000.0])

    class Identity(Model):
        def forward(self, hidden_states, timestep, class_labels=None):
            output = super().forward(hidden_states, timestep, class_labels)
            output.sample = hidden_states
            return output

    noise = torch.zeros_like(latents)
    losses = validation_losses(
        Identity(), objective, [{"latents": latents, "noise": noise}], levels, torch.device("cpu")
    )
    # Without noise x_σ = (1 - σ) x_0 and the target is -x_0: an error of (2 - σ) x_0.
    square = latents.square().mean().item()
    assert losses["mse_t0000"] == pytest.approx(4 * square)
    assert losses["mse_t0500"] == pytest.approx(2.25 * square)
    assert losses["mse_t1000"] == pytest.approx(square)
    assert losses["mse"] == losses["loss"] == pytest.approx((4 + 2.25 + 1) / 3 * square)
