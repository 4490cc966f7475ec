"""Every sampler that the pipeline says it takes: with an exact model of Gaussian data, samples are that Gaussian."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers import KarrasDiffusionSchedulers
from helpers import tiny_model

from diffusers_mp import MPDiTPipeline
from diffusers_mp.schedulers import mu_of, sampler_for, shift_of


MEAN, STD = 0.7, 0.5
NAMES = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
FLOW_SOLVERS = ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"]
DDPM_TABLE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
DDPM = {**DDPM_TABLE, "clip_sample": False}
# Of the tiny model: sides of its input, and image tokens.
SIZE, TOKENS = 8, 16
# A fixed variance, and noise that is added at each step, are right for infinitely small steps only.
# How a sampler reads a prediction is a branch in each; one of each family is among the fast tests with both.
BOTH_PREDICTIONS = [f"{name}Scheduler" for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep")]
NUM_STEPS = {"DDPMScheduler": 1000, "EulerAncestralDiscreteScheduler": 500, "KDPM2AncestralDiscreteScheduler": 500}


def scheduler_of(name, prediction_type):
    if prediction_type.startswith("flow"):
        name, _, shift = name.partition(" with shift ")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=float(shift or 1))
        return scheduler if name in FLOW[:1] else sampler_for(scheduler, name)
    config = DDPMScheduler(**DDPM, prediction_type=prediction_type).config
    scheduler_class = getattr(diffusers, name)
    if name == "EDMEulerScheduler":
        return scheduler_class()
    options = {"PNDMScheduler": {"skip_prk_steps": True}}.get(name, {})
    return scheduler_class.from_config(config, **options)


class ExactModel(torch.nn.Module):
    """For noisy = signal x_0 + rate ε with x_0 ~ N(MEAN, STD²): what is expected of ε, v, x_0 and ε - x_0."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.alphas_cumprod = DDPMScheduler(**DDPM).alphas_cumprod.double().numpy()

    def forward(self, hidden_states, timestep, return_dict):
        hidden_states, timestep = hidden_states.double(), timestep[0].item()
        if self.kind == "edm":
            # Scaled by the sampler to RMS 1 for data of std 0.5, and told the logarithm of sigma.
            rate, signal = math.exp(4 * timestep), 1.0
            hidden_states = hidden_states * math.sqrt(rate**2 + 0.25)
        elif self.kind.startswith("flow"):
            rate, signal = timestep / 1000, 1 - timestep / 1000
        else:
            # Timesteps lie between those of the table, in the logarithm of the noise's share.
            variance = self.alphas_cumprod
            log_sigma = np.interp(timestep, np.arange(1000), np.log((1 - variance) / variance) / 2)
            signal = 1 / math.sqrt(1 + math.exp(2 * log_sigma))
            rate = math.sqrt(1 - signal**2)
        surprise = (hidden_states - signal * MEAN) / ((signal * STD) ** 2 + rate**2)
        noise, clean = rate * surprise, MEAN + signal * STD**2 * surprise
        if self.kind == "edm":
            prediction = (clean - 0.25 / (rate**2 + 0.25) * hidden_states) * math.sqrt(rate**2 + 0.25) / (0.5 * rate)
        else:
            prediction = {
                "epsilon": noise,
                "v_prediction": signal * noise - rate * clean,
                "sample": clean,
                "flow": noise - clean,
                "flow_sample": clean,
                "flow_epsilon": noise,
            }[self.kind]
        return (prediction.float(),)


# They say so in their first step.
WITHOUT_SAMPLE = [
    f"{name}Scheduler" for name in ("PNDM", "EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")
]
WITHOUT_SAMPLE += ["DPMSolverSDEScheduler"]
SLOW_KINDS = ("v_prediction", "sample")
CASES = [
    *((name, "epsilon") for name in NAMES if name != "EDMEulerScheduler"),
    *((name, "v_prediction") for name in NAMES if name != "EDMEulerScheduler"),
    *((name, "sample") for name in NAMES if name not in ("EDMEulerScheduler", *WITHOUT_SAMPLE)),
    ("EDMEulerScheduler", "edm"),
    *((name, kind) for name in (*FLOW, *FLOW_SOLVERS) for kind in ("flow_sample", "flow_epsilon")),
    *((name, "flow") for name in (*FLOW, *FLOW_SOLVERS, f"{FLOW[0]} with shift 3", f"{FLOW_SOLVERS[0]} with shift 3")),
]


