"""What may guide sampling, and two predictions into one."""

import math
from numbers import Real

import numpy as np
import torch
from diffusers.guiders import BaseGuidance, MagnitudeAwareGuidance

from .predictions import flow_velocity
from .schedulers import is_flow, noise_levels, predicts_variance, takes_variance


DEFAULT_GUIDANCE_SCALE = 4.0
# The best FID of arXiv 2406.02507 on ImageNet-512 is at 2.1 for its small model, 2.05 for its largest.
DEFAULT_AUTOGUIDANCE_SCALE = 2.0


def check_transformer(transformer: torch.nn.Module, name: str = "transformer") -> None:
    # By its config: compiled and wrapped ones have another class.
    if "class_dropout_prob" not in getattr(transformer, "config", {}):
        raise TypeError(
            f"`{name}` must be an MPDiTTransformer2DModel, possibly compiled, got a "
            f"{type(transformer).__name__}; diffusers' own DiT runs in its DiTPipeline."
        )


def is_conditional(transformer: torch.nn.Module) -> bool:
    """Whether a transformer takes class labels or condition vectors."""
    return transformer.config.num_classes is not None or transformer.config.pooled_projection_dim is not None


def can_guide(pipe) -> bool:
    """Whether a pipeline has something to guide away from: a weaker model, or a null condition that was trained."""
    if pipe.guidance_transformer is not None:
        return True
    return is_conditional(pipe.transformer) and pipe.transformer.config.class_dropout_prob > 0


def default_scale(pipe) -> float | None:
    """The guidance scale of a call that names none; None with a guider, which has its own."""
    if pipe.guider is not None:
        return None
    if pipe.guidance_transformer is not None:
        return DEFAULT_AUTOGUIDANCE_SCALE
    return DEFAULT_GUIDANCE_SCALE if can_guide(pipe) else 1.0


def check_guidance_transformer(guidance_transformer: torch.nn.Module | None, transformer: torch.nn.Module) -> None:
    if guidance_transformer is None:
        return
    check_transformer(guidance_transformer, "guidance_transformer")
    for key in ("in_channels", "num_classes", "pooled_projection_dim", "sample_size"):
        expected, got = transformer.config[key], guidance_transformer.config[key]
        if got != expected:
            raise ValueError(
                f"`guidance_transformer` must be of the task of the transformer, whose `{key}` is {expected}; "
                f"got {got}."
            )


def check_guider(guider: BaseGuidance | None) -> None:
    if guider is None:
        return
    name = type(guider).__name__
    if not isinstance(guider, BaseGuidance):
        raise TypeError(f"`guider` must be a guider of `diffusers.guiders`, got a {name}.")
    if guider._input_predictions != ["pred_cond", "pred_uncond"]:
        raise ValueError(
            "`guider` must make one prediction of two, a conditional and an unconditional one, as "
            f"ClassifierFreeGuidance does; {name} needs {', '.join(guider._input_predictions)}."
        )
    if type(guider).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(
            f"`guider` must leave the transformer as it is, which {name} does not: it disturbs chosen layers. For "
            "guidance by a weaker model give this pipeline a `guidance_transformer`."
        )


def _is_interval(interval: tuple[float, float]) -> bool:
    return (
        isinstance(interval, (tuple, list, np.ndarray))
        and len(interval) == 2
        and all(isinstance(level, Real) for level in interval)
        and 0 <= interval[0] < interval[1]
    )


