"""What a call is given: steps of one's own, and values that diffusers and NumPy make."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from guided_sampling import DDPM, LABELS, LATENTS, count_rows, pipeline, predict, sample
from helpers import relative_error


NOISE = {"beta_start": 1e-4, "beta_end": 0.02}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": math.log(3), "max_shift": math.log(3)}


# Steps


@pytest.mark.parametrize(
    "scheduler, given, timesteps",
    [
        (DDPMScheduler(**DDPM), {"timesteps": [900, 500, 20]}, [900, 500, 20]),
        (DPMSolverMultistepScheduler(**NOISE), {"timesteps": range(900, 0, -400)}, [900, 500, 100]),
        (DPMSolverSinglestepScheduler(**NOISE), {"timesteps": [900, 500]}, [900, 500]),
        (HeunDiscreteScheduler(**NOISE), {"timesteps": (900, 20.5)}, [900, 20.5, 20.5]),
        (EulerDiscreteScheduler(**NOISE), {"timesteps": torch.tensor([900.5, 20])}, [900.5, 20]),
        # In closed form: the share of the noise times 1000, after the shift s x / (1 + (s - 1) x).
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigmas": [1.0, 0.5]}, [1000, 750]),
        # The same shift, of the number of tokens: mu = log s whatever that is.
        (FlowMatchEulerDiscreteScheduler(**DYNAMIC), {"sigmas": [1.0, 0.5]}, [1000, 750]),
        (UniPCMultistepScheduler(**FLOW), {"sigmas": np.array([0.9, 0.5])}, [900, 500]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_model_is_asked_at_the_steps_given(scheduler, given, timesteps):
    pipe, asked = pipeline(scheduler=scheduler), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["timestep"][0].item()), with_kwargs=True
    )
    assert sample(pipe, guidance_scale=1.0, **given).isfinite().all()
    assert asked == pytest.approx(timesteps, abs=0 if "timesteps" in given else 1)
    assert pipe.num_timesteps == len(timesteps)


def test_the_sampler_takes_the_noise_levels_given():
    # Euler's own formula, x + (sigma' - sigma) eps on variance-exploding latents x.
    pipe, sigmas = pipeline(scheduler=EulerDiscreteScheduler(**NOISE)), [20.0, 2.0, 0.1, 0.0]
    got = sample(pipe, guidance_scale=1.0, sigmas=sigmas)
    latents = LATENTS * sigmas[0]
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        noise = predict(pipe.transformer, latents / (sigmas[step] ** 2 + 1) ** 0.5, timestep, LABELS)
        latents = latents + (sigmas[step + 1] - sigmas[step]) * noise
    assert relative_error(got, latents) < 1e-5


@pytest.mark.parametrize(
    "scheduler, given",
    [
        (EulerDiscreteScheduler(**NOISE), {"sigmas": [20.0, 2.0, 0.1, 0.0]}),
        (DDPMScheduler(**DDPM), {"timesteps": [800, 400, 50]}),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [0.95, 0.7, 0.1]}),
    ],
    ids=["euler", "ddpm", "flow"],
)
def test_guidance_in_an_interval_knows_the_steps_given(scheduler, given):
    pipe = pipeline(scheduler=scheduler)
    rows = count_rows(pipe.transformer)
    sample(pipe, guidance_scale=3.0, guidance_interval=np.array([1.0, 5.0]), **given)
    assert rows == [2, 4, 2]


@pytest.mark.parametrize(
    "scheduler, given, message",
    [
        (DDIMScheduler(), {"timesteps": [500]}, "`timesteps` must be None with DDIM.* takes none of a diffusion; got"),
        (DDPMScheduler(), {"sigmas": [1.0]}, "`sigmas` must be None with DDPMScheduler, .* none of a diffusion; got"),
        (EDMEulerScheduler(), {"sigmas": [80.0, 1.0]}, "`sigmas` must be None with EDMEulerScheduler"),
        (UniPCMultistepScheduler(), {"sigmas": [1.0, 0.5]}, "`sigmas` must be None with UniPCMultistepScheduler"),
        (FlowMatchHeunDiscreteScheduler(), {"sigmas": [0.5]}, "with FlowMatchHeun.* takes none of a flow; got"),
        (FlowMatchHeunDiscreteScheduler(), {"timesteps": [500]}, "with FlowMatchHeun.* takes none of a flow; got"),
        (DPMSolverMultistepScheduler(**FLOW), {"timesteps": [500]}, "with DPMSolver.* takes none of a flow; got"),
        (
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            {"timesteps": [500]},
            "takes none of a flow; `sigmas` are its shares of the noise; got",
        ),
        (DDPMScheduler(), {"timesteps": [500], "sigmas": [1.0]}, "`timesteps` and `sigmas` must not be given both"),
        (DDPMScheduler(), {"timesteps": [20, 500]}, r"numbers that descend from 999 at most .* got \[20, 500\]"),
        (DDPMScheduler(), {"timesteps": [1000]}, "numbers that descend from 999 at most"),
        (DDPMScheduler(), {"timesteps": []}, "numbers that descend from 999 at most"),
        (DDPMScheduler(), {"timesteps": "500"}, "numbers that descend from 999 at most"),
        (DDPMScheduler(), {"timesteps": [float("nan")]}, "numbers that descend from 999 at most"),
        (EulerDiscreteScheduler(), {"sigmas": [1.0, -0.1]}, "numbers that descend from inf at most to 0 at least"),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.1, 0.5]}, "numbers that descend from 1 at most"),
        (DDPMScheduler(), {"timesteps": [500.5, 20]}, r"whole for a DDPMScheduler, which takes \[500, 20\]; got"),
    ],
)
def test_steps_that_are_not_to_be_had(scheduler, given, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline(scheduler=scheduler), **given)


# What diffusers, NumPy and callbacks make


@pytest.mark.parametrize(
    "given",
    [
        {"height": np.int64(8), "width": np.int32(8)},
        {"num_inference_steps": np.int64(5)},
        {"num_images_per_class": np.uint8(1)},
        {"latents": LATENTS.double().numpy()},
        {"guidance_scale": np.float32(4)},
        {"callback_on_step_end": lambda *step: None},
        {"callback_on_step_end_tensor_inputs": ("latents",)},
        {"class_labels": [[2], [5]]},
        {"class_labels": [np.int64(2), torch.tensor(5)]},
        {"class_labels": np.array([[2], [5]])},
    ],
    ids=lambda given: f"{next(iter(given))} {type(next(iter(given.values()))).__name__}",
)
def test_values_of_numpy_and_nested_labels_are_taken(given):
    pipe = pipeline()
    given, labels = dict(given), given.get("class_labels", LABELS)
    given.pop("class_labels", None)
    assert torch.equal(sample(pipe, labels, **given), sample(pipe))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_images_per_class": True}, "`num_images_per_class` must be an int of at least 1, got True"),
        ({"num_inference_steps": 2.0}, "`num_inference_steps` must be an int of at least 1, got 2.0"),
        ({"height": True}, "`height` and `width` must be ints, positive multiples of 2 .* got True x 8"),
        ({"height": 8.0}, "`height` and `width` must be ints, positive multiples of 2 .* got 8.0 x 8"),
        ({"guidance_scale": True}, "`guidance_scale` must be a finite number, got True"),
        ({"latents": [1.0]}, r"`latents` must be a tensor of shape \(2, 4, 8, 8\), got list"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of names out of .* got 'latents'"),
        ({"generator": np.int64(0)}, "`generator` must be one torch.Generator or a list .* got 0"),
        ({"class_labels": [[], []]}, r"a label or a non-empty list of labels, got \[\[\], \[\]\]"),
        ({"class_labels": {2, 5}}, r"must be ids \(int\) or names \(str\), got {2, 5}"),
        ({"class_labels": torch.tensor([2.0])}, r"must be ids \(int\) or names \(str\), got 2.0"),
    ],
)
def test_others_get_one_line(given, message):
    pipe = pipeline()
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": LABELS, "latents": LATENTS, "output_type": "latent", **given})


def test_a_callback_returns_a_dict_or_none():
    with pytest.raises(TypeError, match="`callback_on_step_end` must return a dict or None, got Tensor"):
        sample(pipeline(), callback_on_step_end=lambda pipe, step, timestep, tensors: tensors["latents"])
