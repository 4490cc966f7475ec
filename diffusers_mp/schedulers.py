"""What a scheduler takes the transformer's output for, its noise levels, and samplers for the same model."""

import inspect
import math

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.schedulers import SchedulerMixin

from .predictions import FLOW_PREDICTIONS


LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


def prediction_type_of(scheduler) -> str | None:
    """What a scheduler takes the model's output for; None if it does not say."""
    if isinstance(scheduler, FLOW_SCHEDULERS):
        return "flow_prediction"
    prediction_type = _option(scheduler, "prediction_type")
    # EDM's samplers scale what goes into the model and what comes out of it, for a model trained in that way.
    return f"edm_{prediction_type}" if hasattr(scheduler, "precondition_inputs") else prediction_type


def is_flow(scheduler) -> bool:
    return isinstance(scheduler, FLOW_SCHEDULERS) or bool(_option(scheduler, "use_flow_sigmas"))


def _option(scheduler, name: str):
    # `from_config` leaves in the config what another class had there and this one does not look at.
    return scheduler.config.get(name) if name in inspect.signature(type(scheduler)).parameters else None


def noise_levels(scheduler) -> list[float]:
    """Standard deviation of the noise over the share of the signal, at each of a scheduler's timesteps."""
    timesteps = scheduler.timesteps.cpu().double()  # in this order: MPS knows no float64
    if is_flow(scheduler):
        noise_share = timesteps / scheduler.config.num_train_timesteps
        return (noise_share / (1 - noise_share)).tolist()
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            "`guidance_interval` must be None with a scheduler that has neither `alphas_cumprod` nor the timesteps of "
            f"a flow, got a {type(scheduler).__name__}."
        )
    alphas_cumprod = scheduler.alphas_cumprod.cpu().double().numpy()
    alphas_cumprod = torch.from_numpy(np.interp(timesteps.numpy(), np.arange(len(alphas_cumprod)), alphas_cumprod))
    return (1 / alphas_cumprod - 1).sqrt().tolist()


def check_scheduler(scheduler: SchedulerMixin, wanted: str) -> None:
    """Refuse a scheduler that takes the transformer's output for something else, or has other noise levels.

    Args:
        scheduler (SchedulerMixin): the one that is to sample.
        wanted (str): what the transformer predicts.
    Raises:
        ValueError: naming what the scheduler takes it for.
    """
    # `from_config` of another class leaves out, with no more than a line in the log, that a model predicts a flow.
    taken_for = prediction_type_of(scheduler)
    if taken_for is None:
        raise ValueError(
            "`scheduler` must have a prediction_type, or be one for flows: what it takes the transformer's output "
            f"for; {type(scheduler).__name__} has none."
        )
    # What a flow's model predicts is made a velocity before a scheduler sees it.
    wants_flow = wanted in FLOW_PREDICTIONS
    if wants_flow and not (taken_for == "flow_prediction" and is_flow(scheduler)):
        raise ValueError(
            "`scheduler` must be for the flow that the transformer predicts: a FlowMatchEulerDiscreteScheduler or "
            "FlowMatchHeunDiscreteScheduler, or a DPM-Solver, DEIS, UniPC or SA-Solver made by "
            "`from_config(config, use_flow_sigmas=True, prediction_type='flow_prediction', "
            f"flow_shift=config.shift)`, got a {type(scheduler).__name__} for {taken_for!r} with "
            f"use_flow_sigmas {is_flow(scheduler)}."
        )
    if not wants_flow and taken_for != wanted:
        raise ValueError(
            f"`scheduler` must have prediction_type {wanted!r}, which is what the transformer predicts, got a "
            f"{type(scheduler).__name__} for {taken_for!r}."
        )
    if is_flow(scheduler) != wants_flow:
        raise ValueError(
            f"`scheduler` must have the noise levels of a diffusion for a transformer that predicts {wanted!r}, "
            f"got a {type(scheduler).__name__} with use_flow_sigmas True."
        )
    if not wants_flow and _option(scheduler, "use_dynamic_shifting"):
        raise ValueError(
            "`scheduler` must have use_dynamic_shifting False for a transformer that predicts "
            f"{wanted!r}, since flows alone are shifted, got a {type(scheduler).__name__} with True."
        )
    # `from_config` of a class that knows no dynamic shift would leave it out without a word.
    if wants_flow and scheduler.config.get("use_dynamic_shifting") and not _shifts_by(scheduler):
        raise ValueError(
            "`scheduler` must shift by the number of image tokens, as its config says with use_dynamic_shifting: "
            "FlowMatchEulerDiscreteScheduler does, and for an exponential time_shift_type DPM-Solver, DEIS and UniPC, "
            f"got a {type(scheduler).__name__}."
        )


