"""The one module that a swap puts into a model: the modulation's linear map with rotation heads beside it."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .sites import Site
from .values import ModulationMaps, Rotation


class RotationLinear(nn.Module):
    """A modulation's linear map whose shifts became rotations.

    Its rows are those of the stock map in groups of D, a group for each map. Scale and gate rows stay as they were.
    The angles come from a head of their own that starts at zero. The shift rows are gone; or, with `keep_shift`,
    still there and multiplied by `shift_scale`.

        shift in effect = shift_scale * shift(c) + (1 - shift_scale) * mean_shift
    where absent terms are zero and `shift_scale` is 0 once the rows are gone.

    Args:
        linear (nn.Module): the stock map, of shape (..., conditioning_dim) → (..., len(kinds) * D). With `keep_shift`
            it is used as it is, whatever its class (quantised, carrying a LoRA).
        kinds (sequence of str): what its groups of rows are: "scale", "shift", "gate", or "rotate" for a shift that
            becomes a rotation.
        keep_shift (bool): leave the shift rows where they are.
        mean_shift (bool): a constant shift for each rotation, zero unless filled.
        rank (int, optional): heads through a bottleneck of this width.
    Raises:
        ValueError: if D is odd.
    """

    def __init__(
        self,
        linear: nn.Module,
        kinds: Sequence[str],
        keep_shift: bool = False,
        mean_shift: bool = False,
        rank: int | None = None,
    ):
        super().__init__()
        self.kinds = list(kinds)
        self.dim = linear.out_features // len(self.kinds)
        if self.dim % 2:
            raise ValueError(
                f"`linear` must have maps of even width, rotation turns pairs of channels, got {self.dim}."
            )
        num_rotations = self.kinds.count("rotate")
        # A quantised weight has no dtype to compute in, but its bias does.
        tensors = (linear.weight, *linear.parameters())
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
        factory = {"device": linear.weight.device, "dtype": dtype}
        num_angles = num_rotations * self.dim // 2
        if rank is None:
            self.rotation = nn.Linear(linear.in_features, num_angles, **factory)
        else:
            self.rotation = nn.Sequential(
                nn.Linear(linear.in_features, rank, bias=False, **factory), nn.Linear(rank, num_angles, **factory)
            )
        last = self.rotation if rank is None else self.rotation[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mean_shift = nn.Parameter(torch.zeros(num_rotations, self.dim, **factory)) if mean_shift else None
        # A tensor, so that annealing does not compile anew; float32, as its steps may be small.
        shift_scale = torch.ones((), device=linear.weight.device) if keep_shift else None
        self.register_buffer("shift_scale", shift_scale)
        self.linear = linear if keep_shift else self._without_shift(linear)
        self.train(linear.training)

    def forward(self, conditioning: torch.Tensor) -> ModulationMaps | Rotation:
        """Compute all maps.

        Args:
            conditioning (torch.Tensor): activated conditioning, shape (B, conditioning_dim).
        Returns:
            ModulationMaps or Rotation: a map for each kind; the rotation itself if it is the only one.
        """
        angles = iter(self.rotation(conditioning).chunk(self.kinds.count("rotate"), dim=-1))
        mean_shifts = iter([] if self.mean_shift is None else self.mean_shift)
        rows = iter(())
        if self.linear is not None:
            rows = self.linear(conditioning)
            rows = iter(rows.chunk(rows.shape[-1] // self.dim, dim=-1))
        maps = []
        for kind in self.kinds:
            if kind != "rotate":
                maps.append(next(rows))
                continue
            angle = next(angles)
            shift = next(mean_shifts, None)
            if shift is not None:
                shift = shift.expand(*angle.shape[:-1], -1)
            if self.shift_scale is not None:
                shift = self._annealed(next(rows), shift)
            maps.append(Rotation(angle, shift))
        return maps[0] if len(maps) == 1 else ModulationMaps(maps)

    def _annealed(self, shift: torch.Tensor, mean_shift: torch.Tensor | None) -> torch.Tensor:
        shift_scale = self.shift_scale.to(shift.dtype)
        if mean_shift is None:
            return shift_scale * shift
        return shift_scale * shift + (1 - shift_scale) * mean_shift

    def drop_shift_(self) -> None:
        """Let go of the shift rows, in place; afterwards `mean_shift`, if there is one, is in full effect."""
        if self.shift_scale is not None:
            self.linear = self._without_shift(self.linear)
            self.shift_scale = None

    def _without_shift(self, linear: nn.Linear) -> nn.Linear | None:
        groups = [index for index, kind in enumerate(self.kinds) if kind != "rotate"]
        if not groups:
            return None

        def kept(rows: torch.Tensor) -> nn.Parameter:
            rows_of_groups = rows.detach().unflatten(0, (len(self.kinds), self.dim))[groups].flatten(0, 1)
            return nn.Parameter(rows_of_groups, requires_grad=rows.requires_grad)

        # Not drawn first and replaced then: the largest models have gigabytes of these.
        sliced = nn.Linear(linear.in_features, len(groups) * self.dim, bias=linear.bias is not None, device="meta")
        sliced.weight = kept(linear.weight)
        if linear.bias is not None:
            sliced.bias = kept(linear.bias)
        return sliced.train(linear.training)

    def stock_linear(self, stock: nn.Linear | None) -> nn.Module:
        """The stock map again: kept rows as they are now, shift rows from `stock` unless they are here.

        Args:
            stock (nn.Linear, optional): the map as it was before the swap; needed once the shift rows are gone.
        Returns:
            nn.Module: a map of the stock shape, trained or frozen as the kept rows, or `stock` if none were kept.
        """
        if self.shift_scale is not None:
            return self.linear
        linear = nn.Linear(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta").train(
            self.training
        )
        here = next(self.parameters())
        for name, source in stock.named_parameters():
            rows = source.detach().to(here.device, here.dtype, copy=True).unflatten(0, (len(self.kinds), self.dim))
            kept = source if self.linear is None else getattr(self.linear, name)
            if self.linear is not None:
                groups = [index for index, kind in enumerate(self.kinds) if kind != "rotate"]
                rows[groups] = kept.detach().to(here.dtype).unflatten(0, (len(groups), self.dim))
            setattr(linear, name, nn.Parameter(rows.flatten(0, 1), requires_grad=kept.requires_grad))
        return linear

    def extra_repr(self) -> str:
        return f"kinds={self.kinds}, keep_shift={self.shift_scale is not None}"


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


def replace_maps(model: nn.Module, linears: Mapping[str, RotationLinear]) -> None:
    """Put the modules of `make_rotation_linears` in the places of a model's maps."""
    for name, linear in linears.items():
        model.set_submodule(name, linear)
