"""Nine pairs of a prediction and a space of its loss, of flows and diffusions, by solving for x and ε in float64."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_mp.predictions import LOSS_SPACES, MIN_DENOMINATOR
from diffusers_mp.training import DDPMObjective, FlowMatchObjective


FLOW = {"flow_sample": "sample", "flow_epsilon": "epsilon", "flow_prediction": "velocity"}
DIFFUSION = {"sample": "sample", "epsilon": "epsilon", "v_prediction": "velocity"}
PAIRS = [(kind, space) for kind in (*FLOW, *DIFFUSION) for space in LOSS_SPACES]
# Where neither share is below the limit of denominators: t, or whole timesteps.
INNER = {"flow": [60.0, 250.5, 500.0, 940.0], "diffusion": [20, 100, 300, 600]}


def objective_of(kind, loss_space):
    if kind in FLOW:
        return FlowMatchObjective(FlowMatchEulerDiscreteScheduler(), prediction_type=kind, loss_space=loss_space)
    options = {"prediction_type": kind, "variance_type": "fixed_small", "clip_sample": False}
    return DDPMObjective(DDPMScheduler(**options), loss_space=loss_space)


def shares(objective, timesteps):
    """Signal and rate of each timestep, by the definitions."""
    if isinstance(objective, FlowMatchObjective):
        return 1 - timesteps.double() / 1000, timesteps.double() / 1000
    alphas_cumprod = objective.scheduler.alphas_cumprod.double()[timesteps]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def row(space, signal, rate, is_flow):
    """What is meant, as weights of x and of ε."""
    velocity = (-1.0, 1.0) if is_flow else (-rate, signal)
    return torch.tensor({"sample": (1.0, 0.0), "epsilon": (0.0, 1.0), "velocity": velocity}[space]).double()


def batch(timesteps):
    latents, noise, prediction = torch.randn(3, len(timesteps), 2, 3, 4, dtype=torch.float64)
    return prediction, latents, noise, torch.tensor(timesteps)


@pytest.mark.parametrize("kind, space", PAIRS)
def test_a_loss_is_that_of_what_the_prediction_says_there(kind, space):
    is_flow = kind in FLOW
    objective = objective_of(kind, space)
    prediction, latents, noise, timesteps = batch(INNER["flow" if is_flow else "diffusion"])
    noisy = objective.add_noise(latents, noise, timesteps)
    terms = objective.loss(prediction, latents, noise, timesteps)
    for i, (signal, rate) in enumerate(zip(*shares(objective, timesteps), strict=True)):
        # x and ε that make both x_t and the prediction.
        known = torch.stack([torch.stack([signal, rate]), row({**FLOW, **DIFFUSION}[kind], signal, rate, is_flow)])
        said = torch.linalg.solve(known, torch.stack([noisy[i].flatten(), prediction[i].flatten()]))
        meant = torch.stack([latents[i].flatten(), noise[i].flatten()])
        expected = (row(space, signal, rate, is_flow) @ (said - meant)).square().mean()
        torch.testing.assert_close(terms["mse"][i], expected)
    assert torch.equal(terms["loss"], terms["mse"])


# What an error of 1 is in each space at both ends of time, where shares are below the limit c.
c = MIN_DENOMINATOR
FLOW_ENDS = {
    "flow_sample": {"sample": (1, 1), "epsilon": (1 / c, 0), "velocity": (1 / c, 1)},
    "flow_epsilon": {"sample": (0, 1 / c), "epsilon": (1, 1), "velocity": (1, 1 / c)},
    "flow_prediction": {"sample": (0, 1), "epsilon": (1, 0), "velocity": (1, 1)},
}
# √ᾱ and √(1 - ᾱ) of diffusers' default β, 1e-4 to 0.02: 0.99995 and 0.01 first, 0.00635 and 0.99998 at last.
DIFFUSION_ENDS = {
    "sample": {"sample": (1, 1), "epsilon": (0.99995 / c, 0.00635), "velocity": (1 / c, 1.00002)},
    "epsilon": {"sample": (0.01, 0.99998 / c), "epsilon": (1, 1), "velocity": (1.00005, 1 / c)},
    "v_prediction": {"sample": (0.01, 0.99998), "epsilon": (0.99995, 0.00635), "velocity": (1, 1)},
}


@pytest.mark.parametrize("kind, space", PAIRS)
def test_denominators_are_clipped_at_both_ends_of_time(kind, space):
    assert c == 0.05
    objective = objective_of(kind, space)
    _, latents, noise, timesteps = batch([0.0, 1000.0] if kind in FLOW else [0, 999])
    mean = {"sample": latents, "epsilon": noise, "velocity": noise - latents}[{**FLOW, **DIFFUSION}[kind]]
    if kind == "v_prediction":
        signal, rate = (share.view(-1, 1, 1, 1) for share in shares(objective, timesteps))
        mean = signal * noise - rate * latents
    prediction = (mean + 1).requires_grad_()
    loss = objective.loss(prediction, latents, noise, timesteps)["loss"]
    factors = torch.tensor({**FLOW_ENDS, **DIFFUSION_ENDS}[kind][space], dtype=torch.float64)
    torch.testing.assert_close(loss.sqrt(), factors, rtol=1e-3, atol=0)
    loss.sum().backward()
    # Of a mean of 24 squared errors of 1.
    expected = (2 / 24 * factors.square()).view(-1, 1, 1, 1).expand_as(prediction)
    torch.testing.assert_close(prediction.grad, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", [*FLOW, *DIFFUSION])
def test_the_loss_is_in_the_space_of_the_prediction_by_default(kind):
    own = {**FLOW, **DIFFUSION}[kind]
    arguments = batch([0.0, 400.0, 1000.0] if kind in FLOW else [0, 400, 999])
    by_default = objective_of(kind, None)
    assert by_default.loss_space == own
    assert torch.equal(by_default.loss(*arguments)["loss"], objective_of(kind, own).loss(*arguments)["loss"])


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_sample_and_the_noise_it_implies_have_one_bound(variance_type):
    _, latents, noise, timesteps = batch([0, 1, 500, 999])
    options = {"variance_type": variance_type, "clip_sample": False}
    of_sample = DDPMObjective(DDPMScheduler(prediction_type="sample", **options))
    signal, rate = (share.view(-1, 1, 1, 1) for share in shares(of_sample, timesteps))
    sample = latents + 0.1 * torch.randn_like(latents)
    implied = (signal * latents + rate * noise - signal * sample) / rate
    expected = DDPMObjective(DDPMScheduler(**options)).loss(implied, latents, noise, timesteps)["vb"]
    got = of_sample.loss(sample, latents, noise, timesteps)["vb"]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_a_sample_may_be_predicted_where_there_is_no_signal():
    options = {"prediction_type": "sample", "variance_type": "fixed_small", "clip_sample": False}
    objective = DDPMObjective(DDPMScheduler(rescale_betas_zero_snr=True, **options))
    prediction, latents, noise, timesteps = batch([999])
    terms = objective.loss(prediction, latents, noise, timesteps)
    torch.testing.assert_close(terms["mse"], (prediction - latents).square().mean(dim=(1, 2, 3)))
    assert terms["vb"].isfinite().all()


def test_what_has_no_meaning_is_refused():
    schedule = DDPMScheduler(variance_type="fixed_small")
    with pytest.raises(ValueError, match=r"`loss_space` must be one of \['sample', 'epsilon', 'velocity'\], got 'v'"):
        DDPMObjective(schedule, loss_space="v")
    with pytest.raises(ValueError, match="`loss_space` must be None with `snr_gamma`, whose weights .* got 'sample'"):
        DDPMObjective(schedule, snr_gamma=5.0, loss_space="sample")
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="`prediction_type` must be one of .*'flow_sample'.* got 'sample'"):
        FlowMatchObjective(flow, prediction_type="sample")


def test_min_snr_makes_the_loss_the_same_in_every_space():
    """Which is why another space than the prediction's is refused."""
    _, latents, noise, timesteps = batch(INNER["diffusion"])
    signal, rate = (share.view(-1, 1, 1, 1) for share in shares(objective_of("sample", None), timesteps))
    sample = latents + 0.1 * torch.randn_like(latents)
    implied = (signal * latents + rate * noise - signal * sample) / rate
    said = {"sample": sample, "epsilon": implied, "v_prediction": signal * implied - rate * sample}
    losses = []
    for kind, prediction in said.items():
        schedule = DDPMScheduler(prediction_type=kind, variance_type="fixed_small", clip_sample=False)
        losses.append(DDPMObjective(schedule, snr_gamma=5.0).loss(prediction, latents, noise, timesteps)["loss"])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
