"""Swapping the shifts of a diffusers transformer for rotations, in place, and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import nn

from ..offloading import check_loaded
from ..transformer_mpdit import MPDiTTransformer2DModel
from .calibration import mean_shifts
from .checks import (
    check_arguments,
    check_model,
    check_not_native,
    check_plain,
    check_sites,
    check_sliceable,
    check_swapped,
)
from .linear import make_rotation_linears, rotation_linears, rotation_tensors
from .model_class import install
from .native import swap_native
from .sites import SUBLAYERS, find_sites


@dataclass(frozen=True)
class SwapReport:
    """What a swap replaced.

    Attributes:
        replaced (dict): path of each linear map → its groups of rows, "rotate" where a shift was.
        num_parameters_before (int): of the whole model.
        num_parameters_after (int): of the whole model.
    """

    replaced: dict[str, tuple[str, ...]]
    num_parameters_before: int
    num_parameters_after: int

    def __str__(self) -> str:
        before, after = self.num_parameters_before, self.num_parameters_after
        num_rotations = sum(kinds.count("rotate") for kinds in self.replaced.values())
        return (
            f"{num_rotations} shifts of {len(self.replaced)} maps became rotations; {before:,} parameters before, "
            f"{after:,} after ({(after - before) / before:+.1%})"
        )


def swap_adaln_for_rotation(
    model: ModelMixin,
    *,
    sublayers: Sequence[str] = SUBLAYERS,
    keep_shift: bool = False,
    shift_scale: float = 1.0,
    calibration: Iterable[Mapping] | None = None,
    rank: int | None = None,
) -> SwapReport:
    """Replace the shifts of a transformer's AdaLN by rotations, in place; rows of scales and gates are kept exactly.

        x (1 + scale) + shift   →   R(angle) (x (1 + scale) + c)
    with angle from a new linear map that starts at zero, and c nothing, a constant or the shift itself. Rotation
    modulation is section 4 of arXiv 2505.19122, which trains from scratch; swapping it into trained models is this
    package's own.

    Right after the swap the model computes something else unless the shift is kept: fine-tune it, from a calibrated
    start, with the shift annealed (`set_shift_scale`) or towards the untouched model. A failed call leaves the model
    as it was. Of a pipeline: `pipe.transformer = pipe.transformer` afterwards, so that it is saved under its new
    class.

    Args:
        model (ModelMixin): a transformer of a supported class, with weights, not compiled, no offload hooks.
        sublayers (sequence of str): which shifts: "attention", "mlp", "final". Blocks with one modulation for both
            count as "attention".
        keep_shift (bool): leave the shift rows in the linear maps, multiplied by `shift_scale`. With 1 the model
            computes what it did before. Needed for quantised maps and those that carry a LoRA.
        shift_scale (float): with `keep_shift`, the factor in [0, 1] to begin with.
        calibration (iterable of mapping, optional): keyword arguments of the model's forward. The mean of each shift
            over them takes the place of the shift; what a linear map behind the modulation sees of it is what folding
            it into that map's bias would give.
        rank (int, optional): angles through a bottleneck of this width. Without it they have D/2 full rows.
    Returns:
        SwapReport: what was replaced.
    Raises:
        TypeError: if the class of the model is not supported; the message lists those that are.
        ValueError: if an argument or the state of the model does not allow it.
    """
    check_arguments(sublayers, keep_shift, shift_scale, rank)
    check_model(model)
    before = num_parameters(model)
    if type(model) is MPDiTTransformer2DModel:
        if set(sublayers) != set(SUBLAYERS) or shift_scale != 1 or calibration is not None or rank is not None:
            raise ValueError(
                "`sublayers`, `shift_scale`, `calibration` and `rank` must be left out for MPDiTTransformer2DModel: "
                "its swap is another configuration of it, which has no such choices."
            )
        return SwapReport(swap_native(model, keep_shift), before, num_parameters(model))
    sites = find_sites(model, sublayers)
    check_sites(model, sites, keep_shift)
    if isinstance(calibration, (Mapping, str)):
        raise ValueError(f"`calibration` must be an iterable of mappings, got a {type(calibration).__name__}.")
    means = None if calibration is None else mean_shifts(model, sites, calibration)
    options = {
        "sublayers": list(sublayers),
        "keep_shift": keep_shift,
        "mean_shift": means is not None,
        "rank": rank,
    }
    # All are made before the first is put in: an error leaves the model as it was.
    linears = make_rotation_linears(sites, options)
    for name, linear in linears.items():
        if keep_shift:
            linear.shift_scale.fill_(shift_scale)
        if means is not None:
            with torch.no_grad():
                linear.mean_shift.copy_(means[name])
    install(model, linears, options)
    return SwapReport({site.name: site.kinds for site in sites}, before, num_parameters(model))


def unswap_rotation(model: ModelMixin, base: ModelMixin | None = None) -> None:
    """Make a swapped model one of its stock class again, in place: angles are dropped, shifts are back.

    Scale and gate rows, and everything else, stay as they are now. Of a pipeline: `pipe.transformer =
    pipe.transformer` afterwards, so that it is saved under its stock class.

    Args:
        model (ModelMixin): a swapped model.
        base (ModelMixin, optional): the stock model with the shift rows; needed if the swap did not keep them.
    Raises:
        ValueError: if the model is not swapped, its rotations are offloaded, or `base` is missing, another model,
            offloaded or quantised.
    """
    check_swapped(model)
    rotations = rotation_linears(model)
    check_loaded(model, rotation_tensors(rotations))
    stock_class = type(model).__mro__[1]
    if base is not None and type(base) is not stock_class:
        raise ValueError(f"`base` must be a {stock_class.__name__}, got a {type(base).__name__}.")
    linears = {}
    for name, rotation in rotations.items():
        stock = None if base is None else base.get_submodule(name)
        if rotation.shift_scale is None and stock is None:
            raise ValueError(f"`base` must be the stock model: {name} no longer has its shift rows.")
        num_rows = len(rotation.kinds) * rotation.dim
        if stock is not None and stock.out_features != num_rows:
            raise ValueError(f"`base` must have {num_rows} rows in {name}, got {stock.out_features}.")
        if rotation.shift_scale is None and rotation.linear is not None:
            check_plain(
                name, rotation.linear, "to be put together again", "dequantise it, or merge or unload the LoRA"
            )
        if rotation.shift_scale is None:
            check_loaded(base, stock.parameters(), "base")
            check_plain(name, stock, "to take shift rows from", "load it without quantisation or LoRA", "base")
        linears[name] = rotation.stock_linear(stock)
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    model.__class__ = stock_class
    config = {key: value for key, value in model.config.items() if key != "rotation_modulation"}
    model._internal_dict = type(model._internal_dict)(config)


def set_shift_scale(model: nn.Module, shift_scale: float) -> None:
    """Set the factor of all kept shifts, for annealing them while fine-tuning: 1 is the full shift, 0 none.

    Args:
        model (nn.Module): swapped with `keep_shift`.
        shift_scale (float): in [0, 1].
    Raises:
        ValueError: if out of range, or the model keeps no shift, or its factors are offloaded.
    """
    if not 0 <= shift_scale <= 1:
        raise ValueError(f"`shift_scale` must be in [0, 1], got {shift_scale}.")
    check_not_native(model)
    scales = [linear.shift_scale for linear in rotation_linears(model).values() if linear.shift_scale is not None]
    if not scales:
        raise ValueError("`model` must be swapped with `keep_shift=True` for its shifts to be scaled.")
    check_loaded(model, scales)
    for scale in scales:
        scale.fill_(shift_scale)


def drop_shift_(model: ModelMixin) -> None:
    """Let go of the rows of shifts that have been annealed to 0, in place; optimisers of before hold other parameters.

    Args:
        model (ModelMixin): swapped with `keep_shift`.
    Raises:
        ValueError: if a shift is still in effect, its map is quantised or carries a LoRA or is offloaded, or none is
            kept.
    """
    check_swapped(model)
    rotations = rotation_linears(model)
    if not model.config.rotation_modulation["keep_shift"]:
        raise ValueError("`model` must be swapped with `keep_shift=True`, its shifts are gone already.")
    check_loaded(model, rotation_tensors(rotations))
    for name, rotation in rotations.items():
        if rotation.shift_scale.item() != 0:
            raise ValueError(
                f"`model` must have its shifts annealed to 0 first, {name} has {rotation.shift_scale.item():g}: "
                "`set_shift_scale(model, 0)`."
            )
        check_sliceable(name, rotation.linear)
    for rotation in rotations.values():
        rotation.drop_shift_()
    model.register_to_config(rotation_modulation={**model.config.rotation_modulation, "keep_shift": False})


def num_parameters(model: nn.Module) -> int:
    """Number of the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
