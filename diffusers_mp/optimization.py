"""The optimiser's side: rates for weights stored as unit rows, Muon beside Adam, and the paper's schedule."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .layers import MPEmbedding, MPLinear
from .projection import pinned


# Optimisers, by the name of their class, for which rates on rows of RMS 1 carry over to unit rows exactly; by how
# their step depends on the gradient's scale. docs/optimizers.md has the derivation, tests/test_optimizers.py follows
# both trajectories.
ADAM_LIKE = frozenset(
    ("Adam", "AdamW", "NAdam", "Adamax", "RMSprop", "Adagrad", "Muon", "MuonWithAdam")
    + ("Adam8bit", "AdamW8bit", "Lion")
)
SCALINGS = {
    # scaling: (power of the fan-in that divides the rate, optimisers)
    "adam": (0.5, ADAM_LIKE),
    "sgd": (1.0, frozenset(("SGD",))),
}


def parameter_groups(
    model: nn.Module,
    lr: float = 1e-2,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scaling: str = "adam",
    muon: bool = False,
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
        weight_decay (float): decay of what is neither a normalised row, nor a gain, nor a weight of pinned norms.
        scaling (str): "adam" for Adam and its kin, Muon included, "sgd" for gradient descent with or without momentum.
            `check_optimizer` warns where the two do not fit.
        muon (bool): groups for `MuonWithAdam`: hidden matrices, which are the weights of linear maps within the
            model's `ModuleList`s, apart from embeddings, gains, and the layers before and after these blocks.
    Returns:
        list of dict: groups with `name`, `params`, `lr`, `eps`, `weight_decay` and `scaling`, for an optimiser. What
        is set here wins over what the optimiser is given beside it. With `muon` each has `muon`, whether it is of
        hidden matrices, and these have no `eps`: Muon's is another quantity.
    Raises:
        ValueError: if `weight_decay` is not 0 and everything that it could act on is a normalised row, whose norm
            carries no meaning, a gain, or pinned (`pin_weight_norms_`); if `muon` finds no hidden matrix; or `scaling`
            is unknown.
    Warns:
        UserWarning: if rows to be trained are in evaluation mode, in which they are used as they are stored.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"`scaling` must be one of {list(SCALINGS)}, got {scaling!r}.")
    normalized, matrices = _normalized_weights(model), hidden_matrices(model) if muon else set()
    kept = _pinned_weights(model)
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
    groups: dict[tuple[bool, int, bool], dict[str, Any]] = {}
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, is_matrix = normalized.get(id(parameter)), id(parameter) in matrices
        fan_in = layer.in_features if isinstance(layer, MPLinear) else 1
        has_norm = layer is not None or id(parameter) in kept
        is_decayed = weight_decay != 0 and not has_norm and parameter_name.rpartition(".")[2] != "gain"
        name = f"unit_rows_{fan_in}" if fan_in > 1 else "as_published"
        group = groups.setdefault(
            (is_matrix, fan_in, is_decayed),
            {
                "name": f"muon_{name}" if is_matrix else name,
                "params": [],
                "lr": lr / fan_in**power,
                **({} if is_matrix else {"eps": eps * math.sqrt(fan_in)}),
                "weight_decay": weight_decay if is_decayed else 0.0,
                "scaling": scaling,
                **({"muon": is_matrix} if muon else {}),
            },
        )
        group["params"].append(parameter)
    if weight_decay and not any(group["weight_decay"] for group in groups.values()):
        raise ValueError(
            "`weight_decay` must be 0 for a model with normalised rows and nothing else but gains and weights of "
            f"pinned norms: decay changes no norm there, only the effective learning rate. Got {weight_decay}."
        )
    if muon and not any(group["muon"] for group in groups.values()):
        raise ValueError(
            "`muon` must be False for a model without a linear map to be trained in a `ModuleList`: Muon is for "
            f"hidden matrices, and a {type(model).__name__} has none that can be told from its ends. Use Adam."
        )
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
            another kind of optimiser, or there is weight decay on normalised rows or pinned weights.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    name, normalized, kept = type(optimizer).__name__, _normalized_weights(model), _pinned_weights(model)

    def groups_of(weights):
        return [group for group in optimizer.param_groups if any(id(each) in weights for each in group["params"])]

    decays = {group["weight_decay"] for group in groups_of({*normalized, *kept}) if group.get("weight_decay")}
    if decays:
        warnings.warn(
            f"{name} has weight decay {', '.join(f'{decay:g}' for decay in sorted(decays))} on normalised rows or "
            "pinned weights, whose norm carries no meaning or is kept: it only changes the effective learning rate. "
            "`parameter_groups` sets it to 0",
            stacklevel=2,
        )
    rows = groups_of(normalized)
    if not rows:
        return
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


def _normalized_weights(model: nn.Module) -> dict[int, MPLinear | MPEmbedding]:
    return {id(module.weight): module for module in model.modules() if isinstance(module, (MPLinear, MPEmbedding))}


def _pinned_weights(model: nn.Module) -> set[int]:
    return {id(getattr(module, name)) for module, name, _ in pinned(model.modules())}


def hidden_matrices(model: nn.Module) -> set[int]:
    """`id` of each parameter that Muon is for: weights of linear maps within the model's `ModuleList`s."""
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    return {id(layer.weight) for layer in layers}


class MuonWithAdam(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for all other parameters, as one optimiser.

        optimizer = MuonWithAdam(parameter_groups(model, lr=1e-2, muon=True))
        optimizer.step()
        normalize_weights_(model)

    Both are PyTorch's, and work on the groups and the state of this one: one learning rate schedule, one scaler, one
    state in a checkpoint. Muon (https://kellerjordan.github.io/posts/muon) makes the singular values of an update
    about equal. Its rule for the shape is "match_rms_adamw" (arXiv 2502.16982): entries of an (A, B) matrix change by
    0.2 of the rate in RMS, as AdamW's do, so that one rate is for both. A unit row, whose rate `parameter_groups`
    divides by sqrt(B), turns by 0.2 lr radians, RMS over the rows.

    Args:
        params (iterable of dict): groups with `muon`, a bool, as `parameter_groups(..., muon=True)` makes them.
        lr (float): rate of groups that have none.
        betas (tuple of float): of AdamW.
        momentum (float): of Muon, Nesterov's, as in its publication.
    Raises:
        ValueError: if a group does not say whose it is, or one of the two has no group.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
    ):
        groups = list(params)
        if not all(isinstance(group, dict) and "muon" in group for group in groups):
            raise ValueError("`params` must be groups as `parameter_groups(model, muon=True)` makes them.")
        matrices = [group for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        if not matrices or not rest:
            raise ValueError(
                "`params` must have groups for Muon and for Adam, got "
                f"{len(matrices)} and {len(rest)}: use one optimiser of torch.optim."
            )
        self._muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=0.0, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0.0)
        super().__init__([*self._muon.param_groups, *self._adam.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure (callable, optional): computes the loss again, as for any optimiser of PyTorch.
        Returns:
            what `closure` returns, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in (self._muon, self._adam):
            # Here rather than once: a state that is loaded replaces both.
            optimizer.state = self.state
            optimizer.param_groups = [g for g in self.param_groups if g["muon"] == (optimizer is self._muon)]
            optimizer.step()
        return loss


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
