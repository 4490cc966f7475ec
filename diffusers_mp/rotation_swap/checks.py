"""What a model must be to be swapped, or swapped back: each check says what to do."""

from collections.abc import Sequence

import diffusers
import torch
from torch import nn

from ..offloading import check_hooks, check_loaded
from ..transformer_mpdit import MPDiTTransformer2DModel
from .coverage import supported_names
from .model_class import is_rotation_class
from .sites import SUBLAYERS, Site


def check_arguments(sublayers: Sequence[str], keep_shift: bool, shift_scale: float, rank: int | None) -> None:
    """Raise if an argument of the swap, or their combination, has no meaning."""
    if isinstance(sublayers, str) or not sublayers or set(sublayers) - set(SUBLAYERS):
        raise ValueError(f"`sublayers` must be a non-empty list out of {list(SUBLAYERS)}, got {sublayers!r}.")
    if not 0 <= shift_scale <= 1:
        raise ValueError(f"`shift_scale` must be in [0, 1], got {shift_scale}.")
    if not keep_shift and shift_scale != 1:
        raise ValueError(f"`shift_scale` must be left at 1 without `keep_shift`, got {shift_scale}.")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"`rank` must be a positive integer or None, got {rank!r}.")


def check_model(model: nn.Module) -> None:
    """Raise if a model cannot be swapped, saying what to do."""
    if is_rotation_class(type(model)):
        raise ValueError("`model` must not be swapped already; `unswap_rotation` is the way back.")
    if hasattr(model, "_orig_mod"):
        raise ValueError("`model` must not be compiled yet, it is: swap first.")
    name = type(model).__name__
    if name not in supported_names() or type(model) not in (getattr(diffusers, name, None), MPDiTTransformer2DModel):
        raise TypeError(
            f"`model` must be one of {', '.join(supported_names())}, got a {type(model).__module__}."
            f"{type(model).__qualname__}; docs/rotation_swap_coverage.md says what stands in the way of others."
        )
    check_hooks(model)
    check_loaded(model, [*model.parameters(), *model.buffers()])
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"`model` must not be compiled yet, {name or 'it'} is: swap first.")


def check_sites(model: nn.Module, sites: Sequence[Site], keep_shift: bool) -> None:
    """Raise if there is nothing to swap in a model, or its maps cannot be cut."""
    if not sites:
        raise ValueError(
            f"`model` must have AdaLN shifts in the chosen sublayers, this {type(model).__name__} has none "
            f"(its `norm_type` is {model.config.get('norm_type')!r})."
        )
    for site in sites:
        dim, rest = divmod(site.linear.out_features, len(site.kinds))
        if rest or dim % 2:
            raise ValueError(
                f"`model` must have maps of even width, rotation turns pairs of channels; {site.name} has "
                f"{site.linear.out_features} rows for {len(site.kinds)} maps."
            )
        if not keep_shift:
            check_sliceable(site.name, site.linear)


def check_swapped(model: nn.Module) -> None:
    """Raise if a model is not a swapped one."""
    check_not_native(model)
    if not is_rotation_class(type(model)):
        raise ValueError(f"`model` must be swapped by `swap_adaln_for_rotation`, got a {type(model).__name__}.")


def check_not_native(model: nn.Module) -> None:
    if isinstance(model, MPDiTTransformer2DModel):
        raise ValueError(
            "`model` must be of a class of diffusers, this is not available for MPDiTTransformer2DModel: its swap is "
            "another configuration of it."
        )


def check_plain(name: str, linear: nn.Module, purpose: str, remedy: str, argument: str = "model") -> None:
    """Raise if a map of a model is anything but a plain linear one, saying what for it has to be and what to do."""
    found = f"{type(linear).__module__}.{type(linear).__qualname__}"
    weight = getattr(linear, "weight", None)  # a wrapper may have none
    if weight is not None:
        weight_class = type(weight.data)
        if type(linear) is nn.Linear and weight_class is torch.Tensor and weight.is_floating_point():
            return
        found += f" whose weight is a {weight_class.__module__}.{weight_class.__qualname__} of {weight.dtype}"
    raise ValueError(f"`{argument}` must have plain linear maps {purpose}, {name} is a {found}: {remedy}.")


def check_sliceable(name: str, linear: nn.Module) -> None:
    check_plain(
        name,
        linear,
        "for their shift rows to be cut out",
        "swap before quantising or loading a LoRA, or keep the rows with `keep_shift=True` (and `shift_scale=0`)",
    )
