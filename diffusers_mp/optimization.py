"""The optimiser's side: rates for weights stored as unit rows, and the paper's schedule."""

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .layers import MPEmbedding, MPLinear


# Optimisers, by the name of their class, for which rates on rows of RMS 1 carry over to unit rows exactly; by how
# their step depends on the gradient's scale. docs/optimizers.md has the derivation, tests/test_optimizers.py follows
# both trajectories.
ADAM_LIKE = frozenset(
    ("Adam", "AdamW", "NAdam", "Adamax", "RMSprop", "Adagrad", "Muon", "Adam8bit", "AdamW8bit", "Lion")
)
SCALINGS = {
    # scaling: (power of the fan-in that divides the rate, optimisers)
    "adam": (0.5, ADAM_LIKE),
    "sgd": (1.0, frozenset(("SGD",))),
}


def parameter_groups(
    model: nn.Module, lr: float = 1e-2, eps: float = 1e-8, weight_decay: float = 0.0, scaling: str = "adam"
) -> list[dict[str, Any]]:
    """Parameter groups that give an optimiser on unit rows the trajectory it has on rows of RMS 1.

        unit rows of fan-in n:  rate lr / sqrt(n),  eps * sqrt(n)        scaling "adam"
                                rate lr / n                              scaling "sgd"
    Published rates are for rows whose entries have RMS 1 (`||w|| = sqrt(n)`). A unit row is such a row divided by
    sqrt(n), so its steps have to be, too, while its gradient is sqrt(n) times as large. Adam's step does not depend on
    the gradient's scale but for eps; that of gradient descent is proportional to it. Label rows of an `MPEmbedding`
    are stored at RMS 1 and take the published rate, as do gains and everything else.

    Args:
        model (nn.Module): any model; weights of `MPLinear` are grouped by fan-in.
        lr (float): published learning rate, for rows of RMS 1.
        eps (float): the optimiser's epsilon, for rows of RMS 1.
        weight_decay (float): decay of parameters that are not normalised; must be 0 if any are.
        scaling (str): "adam" for Adam and its kin, Muon included, "sgd" for gradient descent with or without momentum.
            `check_optimizer` warns where the two do not fit.
    Returns:
        list of dict: groups with `name`, `params`, `lr`, `eps`, `weight_decay` and `scaling`, for an optimiser. What
        is set here wins over what the optimiser is given beside it.
    Raises:
        ValueError: if `weight_decay` is not 0 and the model has normalised rows, on which it only changes the rate, or
            `scaling` is unknown.
    Warns:
        UserWarning: if rows to be trained are in evaluation mode, in which they are used as they are stored.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"`scaling` must be one of {list(SCALINGS)}, got {scaling!r}.")
    normalized = _normalized_weights(model)
    if weight_decay and normalized:
        raise ValueError(
            "`weight_decay` must be 0 for a model with normalised rows: their norm carries no meaning, so that decay "
            f"would only change the effective learning rate. Got {weight_decay}."
        )
    if any(
        layer.weight.requires_grad and layer.forced_weight_normalization and not layer.training
        for layer in normalized.values()
    ):
        warnings.warn(
            "the model is in evaluation mode, as `from_pretrained` returns it, where rows are used as they are stored "
            "and their gradients are not projected: call `model.train()` before `parameter_groups`",
            stacklevel=2,
        )
    power, _ = SCALINGS[scaling]
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
                "lr": lr / fan_in**power,
                "eps": eps * math.sqrt(fan_in),
                "weight_decay": weight_decay,
                "scaling": scaling,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Warn where an optimiser does something else with normalised rows than its settings say.

    Forced normalisation goes with any optimiser. What may not carry over are rates: where nobody has derived how, the
    rate that is set is one on unit rows. Says nothing of a model without normalised rows.

    Args:
        model (nn.Module): the model whose parameters are optimised.
        optimizer (torch.optim.Optimizer): made from `parameter_groups` or not, wrapped by Accelerate or not.
    Warns:
        UserWarning: if the rates of the optimiser's class are not known to carry over, the groups were scaled for
            another kind of optimiser, or there is weight decay on normalised rows.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    normalized = _normalized_weights(model)
    rows = [
        group for group in optimizer.param_groups if any(id(parameter) in normalized for parameter in group["params"])
    ]
    if not rows:
        return
    name = type(optimizer).__name__
    known = [scaling for scaling, (_, names) in SCALINGS.items() if name in names]
    given = {group["scaling"] for group in rows if "scaling" in group}
    if not known:
        warnings.warn(
            f"it is not known how rates of {name} carry over from rows of RMS 1 to unit rows: those it has are used "
            "on unit rows as they are. Forced normalisation works all the same; see docs/optimizers.md",
            stacklevel=2,
        )
    elif given - set(known):
        warnings.warn(
            f"`parameter_groups` has scaled the rates for another kind of optimiser than {name}: pass "
            f"`scaling={known[0]!r}`",
            stacklevel=2,
        )
    decays = {group["weight_decay"] for group in rows if group.get("weight_decay")}
    if decays:
        warnings.warn(
            f"{name} has weight decay {', '.join(f'{decay:g}' for decay in sorted(decays))} on normalised rows, whose "
            "norm carries no meaning: it only changes the effective learning rate. `parameter_groups` sets it to 0",
            stacklevel=2,
        )


def _normalized_weights(model: nn.Module) -> dict[int, MPLinear | MPEmbedding]:
    return {id(module.weight): module for module in model.modules() if isinstance(module, (MPLinear, MPEmbedding))}


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
        ValueError: if `num_constant_steps` is not positive, or `num_warmup_steps` negative.
    """
    if num_warmup_steps < 0:
        raise ValueError(f"`num_warmup_steps` must be at least 0, got {num_warmup_steps}.")
    if num_constant_steps < 1:
        raise ValueError(f"`num_constant_steps` must be at least 1, got {num_constant_steps}.")

    def factor(num_updates_done: int) -> float:
        update = num_updates_done + 1
        warmup = min(1.0, update / num_warmup_steps) if num_warmup_steps else 1.0
        return warmup / math.sqrt(max(1.0, update / num_constant_steps))

    return LambdaLR(optimizer, factor)


def scale_learning_rate(optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler, factor: float) -> None:
    """Another learning rate from here on, after a checkpoint has brought back the rates that the schedule multiplies.

    Args:
        optimizer (torch.optim.Optimizer): its groups' rates are multiplied.
        lr_scheduler (LRScheduler): its base rates are multiplied.
        factor (float): the new learning rate over the former one.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] *= factor
        group["lr"] *= factor
    lr_scheduler.base_lrs = [rate * factor for rate in lr_scheduler.base_lrs]