def _shifts_by(scheduler) -> bool:
    """Whether a scheduler that is to shift by a number of tokens does it."""
    if "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
        return False
    return hasattr(scheduler, "time_shift") or scheduler.config.time_shift_type == "exponential"


def mu_of(scheduler: SchedulerMixin, num_tokens: int) -> float:
    """What a scheduler with `use_dynamic_shifting` is told of the size of an image.

        mu = base_shift + (max_shift - base_shift) (N - base_image_seq_len) / (max_image_seq_len - base_image_seq_len)
    for N tokens: diffusers' `calculate_shift`, with its defaults where the config has none.

    Args:
        scheduler (SchedulerMixin): for flows.
        num_tokens (int): image tokens of the transformer.
    """
    get = scheduler.config.get
    base_shift, max_shift = get("base_shift", 0.5), get("max_shift", 1.15)
    base_length, max_length = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    return base_shift + (max_shift - base_shift) * (num_tokens - base_length) / (max_length - base_length)


def shift_options(scheduler: SchedulerMixin, num_tokens: int) -> dict[str, float]:
    """Keyword arguments of a flow's `set_timesteps` for images of so many tokens."""
    is_dynamic = is_flow(scheduler) and _option(scheduler, "use_dynamic_shifting")
    return {"mu": mu_of(scheduler, num_tokens)} if is_dynamic else {}


def shift_of(scheduler: FlowMatchEulerDiscreteScheduler, num_tokens: int | None) -> float:
    """The factor s by which a scheduler shifts times u to s u / (1 + (s - 1) u), at images of so many tokens."""
    if not scheduler.config.use_dynamic_shifting:
        return scheduler.config.shift
    mu = mu_of(scheduler, num_tokens)
    return math.exp(mu) if scheduler.config.time_shift_type == "exponential" else mu


def sampler_of(scheduler: SchedulerMixin, transformer: torch.nn.Module) -> SchedulerMixin:
    """The scheduler to sample with: the one given, or a copy that does not look for a variance it will not get.

    Raises:
        ValueError: if it needs a variance that the transformer does not predict.
    """
    expects_variance = _option(scheduler, "variance_type") in LEARNED_VARIANCE_TYPES
    if not expects_variance:
        return scheduler
    if not isinstance(scheduler, DDPMScheduler):
        # DPM-Solver would cut the prediction to its first 3 channels.
        return type(scheduler).from_config(scheduler.config, variance_type=None)
    if not predicts_variance(transformer):
        raise ValueError(
            "`scheduler` must have variance_type 'fixed_small' or 'fixed_large' for a transformer that predicts no "
            f"variance (out_channels {transformer.config.out_channels}), got {scheduler.config.variance_type!r}."
        )
    return scheduler


def predicts_variance(transformer: torch.nn.Module) -> bool:
    """Whether the second half of a transformer's output channels is a variance."""
    return transformer.config.out_channels == 2 * transformer.config.in_channels


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler's step wants the predicted variance beside the prediction."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in LEARNED_VARIANCE_TYPES


def sampler_for(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """Another sampler for the same model.

    Args:
        scheduler (SchedulerMixin): one that suits the model, as a pipeline has it.
        name (str): class of diffusers.
    Returns:
        SchedulerMixin: made from the config; a solver that can follow a flow does so if `scheduler` does.
    """
    scheduler_class, options = getattr(diffusers, name), {}
    if isinstance(scheduler, FLOW_SCHEDULERS) and "use_flow_sigmas" in inspect.signature(scheduler_class).parameters:
        shift = scheduler.config.shift
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return scheduler_class.from_config(scheduler.config, **options)
