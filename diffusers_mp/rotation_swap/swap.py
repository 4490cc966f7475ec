"""Swapping the shifts of a diffusers transformer for rotations, in place, and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

from ..transformer_mpdit import MPDiTTransformer2DModel
from .coverage import supported_names
from .linear import RotationLinear
from .model_class import is_rotation_class, rotation_class
from .native import swap_native
from .sites import SUBLAYERS, Site, find_sites


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
    mean_shifts = None if calibration is None else _mean_shifts(model, sites, calibration)
    options = {
        "sublayers": list(sublayers),
        "keep_shift": keep_shift,
        "mean_shift": mean_shifts is not None,
        "rank": rank,
    }
    # All are made before the first is put in: an error leaves the model as it was.
    linears = make_rotation_linears(sites, options)
    for name, linear in linears.items():
        if keep_shift:
            linear.shift_scale.fill_(shift_scale)
        if mean_shifts is not None:
            with torch.no_grad():
                linear.mean_shift.copy_(mean_shifts[name])
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
    _check_not_native(model)
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
        _check_sliceable(name, rotation.linear)
    for rotation in rotations.values():
        rotation.drop_shift_()
    model.register_to_config(rotation_modulation={**model.config.rotation_modulation, "keep_shift": False})


def rotation_linears(model: nn.Module) -> dict[str, RotationLinear]:
    """The swapped maps of a model by their paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RotationLinear)}


def rotation_tensors(rotations: Mapping[str, RotationLinear]) -> list[torch.Tensor]:
    """All that `rotation_linears` hold."""
    return [tensor for each in rotations.values() for tensor in (*each.parameters(), *each.buffers())]


def make_rotation_linears(sites: Sequence[Site], options: Mapping) -> dict[str, RotationLinear]:
    """The modules that take the places of a model's maps, not yet put there.

    Args:
        sites (sequence of Site): from `find_sites`.
        options (mapping): `keep_shift`, `mean_shift` and `rank` of `RotationLinear`.
    Returns:
        dict: module for each path.
    """
    options = {name: options[name] for name in ("keep_shift", "mean_shift", "rank")}
    return {site.name: RotationLinear(site.linear, site.kinds, **options) for site in sites}


def install(model: nn.Module, linears: Mapping[str, RotationLinear], options: Mapping) -> None:
    """Put them there, and make the model one of its swapped class.

    Args:
        model (nn.Module): of a stock class, or of the swapped one that is just being made.
        linears (mapping): from `make_rotation_linears`.
        options (mapping): of the swap, for the config.
    """
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    if not is_rotation_class(type(model)):
        model.__class__ = rotation_class(type(model))
    model.register_to_config(rotation_modulation=dict(options))


# Checks


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
    _check_hooks(model)
    check_loaded(model, [*model.parameters(), *model.buffers()])
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"`model` must not be compiled yet, {name or 'it'} is: swap first.")


def check_loaded(model: nn.Module, tensors: Iterable[torch.Tensor], argument: str = "model") -> None:
    """Raise if tensors of a model that are to be read or written are offloaded, or were never loaded."""
    if any(tensor.is_meta for tensor in tensors):
        _check_hooks(model, argument)
        raise ValueError(f"`{argument}` must hold weights, some of its tensors are on the meta device: load it first.")


def _check_hooks(model: nn.Module, argument: str = "model") -> None:
    for name, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if hasattr(module, "_hf_hook") or hooks:
            raise ValueError(
                f"`{argument}` must be without hooks (offloading, device_map, layerwise casting, caches), "
                f"{name or 'it'} has one: attach them afterwards."
            )


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
            _check_sliceable(site.name, site.linear)


def check_swapped(model: nn.Module) -> None:
    """Raise if a model is not a swapped one."""
    _check_not_native(model)
    if not is_rotation_class(type(model)):
        raise ValueError(f"`model` must be swapped by `swap_adaln_for_rotation`, got a {type(model).__name__}.")


def _check_not_native(model: nn.Module) -> None:
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


def _check_sliceable(name: str, linear: nn.Module) -> None:
    check_plain(
        name,
        linear,
        "for their shift rows to be cut out",
        "swap before quantising or loading a LoRA, or keep the rows with `keep_shift=True` (and `shift_scale=0`)",
    )


# Calibration


@torch.no_grad()
def _mean_shifts(model: nn.Module, sites: Sequence[Site], calibration: Iterable[Mapping]) -> dict[str, torch.Tensor]:
    """Mean of each shift over the samples of the calibration, shape (number of rotations, D) for each site."""
    sums, counts = {site.name: 0.0 for site in sites}, {site.name: 0 for site in sites}

    def record(site: Site):
        def hook(linear, args, output):
            rows = output.float().flatten(0, -2)
            sums[site.name] = sums[site.name] + rows.sum(dim=0)
            counts[site.name] += len(rows)

        return hook

    handles = [site.linear.register_forward_hook(record(site)) for site in sites]
    modes = {module: module.training for module in model.modules()}
    # Labels must not be dropped, as some embeddings do in training mode.
    model.eval()
    try:
        for inputs in calibration:
            if not isinstance(inputs, Mapping):
                raise ValueError(
                    f"`calibration` must be an iterable of mappings, got a {type(inputs).__name__} in it."
                )
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    unused = [name for name, count in counts.items() if not count]
    if unused:
        raise ValueError(
            f"`calibration` must run every modulation of the model at least once, it did not run {unused}."
        )
    means = {}
    for site in sites:
        mean = (sums[site.name] / counts[site.name]).unflatten(0, (len(site.kinds), -1))
        means[site.name] = mean[[index for index, kind in enumerate(site.kinds) if kind == "rotate"]]
    return means


def num_parameters(model: nn.Module) -> int:
    """Number of the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
