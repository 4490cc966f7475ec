"""Conditioning of tokens by scale, shift, rotation and gate, each a map of the conditioning vector.

`Modulation` is one site of a transformer block: one projection for all of its kinds and a learned gain for each. The
four named classes are its one-kind cases, to be put into other models, saved and loaded on their own. The activation
of the conditioning vector is not inside: it is computed once and shared by all blocks.
"""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from . import _registration, functional  # noqa: F401
from .layers import MPLinear
from .rows import ModelOfRows


# In the order in which they are applied; a gate acts on the output of the branch that follows.
MODULATION_KINDS = ("scale", "shift", "rotate", "gate")


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
        dim (int): width D of a token; even if "rotate" is among the kinds.
        conditioning_dim (int): width of the conditioning vector.
        kinds (sequence of str): non-empty subset of "scale", "shift", "rotate", "gate", in any order.
        weight_normalization (bool): unit rows and gains.
        forced_weight_normalization (bool): as in `MPLinear`.
    Raises:
        ValueError: if the kinds are empty or unknown, or D is odd with "rotate".
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
        if "rotate" in kinds and dim % 2:
            raise ValueError(f"`dim` must be even for rotation, which turns pairs of channels, got {dim}.")
        self.kinds = [kind for kind in MODULATION_KINDS if kind in kinds]
        self.sizes = [dim // 2 if kind == "rotate" else dim for kind in self.kinds]
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
        maps = self.proj(conditioning).unsqueeze(-2).split(self.sizes, dim=-1)
        if self.gain is not None:
            maps = [part * gain for part, gain in zip(maps, self.gain.to(conditioning.dtype).unbind(), strict=True)]
        maps = dict(zip(self.kinds, maps, strict=True))
        hidden_states = functional.modulate(hidden_states, maps.get("scale"), maps.get("shift"), maps.get("rotate"))
        gate = maps.get("gate")
        if gate is not None:
            gate = gate if self.gain is None else 1 + gate
        return hidden_states, gate


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
