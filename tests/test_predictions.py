"""What a model predicts, in the units of a loss and as the velocity that a flow's sampler takes."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance
from guided_sampling import LABELS, LATENTS, sample
from helpers import relative_error, tiny_model

from diffusers_mp import MPDiTPipeline
from diffusers_mp.predictions import FLOW_PREDICTIONS, error_factor, flow_velocity
from diffusers_mp.schedulers import sampler_for


POINT = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
SAMPLERS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
# DEIS does not end at the point in so few steps, whatever is predicted.
SAMPLERS += ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


@pytest.mark.parametrize("time", [0.0, 0.001, 0.3, 0.95])
def test_every_prediction_is_the_same_velocity(time):
    clean, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    noisy = (1 - time) * clean + time * noise
    said = {"flow_sample": clean, "flow_epsilon": noise, "flow_prediction": noise - clean}
    for kind in FLOW_PREDICTIONS:
        got = flow_velocity(said[kind], noisy, time, kind)
        if time or kind != "flow_sample":
            torch.testing.assert_close(got, noise - clean)
        else:
            assert got.isfinite().all()  # the sample is reached: what a step of length 0 goes along


@pytest.mark.parametrize("time", [0.96, 1.0])
def test_where_noise_says_little_of_the_sample_it_is_taken_for_small(time):
    """(x_t - t ε) / (1 - t) with 0.05 for 1 - t: x of an exact prediction is (1 - t) / 0.05 of itself."""
    clean, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    noisy = (1 - time) * clean + time * noise
    taken_for = (1 - time) / 0.05 * clean
    got = flow_velocity(noise, noisy, time, "flow_epsilon")
    torch.testing.assert_close(got, (noisy - taken_for) / time)
    # An error is multiplied by 20 at most.
    off = flow_velocity(noise + 0.1, noisy, time, "flow_epsilon")
    torch.testing.assert_close(off - got, torch.full_like(got, 20 * 0.1))


def test_a_factor_is_one_where_nothing_is_converted_also_where_it_would_be_clipped():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for space in ("sample", "epsilon", "velocity"):
        assert torch.equal(error_factor(space, space, 1 - ends, ends), torch.ones_like(ends))


class OnePoint(torch.nn.Module):
    """The exact model of data that is one point: what it says of x_t = (1 - t) x + t ε."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, hidden_states, timestep, return_dict):
        # A multistep solver names whole timesteps, and goes by times that lie between them.
        time = self.time() if hasattr(self, "time") else timestep[0].item() / 1000
        point = POINT.to(hidden_states)
        noise = (hidden_states - (1 - time) * point) / time
        return ({"flow_sample": point, "flow_epsilon": noise, "flow_prediction": noise - point}[self.kind],)


def trajectory(kind, sampler, monkeypatch, largest_time=1.0):
    model, exact, steps = tiny_model("A", out_channels=4, num_classes=None), OnePoint(kind), []
    monkeypatch.setattr(model, "forward", exact.forward)
    flow = FlowMatchEulerDiscreteScheduler()
    pipe = MPDiTPipeline(model, flow, prediction_type=kind)
    pipe.scheduler = scheduler = sampler_for(flow, sampler)
    scheduler.sigma_max = largest_time
    exact.time = lambda: scheduler.sigmas[scheduler.step_index or 0].item()
    pipe.set_progress_bar_config(disable=True)

    def record(pipe, step, timestep, tensors):
        steps.append(tensors["latents"])
        return {}

    options = {"num_inference_steps": 12, "output_type": "latent", "callback_on_step_end": record}
    final = pipe(num_images_per_class=2, generator=torch.Generator().manual_seed(0), **options).images
    return torch.stack([*steps, final])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_exact_model_of_each_prediction_leads_to_its_point(sampler, monkeypatch):
    of_velocity, of_sample, of_noise = (
        trajectory(kind, sampler, monkeypatch) for kind in ("flow_prediction", "flow_sample", "flow_epsilon")
    )
    torch.testing.assert_close(of_sample, of_velocity, rtol=0, atol=1e-4)
    for steps in (of_velocity, of_sample, of_noise):
        torch.testing.assert_close(steps[-1], POINT.expand(2, -1, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS[:2])
def test_each_prediction_goes_the_same_way_where_nothing_is_clipped(sampler, monkeypatch):
    ways = [trajectory(kind, sampler, monkeypatch, largest_time=0.95) for kind in FLOW_PREDICTIONS]
    assert (ways[0][0] - ways[0][-1]).abs().max() > 0.5
    for way in ways[1:]:
        torch.testing.assert_close(way, ways[0], rtol=0, atol=1e-4)


def flow_pipeline(kind, guider=None):
    model = tiny_model("A", out_channels=4)
    return MPDiTPipeline(model, FlowMatchEulerDiscreteScheduler(), guider=guider, prediction_type=kind)


@pytest.mark.parametrize("kind", FLOW_PREDICTIONS)
def test_guidance_of_predictions_and_of_their_velocities_is_one(kind):
    """Weights of the two predictions add up to 1, and each velocity is the same affine function of its own."""
    pipe = flow_pipeline(kind)
    got = sample(pipe, guidance_scale=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(pipe.num_timesteps)
    latents, null = LATENTS, torch.full_like(LABELS, 10)
    for time, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        with torch.no_grad():
            conditional, unconditional = (
                pipe.transformer(latents, timestep=timestep.expand(len(latents)), class_labels=labels).sample
                for labels in (LABELS, null)
            )
        raw = unconditional + 3 * (conditional - unconditional)
        latents = scheduler.step(flow_velocity(raw, latents, time, kind), timestep, latents).prev_sample
    assert relative_error(got, latents) < 1e-5


def test_a_guider_that_takes_norms_gets_velocities():
    rescaled = ClassifierFreeGuidance(3.0, guidance_rescale=0.7)
    pipe, seen = flow_pipeline("flow_sample", rescaled), []
    guide = rescaled.forward

    def look(pred_cond, pred_uncond=None):
        seen.append(pred_cond)
        return guide(pred_cond, pred_uncond)

    rescaled.forward = look
    sample(pipe, guidance_scale=None)
    with torch.no_grad():
        clean = pipe.transformer(LATENTS, timestep=torch.full((len(LABELS),), 1000.0), class_labels=LABELS).sample
    torch.testing.assert_close(seen[0], LATENTS - clean)


@pytest.mark.parametrize("kind", FLOW_PREDICTIONS)
def test_what_is_predicted_stays_with_the_pipeline(kind, tmp_path):
    pipe = flow_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    loaded = MPDiTPipeline.from_pretrained(tmp_path)
    assert loaded.config.prediction_type == MPDiTPipeline.from_pipe(loaded).config.prediction_type == kind
    assert torch.equal(sample(loaded, guidance_scale=1.0), sample(pipe, guidance_scale=1.0))
    loaded.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match="must be for the flow that the transformer predicts: .* for 'epsilon'"):
        sample(loaded, guidance_scale=1.0)
