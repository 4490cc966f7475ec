"""Conditioning of tokens by scale, shift, rotation and gate, each a map of the conditioning vector.

`Modulation` is one site of a transformer block: one projection for all of its kinds and a learned gain for each. The
four named classes are its one-kind cases, to be put into other models, saved and loaded on their own. The activation
of the conditioning vector is not inside: it is computed once and shared by all blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from . import _registration, fused  # noqa: F401
from .layers import MPLinear
from .rows import ModelOfRows


@dataclass(frozen=True)
class Kind:
    """What is particular about a kind of modulation: all that is to be said of a new one, beside its formula.

    Args:
        argument (str, optional): of `functional.modulate`, which applies it to tokens; None for a factor of the output
            of the branch that follows.
        num_channels (int): how many channels share a number of its map.
    """

    argument: str | None
    num_channels: int = 1


# In the order in which they are applied, which is that of their rows in `Modulation.proj`.
MODULATION_KINDS = {
    "scale": Kind("scale"),
    "shift": Kind("shift"),
    "rotate": Kind("angle", num_channels=2),
    "gate": Kind(None),
}


def check_kinds(kinds: Sequence[str]) -> None:
    """Check a choice of modulations.

    Args:
        kinds (sequence of str): names out of `MODULATION_KINDS`.
    Raises:
        ValueError: if empty, not a sequence of names, unknown or repeated.
    """
    if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or set(kinds) - set(MODULATION_KINDS):
        raise ValueError(
            f"`modulation` must be a non-empty list of distinct names out of {list(MODULATION_KINDS)}, got {kinds!r}."
        )


class Modulation(nn.Module):
    """One site of conditioning: tokens and a conditioning vector in, modulated tokens and the branch's gate out.

        y = R(angle) (x (1 + scale) + shift),   gate = 1 + g
        scale, shift, angle, g = gain_kind * unit-row map of the conditioning, gains from 0
    Section 4 of arXiv 2505.19122. Without weight normalisation the map is a plain one that starts at zero, there are
    no gains, and the gate is g alone (AdaLN-Zero of arXiv 2212.09748).

    Args:
        dim (int): width D of a token, even for a rotation.
        conditioning_dim (int): width of the conditioning vector.
        kinds (sequence of str): non-empty subset of `MODULATION_KINDS`, in any order.
        weight_normalization (bool): unit rows and gains.
        forced_weight_normalization (bool): as in `MPLinear`.
    Raises:
        ValueError: if the kinds are empty or unknown, or D is odd for a rotation.
    """

    def __init__(
        self,
        dim: int,
        conditioning_dim: int,
        kinds: Sequence[str],
        weight_normalization: bool = True,
        forced_weight_normalization: bool = True,
    ):
        super().__init__()
        check_kinds(kinds)
        self.kinds = [kind for kind in MODULATION_KINDS if kind in kinds]
        self.sizes = []
        for kind in self.kinds:
            num_channels = MODULATION_KINDS[kind].num_channels
            if dim % num_channels:
                raise ValueError(
                    f"`dim` must be a multiple of {num_channels} for {kind!r}, which acts on groups of {num_channels} "
                    f"channels, got {dim}."
                )
            self.sizes.append(dim // num_channels)
        if weight_normalization:
            self.proj = MPLinear(
                conditioning_dim, sum(self.sizes), forced_weight_normalization=forced_weight_normalization
            )
            # A vector, not a scalar for each kind: `fully_shard` takes no zero-dimensional parameters.
            self.gain = nn.Parameter(torch.zeros(len(self.kinds)))
        else:
            self.proj = nn.Linear(conditioning_dim, sum(self.sizes), bias=False)
            self.gain = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No modulation at the start: gains, or the plain map, of zeros. The rows are `MPLinear`'s to reset."""
        nn.init.zeros_(self.proj.weight if self.gain is None else self.gain)

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Modulate tokens.

        Args:
            hidden_states (torch.Tensor): tokens, shape (B, N, D).
            conditioning (torch.Tensor): activated conditioning vector, shape (B, conditioning_dim).
        Returns:
            tuple: modulated tokens, shape (B, N, D), and the factor for the branch's output, shape (B, 1, D), or None
            if "gate" is not among the kinds.
        """
        maps = self.maps(self.proj(conditioning).unsqueeze(-2))
        gate = maps.pop("gate", None)
        maps = {MODULATION_KINDS[kind].argument: values for kind, values in maps.items()}
        return fused.modulate(hidden_states, **maps), gate

    def maps(self, projected: torch.Tensor) -> dict[str, torch.Tensor]:
        """What acts for each kind.

        Args:
            projected (torch.Tensor): output of `proj`, shape (..., sum(sizes)).
        Returns:
            dict: kind → its part of the output times its gain, with gains plus 1 for a gate; shape (..., size).
        """
        if self.gain is None:
            maps = projected.split(self.sizes, dim=-1)
        else:
            constants = [float(kind == "gate") for kind in self.kinds]
            maps = fused.gained_parts(projected, self.gain, self.sizes, constants)
        return dict(zip(self.kinds, maps, strict=True))


class _OneModulation(Modulation, ModelOfRows, ModelMixin, ConfigMixin):
    """A `Modulation` of one kind that can be saved and loaded alone."""

    _no_split_modules = []
    _kind: str

    @register_to_config
    def __init__(self, dim: int, conditioning_dim: int, forced_weight_normalization: bool = True):
        super().__init__(dim, conditioning_dim, (self._kind,), forced_weight_normalization=forced_weight_normalization)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Modulate tokens.

        Args:
            hidden_states (torch.Tensor): tokens, shape (B, N, D).
            conditioning (torch.Tensor): activated conditioning vector, shape (B, conditioning_dim), or one for all.
        Returns:
            torch.Tensor: shape (B, N, D), dtype of `hidden_states`.
        Raises:
            ValueError: if a shape is another one: the maps would be broadcast over the wrong dimension.
        """
        dim, conditioning_dim = self.config.dim, self.config.conditioning_dim
        shape = hidden_states.shape
        fits = conditioning.shape in ((shape[0], conditioning_dim), (1, conditioning_dim))
        if len(shape) != 3 or shape[-1] != dim or not fits:
            raise ValueError(
                f"`hidden_states` must have shape (B, N, {dim}) and `conditioning` (B, {conditioning_dim}), got "
                f"{tuple(shape)} and {tuple(conditioning.shape)}."
            )
        hidden_states, gate = super().forward(hidden_states, conditioning)
        return hidden_states if gate is None else hidden_states * gate.to(hidden_states.dtype)


