"""The optimiser's side: rates for weights stored as unit rows, and the paper's schedule."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..layers import MPEmbedding, MPLinear


def parameter_groups(
    model: nn.Module, lr: float = 1e-2, eps: float = 1e-8, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups that give Adam on unit rows the trajectory it has on rows of RMS 1.

        unit rows of fan-in n:  rate lr / sqrt(n),  eps * sqrt(n)
    Published rates are for rows whose entries have RMS 1 (`||w|| = sqrt(n)`). A unit row is such a row divided by
    sqrt(n), so its gradient is sqrt(n) times as large: Adam's step, which does not depend on the gradient's scale but
    for eps, then has to shrink by sqrt(n). Label rows of an `MPEmbedding` are stored at RMS 1 and take the published
    rate, as do gains and everything else.

    Args:
        model (nn.Module): any model; weights of `MPLinear` are grouped by fan-in.
        lr (float): published learning rate, for rows of RMS 1.
        eps (float): Adam's epsilon, for rows of RMS 1.
        weight_decay (float): decay of parameters that are not normalised; must be 0 if any are.
    Returns:
        list of dict: groups with `name`, `params`, `lr`, `eps` and `weight_decay`, for `torch.optim.Adam` or `AdamW`.
    Raises:
        ValueError: if `weight_decay` is not 0 and the model has normalised rows, on which it only changes the rate.
    """
    normalized = {
        id(module.weight): module for module in model.modules() if isinstance(module, (MPLinear, MPEmbedding))
    }
    if weight_decay and normalized:
        raise ValueError(
            "`weight_decay` must be 0 for a model with normalised rows: their norm carries no meaning, so that decay "
            f"would only change the effective learning rate. Got {weight_decay}."
        )
    groups: dict[int, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        layer = normalized.get(id(parameter))
        fan_in = layer.in_features if isinstance(layer, MPLinear) else 1
        group = groups.setdefault(
            fan_in,
            {
                "name": f"unit_rows_{fan_in}" if fan_in > 1 else "as_published",
                "params": [],
                "lr": lr / math.sqrt(fan_in),
                "eps": eps * math.sqrt(fan_in),
                "weight_decay": weight_decay,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def inverse_sqrt_schedule(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_constant_steps: int
) -> LambdaLR:
    """Linear warm-up, constant, then decay with the inverse square root of the update.

        factor(u) = min(1, u / num_warmup_steps) / sqrt(max(1, u / num_constant_steps)),   u = 1, 2, …
    Recipe of arXiv 2505.19122, with warm-up over 1/150 and decay after 1/10 of training; the form is EDM2's (arXiv
    2312.02696, equation 67).

    Args:
        optimizer (torch.optim.Optimizer): the optimiser whose rates are multiplied.
        num_warmup_steps (int): updates until the full rate; 0 for none.
        num_constant_steps (int): update after which the rate decays.
    Returns:
        LambdaLR: to be stepped once after each update.
    Raises:
        ValueError: if `num_constant_steps` is not positive.
    """
    if num_constant_steps < 1:
        raise ValueError(f"`num_constant_steps` must be at least 1, got {num_constant_steps}.")

    def factor(num_updates_done: int) -> float:
        update = num_updates_done + 1
        warmup = min(1.0, update / num_warmup_steps) if num_warmup_steps else 1.0
        return warmup / math.sqrt(max(1.0, update / num_constant_steps))

    return LambdaLR(optimizer, factor)
