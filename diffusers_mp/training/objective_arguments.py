"""The trainer's flags for what the model predicts, where its loss is taken, and which times are drawn."""

import argparse
from typing import Any

from ..arguments import finite, positive
from ..predictions import FLOW_PREDICTIONS, LOSS_SPACES, SPACE_OF


# What a model may predict, and the flags of `of_recipe` of the objective that makes it learn that, with defaults.
_DDPM_FLAGS = {"variance_type": "learned_range", "snr_gamma": None, "loss_space": None}
_FLOW_FLAGS = {"logit_mean": 0.0, "logit_std": 1.0, "loss_space": None}
_FLOW_FLAGS |= {"shift": None, "base_shift": None, "max_shift": None}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "epsilon": _DDPM_FLAGS,
    "v_prediction": _DDPM_FLAGS,
    "sample": {**_DDPM_FLAGS, "variance_type": "fixed_small"},
    **dict.fromkeys(FLOW_PREDICTIONS, _FLOW_FLAGS),
}
OBJECTIVE_FLAGS = tuple(dict.fromkeys(name for flags in OBJECTIVES.values() for name in flags))


def add_objective_arguments(add) -> None:
    add(
        "--prediction_type",
        default="epsilon",
        choices=tuple(OBJECTIVES),
        help="what the model predicts: noise, the clean sample or v of a diffusion; the same of a rectified flow, of "
        "which flow_prediction is the velocity, sampled by FlowMatchEulerDiscreteScheduler",
    )
    add(
        "--loss_space",
        choices=LOSS_SPACES,
        help="where the squared error is taken: of the clean sample, of the noise, or of v or a flow's velocity "
        "[of what is predicted]",
    )
    add(
        "--variance_type",
        choices=("learned_range", "fixed_small", "fixed_large"),
        help="learned_range doubles the output channels and adds the variational bound to the loss "
        "[learned_range; fixed_small for sample; none for flows]",
    )
    add(
        "--snr_gamma",
        type=positive,
        help="min-SNR weights of the squared error (arXiv 2303.09556), 5.0 there [none]",
    )
    add("--logit_mean", type=finite, help="of a flow's logit-normal times; up is noisier [0.0]")
    add("--logit_std", type=positive, help="of a flow's logit-normal times [1.0]")
    add(
        "--shift",
        type=time_shift,
        help="of a flow's times to noise, in training and sampling: a number; dimension, √(values of a latent / 4096) "
        "(arXiv 2510.11690); or resolution, that of the number of tokens of each image (use_dynamic_shifting) [1]",
    )
    add("--base_shift", type=finite, help="of --shift resolution: mu at 256 tokens [0.5]")
    add("--max_shift", type=finite, help="of --shift resolution: mu at 4096 tokens [1.15]")


def time_shift(text: str) -> float | str:
    """A positive number, or what it follows from."""
    if text in ("dimension", "resolution"):
        return text
    try:
        return positive(text)
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(f"must be positive, dimension or resolution, got {text}") from None


def check_objective_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in the defaults of the objective, and refuse what has no meaning for it."""
    flags = OBJECTIVES[args.prediction_type]
    if args.prediction_type == "sample" and args.variance_type == "learned_range":
        parser.error(
            "--variance_type must be fixed_small or fixed_large for --prediction_type sample, since a learned "
            "variance is trained beside noise or v, got learned_range"
        )
    for name in OBJECTIVE_FLAGS:
        if getattr(args, name) is None:
            setattr(args, name, flags.get(name))
        elif name not in flags:
            parser.error(f"--{name} has no meaning for --prediction_type {args.prediction_type}")
    for name in ("base_shift", "max_shift"):
        if getattr(args, name) is not None and args.shift != "resolution":
            parser.error(f"--{name} has no meaning without --shift resolution")
    if args.loss_space == SPACE_OF[args.prediction_type]:
        args.loss_space = None  # the same run, however it is called
    if args.loss_space is not None and args.snr_gamma is not None:
        parser.error(
            f"--loss_space {args.loss_space} has no meaning with --snr_gamma, whose weights make the loss the same in "
            "every space"
        )
    if args.prediction_type not in FLOW_PREDICTIONS and args.validation_inference_steps > 1000:
        parser.error(
            "--validation_inference_steps must be at most 1000, the noise levels of training, got "
            f"{args.validation_inference_steps}"
        )
