"""Rectified flow against its equations, with numbers of the scheduler and of torch's distributions."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.distributions import Normal

from diffusers_mp.training import FlowMatchObjective


SHAPE = (4, 3, 5, 6)


def objective(*, logit_mean=0.0, logit_std=1.0, **kwargs):
    return FlowMatchObjective(FlowMatchEulerDiscreteScheduler(**kwargs), logit_mean, logit_std)


def batch(dtype=torch.float64):
    latents, noise = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
    return latents, noise, torch.tensor([0.0, 250.5, 800.0, 1000.0])


@pytest.mark.parametrize("logit_mean, logit_std", [(0.0, 1.0), (-0.5, 0.8), (1.0, 1.5)])
def test_times_become_logit_normal_timesteps(logit_mean, logit_std):
    time = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    timesteps = objective(logit_mean=logit_mean, logit_std=logit_std).timesteps(time)
    assert timesteps.dtype == torch.float32
    # The share of timesteps below one of them is the time that it was made of.
    logits = torch.logit(timesteps.double() / 1000)
    torch.testing.assert_close(Normal(logit_mean, logit_std).cdf(logits), time, rtol=0, atol=1e-6)
    assert (timesteps.diff() > 0).all()
    ends = torch.tensor([0.0, math.nextafter(1, 0)], dtype=torch.float64)
    first, last = objective(logit_mean=logit_mean, logit_std=logit_std).timesteps(ends).tolist()
    assert first == 0
    assert 990 < last <= 1000


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_shifted_times_are_those_of_a_shifted_mean(shift):
    time = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    sigmas = objective().timesteps(time).double() / 1000
    shifted = shift * sigmas / (1 + (shift - 1) * sigmas)
    of_mean = objective(logit_mean=math.log(shift)).timesteps(time).double()
    torch.testing.assert_close(of_mean, 1000 * shifted, rtol=1e-6, atol=0)
    # The scheduler's own table: its timesteps 1 to 1000, shifted.
    plain, table = (FlowMatchEulerDiscreteScheduler(shift=s).sigmas.double() for s in (1.0, shift))
    torch.testing.assert_close(torch.logit(table[1:]), torch.logit(plain[1:]) + math.log(shift), rtol=1e-4, atol=1e-4)


def test_noise_is_added_on_a_straight_line():
    latents, noise, timesteps = batch()
    sigmas = torch.tensor([0.0, 0.2505, 0.8, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    noisy = objective().add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, (1 - sigmas) * latents + sigmas * noise)
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[3], noise[3])


def test_noise_is_that_of_the_scheduler_at_its_own_timesteps():
    flow = objective()
    latents, noise, _ = batch(torch.float32)
    timesteps = flow.scheduler.timesteps[[3, 500, 700, 999]]
    expected = flow.scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(flow.add_noise(latents, noise, timesteps), expected)


def test_noise_of_low_precision_latents_is_added_in_float32():
    latents, noise, timesteps = batch(torch.float32)
    latents, noise = latents.bfloat16(), noise.bfloat16()
    noisy = objective().add_noise(latents, noise, timesteps)
    assert torch.equal(noisy, objective().add_noise(latents.float(), noise.float(), timesteps).bfloat16())
    terms = objective().loss(noise, latents, noise, timesteps)
    torch.testing.assert_close(terms["mse"], latents.float().square().mean(dim=(1, 2, 3)))
    assert terms["mse"].dtype == torch.float32


def test_the_target_is_the_velocity_of_the_line():
    flow = objective()
    latents, noise, timesteps = batch()
    velocity = noise - latents
    later = flow.add_noise(latents, noise, torch.full((4,), 600.0))
    earlier = flow.add_noise(latents, noise, torch.full((4,), 350.0))
    torch.testing.assert_close((later - earlier) / 0.25, velocity)
    assert torch.equal(flow.loss(velocity, latents, noise, timesteps)["loss"], torch.zeros(4, dtype=torch.float64))


def test_loss_is_the_mean_squared_error_per_sample():
    latents, noise, timesteps = batch()
    prediction = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    terms = objective().loss(prediction, latents, noise, timesteps)
    assert set(terms) == {"loss", "mse"}
    for index in range(4):
        expected = ((prediction[index] + latents[index] - noise[index]) ** 2).mean()
        torch.testing.assert_close(terms["loss"][index], expected)
    assert torch.equal(terms["loss"], terms["mse"])
    terms["loss"].sum().backward()
    assert (prediction.grad != 0).all()


def test_nothing_is_read_back_from_the_device():
    with torch.device("meta"):
        latents, timesteps = torch.randn(SHAPE), torch.rand(4)
        assert objective().add_noise(latents, latents, timesteps).is_meta
        assert objective().loss(latents, latents, latents, timesteps)["loss"].is_meta
        assert objective().timesteps(timesteps).is_meta


def test_the_preview_is_a_fresh_scheduler_of_the_same_config():
    flow = objective(shift=2.0)
    preview = flow.preview_scheduler()
    assert preview is not flow.scheduler
    assert preview.config == flow.scheduler.config


def test_other_schedulers_are_refused():
    message = "`scheduler` must be a FlowMatchEulerDiscreteScheduler, got DDPMScheduler"
    with pytest.raises(TypeError, match=message):
        FlowMatchObjective(DDPMScheduler())
    with pytest.raises(ValueError, match="`invert_sigmas` of `scheduler` must be False"):
        objective(invert_sigmas=True)


@pytest.mark.parametrize("logit_std", [0.0, -1.0, float("nan")])
def test_std_must_be_positive(logit_std):
    with pytest.raises(ValueError, match="`logit_std` must be positive, got"):
        objective(logit_std=logit_std)


@pytest.mark.parametrize(
    "timesteps, message",
    [
        (torch.zeros(4, dtype=torch.int64), r"must be float32 or float64 of shape \(4,\), got torch.int64"),
        (torch.zeros(4, dtype=torch.bfloat16), "got torch.bfloat16"),
        (torch.zeros(3), r"got torch.float32 of shape \(3,\)"),
        (torch.tensor([0.0, 1.0, 2.0, 1000.5]), r"must lie in \[0, 1000\], got 0.0 to 1000.5"),
        (torch.tensor([0.0, 1.0, 2.0, -0.5]), "got -0.5 to 2.0"),
    ],
)
def test_timesteps_that_are_none_are_refused(timesteps, message):
    latents = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=message):
        objective().add_noise(latents, latents, timesteps)
    with pytest.raises(ValueError, match=message):
        objective().loss(latents, latents, latents, timesteps)


def test_tensors_and_times_that_do_not_fit_are_refused():
    latents, timesteps = torch.randn(SHAPE), torch.zeros(4)
    with pytest.raises(ValueError, match=r"`noise` must have shape \(4, 3, 5, 6\), got \(1, 3, 5, 6\)"):
        objective().add_noise(latents, latents[:1], timesteps)
    with pytest.raises(ValueError, match=r"`prediction` must have shape \(4, 3, 5, 6\).* got \(4, 6, 5, 6\)"):
        objective().loss(torch.randn(4, 6, 5, 6), latents, latents, timesteps)
    with pytest.raises(ValueError, match=r"`time` must lie in \[0, 1\), got 1.0 to 1.0"):
        objective().timesteps(torch.ones(2))


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_times_are_drawn_under_the_shift_of_the_sampler(time_shift_type):
    time = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    plain = objective().timesteps(time).double() / 1000
    constant = objective(shift=3.0).timesteps(time).double() / 1000
    torch.testing.assert_close(torch.logit(constant), torch.logit(plain) + math.log(3), rtol=1e-4, atol=1e-4)
    options = {"use_dynamic_shifting": True, "time_shift_type": time_shift_type}
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.4, max_shift=2.0, **options)
    mu = calculate_shift(1000, base_shift=0.4, max_shift=2.0)
    dynamic = FlowMatchObjective(scheduler, num_tokens=1000).timesteps(time).double() / 1000
    torch.testing.assert_close(dynamic, scheduler.time_shift(mu, 1.0, plain), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="`num_tokens` must be the number of image tokens .* got None"):
        FlowMatchObjective(scheduler)


def test_shifts_of_the_recipe_end_in_the_scheduler():
    config = {"in_channels": 768, "sample_size": 16, "patch_size": 1}
    flow = FlowMatchObjective.of_recipe("flow_prediction", config, shift="dimension")
    # arXiv 2510.11690: √(768 · 16 · 16 / 4096).
    assert flow.shift == flow.scheduler.config.shift == pytest.approx(math.sqrt(48))
    assert FlowMatchObjective.of_recipe("flow_sample", config, shift=2.5).scheduler.config.shift == 2.5
    flow = FlowMatchObjective.of_recipe("flow_prediction", config, shift="resolution", base_shift=0.3, max_shift=2.0)
    stored = flow.preview_scheduler().config
    assert (stored.use_dynamic_shifting, stored.base_shift, stored.max_shift) == (True, 0.3, 2.0)
    assert flow.shift == pytest.approx(math.exp(calculate_shift(256, base_shift=0.3, max_shift=2.0)))
