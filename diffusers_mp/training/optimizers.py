"""The optimiser and the learning rate schedule that the flags ask for."""

import argparse
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..optimization import MuonWithAdam, check_optimizer, inverse_sqrt_schedule, parameter_groups


def optimizer_groups(args: argparse.Namespace, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Parameter groups of a run's optimiser.

    Args:
        args (argparse.Namespace): with `optimizer`, `adam_epsilon` and `adam_weight_decay`.
        model (nn.Module): the model to be trained.
        learning_rate (float): published rate, for rows of RMS 1.
    Returns:
        list of dict: see `parameter_groups`.
    Raises:
        ValueError: if the weight decay has nothing to act on.
    """
    try:
        return parameter_groups(
            model,
            lr=learning_rate,
            eps=args.adam_epsilon,
            weight_decay=args.adam_weight_decay,
            muon=args.optimizer == "muon",
        )
    except ValueError as error:
        raise ValueError(str(error).replace("`weight_decay`", "`adam_weight_decay`")) from error


def make_optimizer(args: argparse.Namespace, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser that `--optimizer` and `--use_8bit_adam` name, PyTorch's or bitsandbytes'.

    Args:
        args (argparse.Namespace): as `optimizer_groups` takes it, with `adam_beta1`, `adam_beta2` and `use_8bit_adam`.
        model (nn.Module): the model to be trained.
        learning_rate (float): published rate, for rows of RMS 1.
    Returns:
        torch.optim.Optimizer: with an entry `lr` in its defaults, which diffusers' polynomial schedule reads.
    """
    groups, betas = optimizer_groups(args, model, learning_rate), (args.adam_beta1, args.adam_beta2)
    # One kernel on an accelerator, and an update that the watchdog can have left out there.
    options = {} if args.use_8bit_adam or args.optimizer == "muon" else {"fused": True}
    if args.use_8bit_adam:
        import bitsandbytes  # here, since it warns where diffusers is imported after it

        classes = {"adam": bitsandbytes.optim.Adam8bit, "adamw": bitsandbytes.optim.AdamW8bit}
    else:
        classes = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": MuonWithAdam}
    optimizer = classes[args.optimizer](groups, lr=learning_rate, betas=betas, **options)
    check_optimizer(model, optimizer)
    return optimizer


def learning_rate_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, facts: dict[str, Any], max_train_steps: int
) -> LRScheduler:
    """The paper's schedule, or one of diffusers'.

    Args:
        args (argparse.Namespace): with `lr_scheduler`.
        optimizer (torch.optim.Optimizer): whose rates are multiplied.
        facts (dict): of the run: its lengths in updates, `lr_num_cycles` and `lr_power`.
        max_train_steps (int): updates of the run.
    Raises:
        ValueError: if a polynomial decay has no update to decay in.
    """
    warmup = facts["lr_warmup_steps"]
    if args.lr_scheduler == "inverse_sqrt":
        return inverse_sqrt_schedule(optimizer, warmup, facts["lr_constant_steps"])
    if args.lr_scheduler == "polynomial" and warmup >= max_train_steps:
        raise ValueError(
            f"`lr_warmup_steps` must be below the number of updates ({max_train_steps}) for a polynomial decay, got "
            f"{warmup}."
        )
    options = {"num_cycles": facts["lr_num_cycles"], "power": facts["lr_power"]}
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=max_train_steps,
        **{name: value for name, value in options.items() if value is not None},
    )
