"""Losses against textbook forms in float64 that go the long way: noisy sample, predicted sample, both Normals."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.distributions import Normal, kl_divergence

from diffusers_mp.training import DDPMObjective


SHAPE = (4, 3, 5, 6)


def scheduler(**kwargs):
    return DDPMScheduler(**{"variance_type": "learned_range", "clip_sample": False, **kwargs})


def batch(timesteps, error=0.3, interpolation=0.5, dtype=torch.float64, channels=4):
    """A prediction off by `error` in the noise, with some interpolation between the variances."""
    shape = (len(timesteps), channels, 5, 6)
    latents, noise = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    prediction = torch.cat(
        [noise + error * torch.randn(shape, dtype=dtype), interpolation * torch.randn(shape, dtype=dtype)], dim=1
    )
    return prediction, latents, noise, torch.tensor(timesteps)


def normals(prediction, latents, noise, timestep, alphas_cumprod):
    """Posterior q(x_{t-1} | x_t, x_0) and model p(x_{t-1} | x_t) by equations 7 and 15 of arXiv 2006.11239."""
    alpha_bar = alphas_cumprod.double()[timestep]
    previous = alphas_cumprod.double()[timestep - 1] if timestep > 0 else torch.ones((), dtype=torch.float64)
    beta = 1 - alpha_bar / previous
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise

    def posterior_mean(sample):
        weight_sample = previous.sqrt() * beta / (1 - alpha_bar)
        weight_noisy = (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar)
        return weight_sample * sample + weight_noisy * noisy

    if timestep > 0:
        variance = beta * (1 - previous) / (1 - alpha_bar)
    else:
        # Clipped: that of t = 1, written out.
        ratio = alphas_cumprod.double()[1] / alpha_bar
        variance = (1 - ratio) * (1 - alpha_bar) / (1 - alphas_cumprod.double()[1])
    predicted_noise, interpolation = prediction.chunk(2, dim=1)
    predicted_sample = (noisy - (1 - alpha_bar).sqrt() * predicted_noise) / alpha_bar.sqrt()
    fraction = (interpolation + 1) / 2
    model_std = (variance ** (1 - fraction) * beta**fraction).sqrt()
    return Normal(posterior_mean(latents), variance.sqrt()), Normal(posterior_mean(predicted_sample), model_std)


@pytest.mark.parametrize("num_timesteps", [1000, 50])
def test_times_become_timesteps_that_are_equally_likely(num_timesteps):
    objective = DDPMObjective(scheduler(num_train_timesteps=num_timesteps))
    time = (torch.arange(3 * num_timesteps, dtype=torch.float64) + 0.5) / (3 * num_timesteps)
    timesteps = objective.timesteps(time)
    assert timesteps.dtype == torch.int64
    assert torch.equal(timesteps, torch.arange(num_timesteps).repeat_interleave(3))
    ends = torch.tensor([0.0, math.nextafter(1, 0)], dtype=torch.float64)
    assert objective.timesteps(ends).tolist() == [0, num_timesteps - 1]


@pytest.mark.parametrize(
    "time, message",
    [
        (torch.tensor([0.5, 1.0]), r"`time` must lie in \[0, 1\), got 0.5 to 1.0"),
        (torch.tensor([-0.1]), "got -0.1"),
        (torch.tensor([float("nan")]), "got nan"),
        (torch.tensor([0]), "`time` must be of floating point, got torch.int64"),
    ],
)
def test_times_that_are_none_are_refused(time, message):
    with pytest.raises(ValueError, match=message):
        DDPMObjective(scheduler()).timesteps(time)


def test_noise_is_added_by_the_closed_form():
    schedule = scheduler()
    _, latents, noise, timesteps = batch([0, 1, 500, 999])
    alpha_bar = schedule.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    noisy = DDPMObjective(schedule).add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise)


def test_bf16_latents_get_their_noise_at_the_first_timestep():
    latents, noise = torch.zeros(SHAPE, dtype=torch.bfloat16), torch.randn(SHAPE).bfloat16()
    timesteps = torch.zeros(4, dtype=torch.int64)
    noisy = DDPMObjective(scheduler()).add_noise(latents, noise, timesteps)
    assert noisy.dtype == torch.bfloat16
    torch.testing.assert_close(noisy.float(), 0.01 * noise.float(), rtol=0.01, atol=0)
    # Control: what the scheduler does with them on its own.
    assert scheduler().add_noise(latents, noise, timesteps).abs().max() == 0


@pytest.mark.parametrize("timestep", [1, 2, 10, 500, 999])
def test_bound_is_the_divergence_of_the_two_normals(timestep):
    schedule = scheduler()
    arguments = batch([timestep, timestep])
    posterior, model = normals(*arguments[:3], timestep, schedule.alphas_cumprod)
    expected = kl_divergence(posterior, model).flatten(1).mean(dim=1) / math.log(2)
    # The long way subtracts means that nearly agree, and loses 1 / (1 - ᾱ) of float64's digits.
    torch.testing.assert_close(DDPMObjective(schedule).loss(*arguments)["vb"], expected, rtol=1e-9, atol=0)


def test_bound_at_the_first_timestep_is_the_discretised_likelihood():
    schedule = scheduler()
    arguments = batch([0, 0, 0])
    latents = arguments[1]
    assert (latents.abs() > 1).any()
    assert (latents.abs() < 0.99).any()
    _, model = normals(*arguments[:3], 0, schedule.alphas_cumprod)
    below, above = model.cdf(latents - 1 / 255), model.cdf(latents + 1 / 255)
    probability = torch.where(latents < -0.999, above, torch.where(latents > 0.999, 1 - below, above - below))
    expected = -probability.log2().flatten(1).mean(dim=1)
    torch.testing.assert_close(DDPMObjective(schedule).loss(*arguments)["vb"], expected, rtol=1e-9, atol=0)


def test_likelihood_of_an_outlier_is_floored():
    objective = DDPMObjective(scheduler())
    latents, noise = torch.zeros(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    prediction = torch.cat([noise + 1e4, torch.zeros_like(noise)], dim=1)
    timesteps = torch.zeros(1, dtype=torch.int32)
    outlier = objective.loss(prediction, latents, noise, timesteps)["vb"]
    torch.testing.assert_close(outlier, torch.tensor([-math.log2(1e-12)]))


@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_interpolation_ends_at_the_posterior_variance_and_at_beta(timestep):
    schedule = scheduler()
    objective = DDPMObjective(schedule)
    _, latents, noise, timesteps = batch([timestep])
    schedule.alphas_cumprod = schedule.alphas_cumprod.double()
    variances = {}
    for end in (-1.0, 1.0):
        variances[end] = schedule._get_variance(timestep, torch.tensor(end, dtype=torch.float64)).exp()
        prediction = torch.cat([noise, torch.full_like(noise, end)], dim=1)
        posterior_std = schedule._get_variance(timestep, variance_type="fixed_small").sqrt()
        expected = kl_divergence(Normal(0.0, posterior_std), Normal(0.0, variances[end].sqrt())) / math.log(2)
        vb = objective.loss(prediction, latents, noise, timesteps)["vb"]
        torch.testing.assert_close(vb, expected.expand(1), rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(variances[1.0].float(), schedule.betas[timestep], rtol=1e-3, atol=0)
    # At t = 1 the two ends are a factor of two apart, so the test tells them apart.
    assert variances[1.0] > variances[-1.0]


def test_a_perfect_prediction_costs_nothing_but_the_first_likelihood():
    _, latents, noise, timesteps = batch([0, 1, 500, 999])
    terms = DDPMObjective(scheduler()).loss(
        torch.cat([noise, -torch.ones_like(noise)], dim=1), latents, noise, timesteps
    )
    assert torch.equal(terms["mse"], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(terms["vb"][1:], torch.zeros(3, dtype=torch.float64))
    assert 0 < terms["vb"][0] < 2


def test_terms_are_per_sample_means_and_add_up():
    prediction, latents, noise, timesteps = batch([0, 7, 500, 999])
    objective = DDPMObjective(scheduler())
    terms = objective.loss(prediction, latents, noise, timesteps)
    for index in range(4):
        expected = ((prediction[index, :4] - noise[index]) ** 2).mean()
        torch.testing.assert_close(terms["mse"][index], expected)
        alone = [tensor[index : index + 1] for tensor in (prediction, latents, noise, timesteps)]
        for name, value in objective.loss(*alone).items():
            torch.testing.assert_close(terms[name][index : index + 1], value)
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    assert set(terms) == {"loss", "mse", "vb"}


def test_bound_trains_the_variance_only():
    prediction, latents, noise, timesteps = batch([0, 1, 500, 999])
    prediction.requires_grad_()
    objective = DDPMObjective(scheduler())
    (grad_vb,) = torch.autograd.grad(objective.loss(prediction, latents, noise, timesteps)["vb"].sum(), prediction)
    (grad_mse,) = torch.autograd.grad(objective.loss(prediction, latents, noise, timesteps)["mse"].sum(), prediction)
    (grad,) = torch.autograd.grad(objective.loss(prediction, latents, noise, timesteps)["loss"].sum(), prediction)
    assert (grad_vb[:, :4] == 0).all()
    assert (grad_vb[:, 4:] != 0).all()
    assert (grad_mse[:, 4:] == 0).all()
    assert (grad_mse[:, :4] != 0).all()
    torch.testing.assert_close(grad, grad_vb + grad_mse)


@pytest.mark.parametrize("timestep", [1, 2, 500, 999])
def test_predicted_mean_is_that_of_the_scheduler_over_all_its_steps(timestep):
    schedule = scheduler()
    objective = DDPMObjective(schedule)
    prediction, latents, noise, timesteps = batch([timestep])
    noisy = objective.add_noise(latents, noise, timesteps)
    # The scheduler's own arithmetic in float64, on the float32 table that it holds.
    schedule.alphas_cumprod = schedule.alphas_cumprod.double()
    schedule.one = schedule.one.double()
    schedule.set_timesteps(1000)
    prediction[:, 4:] = -1

    def step_mean(model_output):
        drawn = schedule.step(model_output, timestep, noisy, generator=torch.Generator().manual_seed(0)).prev_sample
        fresh = torch.randn(model_output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        log_variance = schedule._get_variance(timestep, model_output[:, 4:])
        return drawn - torch.exp(0.5 * log_variance) * fresh[:, :4]

    true_prediction = torch.cat([noise, prediction[:, 4:]], dim=1)
    posterior_std = schedule._get_variance(timestep, variance_type="fixed_small").sqrt()
    expected = kl_divergence(
        Normal(step_mean(true_prediction), posterior_std), Normal(step_mean(prediction), posterior_std)
    )
    vb = objective.loss(prediction, latents, noise, timesteps)["vb"]
    torch.testing.assert_close(vb, expected.mean(dim=(1, 2, 3)) / math.log(2), rtol=1e-8, atol=0)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_a_fixed_variance_is_trained_by_the_squared_error_alone(variance_type):
    prediction, latents, noise, timesteps = batch([0, 1, 500, 999])
    prediction = prediction[:, :4].clone().requires_grad_()
    terms = DDPMObjective(scheduler(variance_type=variance_type)).loss(prediction, latents, noise, timesteps)
    assert torch.equal(terms["loss"], terms["mse"])
    assert terms["loss"].requires_grad
    assert not terms["vb"].requires_grad
    end = 1.0 if variance_type == "fixed_large" else -1.0
    learned = torch.cat([prediction.detach(), torch.full_like(noise, end)], dim=1)
    expected = DDPMObjective(scheduler()).loss(learned, latents, noise, timesteps)["vb"]
    torch.testing.assert_close(terms["vb"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_predictions_are_judged_in_float32(dtype):
    prediction, latents, noise, timesteps = batch([0, 1, 500, 999], dtype=torch.float32)
    objective = DDPMObjective(scheduler())
    terms = objective.loss(prediction.to(dtype), latents, noise, timesteps)
    expected = objective.loss(prediction.to(dtype).float(), latents, noise, timesteps)
    for name in terms:
        assert terms[name].dtype == torch.float32
        assert torch.equal(terms[name], expected[name])


def test_float32_agrees_with_float64_at_every_timestep():
    prediction, latents, noise, timesteps = batch(list(range(1000)), error=1.0, dtype=torch.float32)
    objective = DDPMObjective(scheduler())
    single = objective.loss(prediction, latents, noise, timesteps)
    double = objective.loss(prediction.double(), latents.double(), noise.double(), timesteps)
    for name in single:
        # About 50 roundings of float32 each, and no cancellation.
        torch.testing.assert_close(single[name].double(), double[name], rtol=50 * 2**-24, atol=0)


def test_float32_keeps_the_digits_of_unlikely_levels():
    prediction, latents, noise, timesteps = batch([0] * 8, error=0.0, interpolation=0.0, dtype=torch.float32)
    # About six standard deviations of p(x_0 | x_1): probabilities near 1e-9, above the floor.
    prediction[:, :4] += 5.0
    objective = DDPMObjective(scheduler())
    single = objective.loss(prediction, latents, noise, timesteps)["vb"]
    double = objective.loss(prediction.double(), latents.double(), noise.double(), timesteps)["vb"]
    assert (double > 15).all()
    assert (double < -0.9 * math.log2(1e-12)).all()
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


@pytest.mark.parametrize("timesteps_device", ["meta", "cpu"])
def test_nothing_is_read_back_from_the_device(timesteps_device):
    objective = DDPMObjective(scheduler())
    with torch.device("meta"):
        latents, noise, prediction = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(4, 6, 5, 6)
    timesteps = torch.zeros(4, dtype=torch.int64, device=timesteps_device)
    # A meta tensor raises when its values are asked for; the tables followed the latents onto its device.
    for value in objective.loss(prediction, latents, noise, timesteps).values():
        assert value.is_meta
        assert value.shape == (4,)


def test_gradients_stay_finite_however_wild_the_prediction():
    prediction, latents, noise, timesteps = batch([0, 0, 1, 2, 500, 999], dtype=torch.float32)
    prediction = (20 * prediction).requires_grad_()
    loss = DDPMObjective(scheduler()).loss(prediction, latents, noise, timesteps)["loss"]
    assert loss.isfinite().all()
    loss.sum().backward()
    assert prediction.grad.isfinite().all()


def velocity(latents, noise, alpha_bar):
    """Equation in appendix D of arXiv 2202.00512."""
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents


def v_objective(**kwargs):
    return DDPMObjective(scheduler(prediction_type="v_prediction", **kwargs))


def test_a_perfect_v_costs_nothing_and_implies_the_sample():
    objective = v_objective()
    _, latents, noise, timesteps = batch([0, 1, 500, 999])
    alpha_bar = objective.scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    v = velocity(latents, noise, alpha_bar)
    terms = objective.loss(torch.cat([v, -torch.ones_like(v)], dim=1), latents, noise, timesteps)
    torch.testing.assert_close(terms["mse"], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-30)
    torch.testing.assert_close(terms["vb"][1:], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-20)
    noisy = objective.add_noise(latents, noise, timesteps)
    # The two waves are at right angles, so that turning back gives the sample and the noise.
    torch.testing.assert_close(alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * v, latents)
    torch.testing.assert_close((1 - alpha_bar).sqrt() * noisy + alpha_bar.sqrt() * v, noise)


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small", "fixed_large"])
def test_v_and_the_noise_it_implies_have_one_bound(variance_type):
    prediction, latents, noise, timesteps = batch([0, 1, 500, 999])
    alpha_bar = scheduler().alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    v, interpolation = prediction.chunk(2, dim=1)
    implied_noise = (1 - alpha_bar).sqrt() * noisy + alpha_bar.sqrt() * v
    if variance_type != "learned_range":
        interpolation = interpolation[:, :0]
    of_v = v_objective(variance_type=variance_type).loss(
        torch.cat([v, interpolation], dim=1), latents, noise, timesteps
    )
    of_noise = DDPMObjective(scheduler(variance_type=variance_type)).loss(
        torch.cat([implied_noise, interpolation], dim=1), latents, noise, timesteps
    )
    torch.testing.assert_close(of_v["vb"], of_noise["vb"], rtol=1e-9, atol=0)
    expected = (v - velocity(latents, noise, alpha_bar)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(of_v["mse"], expected)
    torch.testing.assert_close(of_noise["mse"], alpha_bar.flatten() * expected)


def test_v_may_end_at_zero_signal():
    objective = v_objective(rescale_betas_zero_snr=True)
    prediction, latents, noise, timesteps = batch([999, 999])
    assert torch.equal(objective.add_noise(latents, noise, timesteps), noise)
    terms = objective.loss(prediction.requires_grad_(), latents, noise, timesteps)
    torch.testing.assert_close(terms["mse"], (prediction[:, :4] + latents).square().mean(dim=(1, 2, 3)))
    assert terms["vb"].isfinite().all()
    terms["loss"].sum().backward()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(
    "prediction_type, variance_type",
    [*itertools.product(("epsilon", "v_prediction"), ("learned_range", "fixed_small")), ("sample", "fixed_small")],
)
def test_min_snr_weights_the_squared_error_and_not_the_bound(prediction_type, variance_type):
    schedule = scheduler(prediction_type=prediction_type, variance_type=variance_type)
    # γ = 5 is reached between timesteps 260 and 270.
    prediction, latents, noise, timesteps = batch([0, 100, 260, 270, 500, 999])
    prediction = prediction if variance_type == "learned_range" else prediction[:, :4]
    plain = DDPMObjective(schedule).loss(prediction, latents, noise, timesteps)
    weighted = DDPMObjective(schedule, snr_gamma=5.0).loss(prediction, latents, noise, timesteps)
    for name in ("mse", "vb"):
        assert torch.equal(plain[name], weighted[name])
    expected = []
    for alpha_bar in schedule.alphas_cumprod.double()[timesteps].tolist():
        snr = alpha_bar / (1 - alpha_bar)
        expected.append(min(snr, 5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type])
    bound = plain["vb"] if variance_type == "learned_range" else 0
    torch.testing.assert_close((weighted["loss"] - bound) / plain["mse"], torch.tensor(expected).double())


def test_min_snr_weighs_an_error_in_the_sample_alike_for_noise_and_for_v():
    _, latents, noise, timesteps = batch([0, 100, 260, 270, 500, 999])
    alpha_bar = scheduler().alphas_cumprod.double()[timesteps]
    error = torch.ones_like(noise)
    signal, rate = (x.sqrt().view(-1, 1, 1, 1) for x in (alpha_bar, 1 - alpha_bar))
    # Both predictions imply a sample that is off by 1.
    options = {"variance_type": "fixed_small"}
    of_noise = DDPMObjective(scheduler(**options), snr_gamma=5.0).loss(
        noise - signal / rate * error, latents, noise, timesteps
    )
    of_v = DDPMObjective(scheduler(prediction_type="v_prediction", **options), snr_gamma=5.0).loss(
        signal * noise - rate * latents - error / rate, latents, noise, timesteps
    )
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(of_noise["loss"], snr.clamp(max=5))
    torch.testing.assert_close(of_v["loss"], snr.clamp(max=5))


@pytest.mark.parametrize("snr_gamma", [0.0, -1.0, float("nan")])
def test_gamma_must_be_positive(snr_gamma):
    with pytest.raises(ValueError, match="`snr_gamma` must be positive, or None for equal weights, got"):
        DDPMObjective(scheduler(), snr_gamma=snr_gamma)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_previews_predict_what_was_trained(prediction_type):
    objective = DDPMObjective(scheduler(prediction_type=prediction_type, variance_type="fixed_small", beta_end=0.03))
    preview = objective.preview_scheduler()
    assert isinstance(preview, DPMSolverMultistepScheduler)
    assert preview.config.prediction_type == prediction_type
    assert torch.equal(preview.alphas_cumprod, objective.scheduler.alphas_cumprod)


def test_other_schedulers_are_refused():
    with pytest.raises(TypeError, match="`scheduler` must be a DDPMScheduler, got DDIMScheduler"):
        DDPMObjective(DDIMScheduler())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"prediction_type": "flow_sample"}, "`prediction_type` .* must be one of .*'v_pred.* got 'flow_sample'"),
        (
            {"prediction_type": "sample"},
            "`variance_type` .* for prediction_type 'sample', .* got 'learned_range'",
        ),
        ({"variance_type": "learned"}, "`variance_type` .* must be one of .*'learned_range'.* got 'learned'"),
        ({"variance_type": "fixed_large_log"}, "`variance_type` .* got 'fixed_large_log'"),
        ({"rescale_betas_zero_snr": True}, "`alphas_cumprod` .* must stay above 0.* got 0.0 .*rescale_betas_zero_snr"),
    ],
)
def test_schedulers_without_this_objective_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DDPMObjective(scheduler(**kwargs))


@pytest.mark.parametrize(
    "variance_type, channels, expected",
    [("learned_range", 4, r"\(4, 6, 5, 6\)"), ("fixed_small", 6, r"\(4, 3, 5, 6\)")],
)
def test_predictions_with_other_channels_are_refused(variance_type, channels, expected):
    objective = DDPMObjective(scheduler(variance_type=variance_type))
    latents, prediction = torch.randn(SHAPE), torch.randn(4, channels, 5, 6)
    message = rf"`prediction` must have shape {expected} .* '{variance_type}', got \(4, {channels}, 5, 6\)"
    with pytest.raises(ValueError, match=message):
        objective.loss(prediction, latents, torch.randn(SHAPE), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    "timesteps, message",
    [
        (torch.zeros(4), r"`timesteps` must be integers of shape \(4,\), got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), r"of shape \(4,\), got torch.int64 of shape \(3,\)"),
        (torch.tensor([0, 1, 2, 1000]), r"`timesteps` must lie in \[0, 1000\), got 0 to 1000"),
        (torch.tensor([0, 1, 2, -1]), r"`timesteps` must lie in \[0, 1000\), got -1 to 2"),
    ],
)
def test_timesteps_that_are_none_are_refused(timesteps, message):
    objective = DDPMObjective(scheduler())
    latents = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=message):
        objective.add_noise(latents, latents, timesteps)
    with pytest.raises(ValueError, match=message):
        objective.loss(torch.randn(4, 6, 5, 6), latents, latents, timesteps)


def test_noise_of_another_shape_is_refused():
    objective = DDPMObjective(scheduler())
    latents, timesteps = torch.randn(SHAPE), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`noise` must have shape \(4, 3, 5, 6\), got \(1, 3, 5, 6\)"):
        objective.add_noise(latents, torch.randn(1, 3, 5, 6), timesteps)