# diffusers passes tensors to NumPy.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize(
    "name, kind",
    [
        pytest.param(
            *case, marks=pytest.mark.slow if case[1] in SLOW_KINDS and case[0] not in BOTH_PREDICTIONS else ()
        )
        for case in CASES
    ],
)
def test_exact_predictions_of_gaussian_data_return_its_mean_and_std(name, kind, monkeypatch):
    model = tiny_model("A", out_channels=4, num_classes=None)
    exact = ExactModel(kind)
    monkeypatch.setattr(model, "forward", exact.forward)
    predicted = kind if kind.startswith("flow_") else None
    pipe = MPDiTPipeline(transformer=model, scheduler=scheduler_of(name, kind), prediction_type=predicted)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        num_images_per_class=64,
        num_inference_steps=NUM_STEPS.get(name, 100),
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    # Standard errors of 64 · 256 samples: 0.6 % of the mean and of the standard deviation.
    assert latents.mean().item() == pytest.approx(MEAN, rel=0.03)
    assert latents.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize(
    "trained, other, message",
    [
        ("flow", "DPMSolverMultistepScheduler", "must be for the flow .*`from_config.* for 'epsilon' with .* False"),
        ("epsilon", FLOW[0], "must have prediction_type 'epsilon', .* got a FlowMatchEuler.* for 'flow_prediction'"),
        (
            "v_prediction",
            "EDMEulerScheduler",
            "must have prediction_type 'v_prediction', .* EDM.* for 'edm_epsilon'",
        ),
        (
            "epsilon",
            "EDMEulerScheduler",
            "must have prediction_type 'epsilon', .* EDM.* for 'edm_epsilon'",
        ),
        (
            "epsilon",
            "FlowMatchLCMScheduler",
            "must have a prediction_type, or be one for flows: .*; FlowMatchLCMScheduler has none",
        ),
    ],
)
def test_a_sampler_for_another_prediction_is_refused(trained, other, message, tmp_path):
    """`from_config` makes such without an error, and images of it look like a bad model's."""
    scheduler = scheduler_of(FLOW[0] if trained == "flow" else "DDPMScheduler", trained)
    scheduler_class = getattr(diffusers, other)
    other = scheduler_class() if other.startswith("EDM") else scheduler_class.from_config(scheduler.config)
    pipe = MPDiTPipeline(tiny_model("A", out_channels=4, num_classes=None), scheduler)
    pipe.save_pretrained(tmp_path)
    pipe.scheduler = other
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=2)
    with pytest.raises(ValueError, match=message):
        MPDiTPipeline.from_pretrained(tmp_path, scheduler=other)


def test_a_flow_at_the_noise_levels_of_a_diffusion_is_refused():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = MPDiTPipeline(tiny_model("A", out_channels=4, num_classes=None), flow)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(flow.config, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="for 'flow_prediction' with use_flow_sigmas False"):
        pipe(num_inference_steps=2)


def test_a_diffusion_at_the_noise_levels_of_a_flow_is_refused():
    pipe = MPDiTPipeline(tiny_model("A", out_channels=4, num_classes=None), DDPMScheduler(**DDPM))
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True)
    with pytest.raises(ValueError, match="must have the noise levels of a diffusion .* DPMSolver.* True"):
        pipe(num_inference_steps=2)


def test_a_shift_that_a_sampler_would_leave_out_is_refused():
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    pipe = MPDiTPipeline(tiny_model("A", out_channels=4, num_classes=None), dynamic)
    for name in ("FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler"):
        pipe.scheduler = sampler_for(dynamic, name)
        with pytest.raises(ValueError, match=f"must shift by the number of image tokens, .* got a {name}"):
            pipe(num_inference_steps=2)
    shifted = diffusers.DPMSolverMultistepScheduler(**DDPM_TABLE, use_dynamic_shifting=True)
    with pytest.raises(
        ValueError, match="use_dynamic_shifting False for a transformer that predicts 'epsilon', .* DPM"
    ):
        MPDiTPipeline(tiny_model("A", out_channels=4, num_classes=None), shifted)


# Of the size of training, and twice as high.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize("height, num_tokens", [(SIZE, TOKENS), (2 * SIZE, 2 * TOKENS)])
@pytest.mark.parametrize("name", [FLOW[0], *FLOW_SOLVERS, "DPMSolverSinglestepScheduler"])
def test_a_shift_by_image_size_follows_from_the_number_of_tokens(name, height, num_tokens):
    options = {"base_shift": 0.3, "max_shift": 2.0, "base_image_seq_len": 8, "max_image_seq_len": 100}
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
    mu = calculate_shift(num_tokens, 8, 100, 0.3, 2.0)
    assert mu_of(dynamic, num_tokens) == pytest.approx(mu)
    pipe = MPDiTPipeline(tiny_model("A", out_channels=4, num_classes=None), dynamic)
    pipe.scheduler = sampler_for(dynamic, name)
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=4, height=height, output_type="latent")
    constant = diffusers.FlowMatchEulerDiscreteScheduler(shift=math.exp(mu))
    assert shift_of(dynamic, num_tokens) == pytest.approx(constant.config.shift)
    if name != FLOW[0]:
        constant = sampler_for(constant, name)
        constant.set_timesteps(4)
        torch.testing.assert_close(pipe.scheduler.sigmas, constant.sigmas, rtol=1e-3, atol=0)
    else:
        # By its formula: its table of constant shifts begins at a smallest time that is shifted twice.
        times = np.linspace(1, 0.001, 4)
        expected = torch.tensor([*(math.exp(mu) / (math.exp(mu) + 1 / times - 1)), 0.0])
        torch.testing.assert_close(pipe.scheduler.sigmas.double(), expected, rtol=1e-6, atol=0)


def test_a_solver_for_a_flow_keeps_its_shift():
    solver = sampler_for(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "DPMSolverMultistepScheduler")
    assert solver.config.flow_shift == 3.0


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_the_scheduler_that_runs_is_the_one_that_callbacks_see(name):
    """Made from a scheduler that expects a learned variance, of which these two know nothing."""
    learned = DDPMScheduler(**DDPM, variance_type="learned_range")
    pipe = MPDiTPipeline(tiny_model("A", num_classes=None), learned)
    pipe.scheduler = getattr(diffusers, name).from_config(learned.config)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe(num_inference_steps=2, callback_on_step_end=lambda pipe, *_: seen.append(len(pipe.scheduler.timesteps)) or {})
    assert seen == [2, 2]
