"""The swap in this package's own model: another configuration of it, with the weights that carry over."""

import torch
from torch import nn

from ..layers import MPLinear
from ..modulation import Modulation
from ..transformer_mpdit import MPDiTTransformer2DModel


@torch.no_grad()
def swap_native(model: MPDiTTransformer2DModel, keep_shift: bool) -> dict[str, tuple[str, ...]]:
    """Turn a model with "shift" among its modulations into one with "rotate", in place.

    Rows and gains of the other kinds are kept exactly; rotation rows are drawn, and have no effect before their gain
    or, without weight normalisation, they themselves are trained. The result is a plain `MPDiTTransformer2DModel` and
    saves and loads as one.

    Args:
        model (MPDiTTransformer2DModel): to be changed.
        keep_shift (bool): rotate besides the shift instead of in its place.
    Returns:
        dict: path of each map → its kinds.
    Raises:
        ValueError: if there is no shift, or there is rotation already, or maps have a LoRA or are quantised; nothing
            has been changed then.
    """
    kinds = list(model.config.modulation)
    if "shift" not in kinds or "rotate" in kinds:
        raise ValueError(f"`model` must have shift and no rotation among its modulations, it has {kinds}.")
    sites = {name: site for name, site in model.named_modules() if isinstance(site, Modulation)}
    for name, site in sites.items():
        # Of a wrapped map only the rows would be kept.
        if type(site.proj) not in (MPLinear, nn.Linear) or type(site.proj.weight.data) is not torch.Tensor:
            raise ValueError(
                "`model` must have plain modulation maps: merge and unload a LoRA before, and swap before quantising; "
                f"`{name}.proj` is a {type(site.proj).__name__} of {type(site.proj.weight.data).__name__}."
            )
    swapped = {name: _with_rotation(site, keep_shift) for name, site in sites.items() if "shift" in site.kinds}
    for name, site in swapped.items():
        model.set_submodule(name, site)
    kinds = [kind for kind in kinds if kind != "shift" or keep_shift]
    model.register_to_config(modulation=[*kinds, "rotate"])
    return {f"{name}.proj": tuple(site.kinds) for name, site in swapped.items()}


def _with_rotation(site: Modulation, keep_shift: bool) -> Modulation:
    kinds = [kind for kind in site.kinds if kind != "shift" or keep_shift]
    weight = site.proj.weight
    swapped = Modulation(
        site.sizes[site.kinds.index("shift")],
        site.proj.in_features,
        [*kinds, "rotate"],
        weight_normalization=site.gain is not None,
        forced_weight_normalization=getattr(site.proj, "forced_weight_normalization", False),
    ).to(weight.device, weight.dtype)
    rows = dict(zip(site.kinds, weight.split(site.sizes), strict=True))
    new_rows = dict(zip(swapped.kinds, swapped.proj.weight.split(swapped.sizes), strict=True))
    for kind in kinds:
        new_rows[kind].copy_(rows[kind])
        if site.gain is not None:
            swapped.gain[swapped.kinds.index(kind)] = site.gain[site.kinds.index(kind)]
    for name, parameter in swapped.named_parameters():
        parameter.requires_grad_(site.get_parameter(name).requires_grad)
    return swapped.train(site.training)