class ScaleModulation(_OneModulation):
    """Tokens times `1 + gain * map(conditioning)`; the identity at the start.

    Args:
        dim (int): width D of a token.
        conditioning_dim (int): width of the conditioning vector.
        forced_weight_normalization (bool): as in `MPLinear`.
    Shapes:
        (B, N, D), (B, conditioning_dim) → (B, N, D).
    """

    __module__ = "diffusers_mp"
    _kind = "scale"


class ShiftModulation(_OneModulation):
    """Tokens plus `gain * map(conditioning)`; the identity at the start.

    Args:
        dim (int): width D of a token.
        conditioning_dim (int): width of the conditioning vector.
        forced_weight_normalization (bool): as in `MPLinear`.
    Shapes:
        (B, N, D), (B, conditioning_dim) → (B, N, D).
    """

    __module__ = "diffusers_mp"
    _kind = "shift"


class RotationModulation(_OneModulation):
    """Tokens rotated by learned angles, which keeps the norm of every token; the identity at the start.

        (x_j, x_{j + D/2}) turned by angle_j = gain * <w_j, conditioning> / ||w_j||,   j = 0..D/2-1
    Equation 6 and Lemma 2 of arXiv 2505.19122. Half the weight of a shift.

    Args:
        dim (int): width D of a token, even.
        conditioning_dim (int): width of the conditioning vector.
        forced_weight_normalization (bool): as in `MPLinear`.
    Shapes:
        (B, N, D), (B, conditioning_dim) → (B, N, D).
    Raises:
        ValueError: if `dim` is odd.
    """

    __module__ = "diffusers_mp"
    _kind = "rotate"


class GateModulation(_OneModulation):
    """Output of a branch times `1 + gain * map(conditioning)`; the identity at the start.

    Args:
        dim (int): width D of a token.
        conditioning_dim (int): width of the conditioning vector.
        forced_weight_normalization (bool): as in `MPLinear`.
    Shapes:
        (B, N, D), (B, conditioning_dim) → (B, N, D).
    """

    __module__ = "diffusers_mp"
    _kind = "gate"