def check_guidance(pipe, guidance_scale: float | None, guidance_interval: tuple[float, float] | None) -> None:
    """Refuse what the components of a pipeline cannot guide; errors as in `MPDiTPipeline.check_guidance`."""
    check_guidance_transformer(pipe.guidance_transformer, pipe.transformer)
    check_guider(pipe.guider)
    if pipe.guider is not None and (guidance_scale is not None or guidance_interval is not None):
        raise ValueError(
            "`guidance_scale` and `guidance_interval` must be None in a pipeline with a `guider`, which has its "
            f"own (`pipe.guider.new(guidance_scale=..., start=..., stop=...)`), got {guidance_scale} and "
            f"{guidance_interval}."
        )
    if guidance_interval is not None and not _is_interval(guidance_interval):
        raise ValueError(
            "`guidance_interval` must be two noise levels (low, high) with 0 <= low < high, got "
            f"{guidance_interval!r}."
        )
    is_number = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
    if guidance_scale is not None and not (is_number and math.isfinite(guidance_scale)):
        raise ValueError(f"`guidance_scale` must be a finite number, got {guidance_scale!r}.")
    if can_guide(pipe) or guidance_scale == 1:
        return
    rule, got = "`guidance_scale` must be 1", guidance_scale
    if pipe.guider is not None:
        rule, got = "`guider` must be None", type(pipe.guider).__name__
    if not is_conditional(pipe.transformer):
        raise ValueError(
            f"{rule} for an unconditional transformer without a `guidance_transformer`: it has no condition to be "
            f"guided to; got {got}."
        )
    raise ValueError(
        f"{rule} for a transformer trained without dropping conditions (`class_dropout_prob=0`) and without a "
        f"`guidance_transformer`: it has never seen the null condition; got {got}."
    )


def check_vectors(name: str, vectors: torch.Tensor, dim: int | None) -> None:
    if dim is None:
        raise ValueError(f"`{name}` must be None for a transformer with `pooled_projection_dim=None`.")
    shape = tuple(vectors.shape) if isinstance(vectors, torch.Tensor) else type(vectors).__name__
    if not isinstance(vectors, torch.Tensor) or shape[1:] != (dim,) or shape[0] == 0:
        raise ValueError(f"`{name}` must be a tensor of shape (N, {dim}), got {shape}.")


def check_negative(
    pipe, negative: torch.Tensor | None, pooled_projections: torch.Tensor | None, guidance_scale: float | None
) -> None:
    """Refuse `negative_pooled_projections` that the transformer cannot take, or that lead away from nothing."""
    if negative is None:
        return
    check_vectors("negative_pooled_projections", negative, pipe.transformer.config.pooled_projection_dim)
    if pipe.guidance_transformer is not None:
        raise ValueError(
            "`negative_pooled_projections` must be None in a pipeline with a `guidance_transformer`, which gets the "
            "`pooled_projections` themselves."
        )
    if guidance_scale == 1:
        raise ValueError("`negative_pooled_projections` must be None with `guidance_scale=1`, which ignores it.")
    num_conditions = len(pooled_projections)
    if len(negative) not in (1, num_conditions):
        raise ValueError(f"`negative_pooled_projections` must be 1 or {num_conditions} vectors, got {len(negative)}.")


