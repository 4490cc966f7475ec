"""Maps of a transformer's blocks in few bits, emulated: values are rounded, products are float32.

What `headline.py` measures of its trained models. A scheme says how weights and inputs of each map of the blocks are
rounded; weights are compared as `w sqrt(fan-in)`, which for unit rows has RMS 1.

    constant   one scale for all weights, one for all inputs of the whole model, both found on training images
    tensor     a scale for each weight, and for each batch of inputs of a map, from its largest entry
    token      a scale for each row of a weight and each token
    hadamard   as token, weights and inputs turned by a Hadamard matrix, which spreads outliers
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import scipy.linalg
import torch
from torch import nn


class Scheme(NamedTuple):
    """How weights and inputs are rounded: formats of `ROUNDED`, and what shares a scale."""

    weights: str
    inputs: str
    scale: str


SCHEMES = {
    "W8A8, constant": Scheme("int8", "int8", "constant"),
    "W8A8, tensor": Scheme("int8", "int8", "tensor"),
    "W8A8, token": Scheme("int8", "int8", "token"),
    "W4A8, tensor": Scheme("int4", "int8", "tensor"),
    "W4A8, token": Scheme("int4", "int8", "token"),
    "W4A8, hadamard": Scheme("int4", "int8", "hadamard"),
    "W4A4, hadamard": Scheme("int4", "int4", "hadamard"),
    "fp8, constant": Scheme("e4m3", "e4m3", "constant"),
    "fp8, tensor": Scheme("e4m3", "e4m3", "tensor"),
    "fp4 weights, tensor": Scheme("e2m1", "e4m3", "tensor"),
}
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0, "e2m1": 6.0}
# The largest entry that a constant scale lets through, over RMS 1; what is larger is clipped.
LIMITS = tuple(2.0 ** (power / 2) for power in range(2, 15))


def _round_e2m1(values: torch.Tensor) -> torch.Tensor:
    nearest = torch.bucketize(values.abs(), (_E2M1[1:] + _E2M1[:-1]) / 2)
    return _E2M1[nearest].copysign(values)


# Of values whose largest representable one is LARGEST.
ROUNDED: dict[str, Callable] = {
    "int8": torch.round,
    "int4": torch.round,
    "e4m3": lambda values: values.to(torch.float8_e4m3fn).float(),
    "e2m1": _round_e2m1,
}


def quantised(values: torch.Tensor, form: str, scale: str, limit: float | None = None) -> torch.Tensor:
    """Values rounded to a format and scaled back.

    Args:
        values (torch.Tensor): float32; rows or tokens are along the last dimension.
        form (str): a format of `ROUNDED`.
        scale (str): "tensor", "token" or "constant".
        limit (float, optional): of a constant scale: the value that becomes the largest of the format.
    """
    if scale == "constant":
        largest = torch.tensor(limit)
    elif scale == "tensor":
        largest = values.abs().amax()
    else:
        largest = values.abs().amax(-1, keepdim=True)
    step = (largest / LARGEST[form]).clamp(min=1e-30)
    return ROUNDED[form]((values / step).clamp(-LARGEST[form], LARGEST[form])) * step


def maps_of(model: nn.Module) -> list[nn.Linear]:
    """The linear maps of a transformer's blocks."""
    return [layer for layer in model.transformer_blocks.modules() if isinstance(layer, nn.Linear)]


def hadamard(size: int) -> torch.Tensor:
    """An orthogonal matrix of blocks of a Hadamard matrix, of the largest power of two that divides `size`."""
    block = size & -size
    matrix = torch.tensor(scipy.linalg.hadamard(block), dtype=torch.float32) / math.sqrt(block)
    return torch.block_diag(*[matrix] * (size // block))


@contextlib.contextmanager
def in_few_bits(
    model: nn.Module, scheme: Scheme, weight_limit: float | None = None, input_limit: float | None = None
) -> Iterator[None]:
    """Within the context, the maps of a model in evaluation mode work with rounded weights and inputs.

    Args:
        model (nn.Module): with `transformer_blocks`.
        scheme (Scheme): how.
        weight_limit, input_limit (float, optional): limits of constant scales; None leaves that side as it is.
    """
    stored, hooks = [], []
    turned = scheme.scale == "hadamard"
    scale = "token" if turned else scheme.scale

    def rounding(form, limit, matrix):
        def apply(values):
            if scale == "constant" and limit is None:
                return values
            values = quantised(values @ matrix if turned else values, form, scale, limit)
            return values @ matrix.T if turned else values

        return apply

    for layer in maps_of(model):
        matrix = hadamard(layer.in_features) if turned else None
        unit = math.sqrt(layer.in_features)
        of_weights = rounding(scheme.weights, weight_limit, matrix)
        of_inputs = rounding(scheme.inputs, input_limit, matrix)
        stored.append((layer.weight, layer.weight.detach().clone()))
        layer.weight.data.copy_(of_weights(layer.weight.data * unit) / unit)
        hooks.append(layer.register_forward_pre_hook(lambda _, args, apply=of_inputs: (apply(args[0]), *args[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, values in stored:
            weight.data.copy_(values)


def fit_limits(model: nn.Module, scheme: Scheme, loss: Callable[[nn.Module], float]) -> tuple[float, float]:
    """Limits of constant scales, for weights and then for inputs, of the least loss."""

    def loss_at(weight_limit, input_limit):
        with in_few_bits(model, scheme, weight_limit, input_limit):
            found = loss(model)
        return found if math.isfinite(found) else math.inf

    of_weights = min(LIMITS, key=lambda limit: loss_at(limit, None))
    return of_weights, min(LIMITS, key=lambda limit: loss_at(of_weights, limit))


@torch.no_grad()
def outliers(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """The largest kurtosis and the largest entry, over the RMS, of the inputs of the maps, within `run`."""
    found = defaultdict(list)

    def look(layer, args):
        values = args[0].flatten().double()
        power = values.square().mean()
        found["kurtosis"].append((values.pow(4).mean() / power.square()).item())
        found["largest_entry"].append((values.abs().max() / power.sqrt()).item())

    hooks = [layer.register_forward_pre_hook(look) for layer in maps_of(model)]
    run()
    for hook in hooks:
        hook.remove()
    return {name: max(values) for name, values in found.items()}


def rises(
    model: nn.Module, loss: Callable[[nn.Module], float], calibration: Callable[[nn.Module], float]
) -> dict[str, dict]:
    """What each scheme adds to the loss of a model, in %, and the limits of constant scales.

    Args:
        model (nn.Module): in evaluation mode.
        loss (callable): of held-out images.
        calibration (callable): of images of training, by which limits are found.
    """
    plain, found = loss(model), {}
    for name, scheme in SCHEMES.items():
        limits = fit_limits(model, scheme, calibration) if scheme.scale == "constant" else (None, None)
        with in_few_bits(model, scheme, *limits):
            found[name] = {"rise": 100 * (loss(model) / plain - 1), "limits": limits}
    return found