class GuidedPrediction:
    """What the transformer predicts at a step of one call: alone, or with a second prediction to be guided away from.

        u + w (c - u)
    for the guidance scale w, c being the prediction and u that of the null condition or of the guidance transformer.
    The scale is read at each step, so that a callback may change it: to one that the pipeline would take. What a
    flow's model predicts is made a velocity before: that is affine in the prediction, so that this formula gives the
    same either way, but a guider that takes norms gets what it gets of other flows.

    Args:
        pipe (MPDiTPipeline): in a call.
        scheduler (SchedulerMixin): with its timesteps set.
        conditions (dict of str to torch.Tensor): for the transformer, of each of the B images.
        negative_pooled_projections (torch.Tensor, optional): what to guide away from, shape (1 or N, dim), each for
            B / N images that follow each other; zeros by default.
        guidance_interval (tuple of float, optional): noise levels between which to guide.
    """

    def __init__(self, pipe, scheduler, conditions, negative_pooled_projections=None, guidance_interval=None):
        self.pipe, self.conditions, self.checked_scale = pipe, conditions, pipe.guidance_scale
        null_conditions = {}
        if (labels := conditions.get("class_labels")) is not None:
            null_conditions["class_labels"] = torch.full_like(labels, pipe.transformer.config.num_classes)
        if (vectors := conditions.get("pooled_projections")) is not None:
            null_conditions["pooled_projections"] = torch.zeros_like(vectors)
            if (negative := negative_pooled_projections) is not None:
                negative = negative.to(vectors).repeat_interleave(len(vectors) // len(negative), dim=0)
                null_conditions["pooled_projections"] = negative
        self.both_conditions = {name: torch.cat([value, null_conditions[name]]) for name, value in conditions.items()}
        self.is_in_interval = [True] * len(scheduler.timesteps)
        if guidance_interval is not None:
            low, high = guidance_interval
            self.is_in_interval = [low < sigma <= high for sigma in noise_levels(scheduler)]
        self.times = scheduler.sigmas.tolist() if is_flow(scheduler) else None
        self.passes_variance = predicts_variance(pipe.transformer) and takes_variance(scheduler)

    def __call__(self, step: int, timestep: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        """Predict.

        Args:
            step (int): number of the step.
            timestep (torch.Tensor): scalar.
            model_input (torch.Tensor): shape (B, C, h, w).
        Returns:
            torch.Tensor: the prediction, of a flow the velocity, shape (B, C, h, w); for a scheduler that wants it,
            with the transformer's variance, which is never guided, in as many channels behind it.
        Raises:
            ValueError: if the scale was changed to one that the components cannot guide by.
        """
        pipe, guider = self.pipe, self.pipe.guider
        if pipe.guidance_scale != self.checked_scale:
            check_guidance(pipe, pipe.guidance_scale, None)
            self.checked_scale = pipe.guidance_scale
        is_guided = pipe.guidance_scale != 1 and self.is_in_interval[step]
        if guider is not None:
            guider.set_state(step=step, num_inference_steps=pipe.num_timesteps, timestep=timestep)
            # There are no inputs to sort, but a guider with a momentum resets it here.
            guider_states = guider.prepare_inputs({})
            is_guided = len(guider_states) == 2

        # Where guided, a second prediction: of the null condition in one batch, or of a weaker transformer.
        if not is_guided:
            predictions = [_predict(pipe.transformer, model_input, timestep, self.conditions)]
        elif pipe.guidance_transformer is None:
            model_inputs = torch.cat([model_input, model_input])
            predictions = _predict(pipe.transformer, model_inputs, timestep, self.both_conditions).chunk(2)
        else:
            predictions = [
                _predict(transformer, model_input, timestep, self.conditions)
                for transformer in (pipe.transformer, pipe.guidance_transformer)
            ]
        num_channels = model_input.shape[1]
        variance = predictions[0][:, num_channels:]
        predictions = [one[:, :num_channels] for one in predictions]
        if self.times is not None:
            kind = pipe.config.prediction_type
            predictions = [flow_velocity(one, model_input, self.times[step], kind) for one in predictions]
        prediction, *weak_prediction = predictions
        if guider is not None:
            for state, one in zip(guider_states, [prediction, *weak_prediction], strict=True):
                # Its norm takes two dimensions at most, and is the same whatever their shape.
                state.noise_pred = one.flatten(2) if isinstance(guider, MagnitudeAwareGuidance) else one
            prediction = guider(guider_states).pred.reshape(prediction.shape)
        elif is_guided:
            prediction = torch.lerp(*weak_prediction, prediction, pipe.guidance_scale)
        return torch.cat([prediction, variance], dim=1) if self.passes_variance else prediction


def _predict(
    transformer: torch.nn.Module, model_input: torch.Tensor, timestep: torch.Tensor, conditions: dict
) -> torch.Tensor:
    prediction = transformer(
        model_input.to(transformer.dtype),
        timestep=timestep.to(model_input.device, non_blocking=True).expand(len(model_input)),
        **conditions,
        return_dict=False,
    )[0]
    return prediction.to(model_input.dtype)
