"""What a swapped linear map returns instead of one tensor of maps: values that diffusers' own code consumes.

Every AdaLN of diffusers that is swapped computes

    shift, scale, gate, … = linear(silu(conditioning)).chunk(n, dim)
    x * (1 + scale[:, None]) + shift[:, None]

A `ModulationMaps` chunks into tensors and, in the place of a shift, a `Rotation`, which may be indexed as a tensor of
shape (B, D) may, and whose addition rotates. Nothing is stored between calls and no module but the linear map changes.
"""

from collections.abc import Callable, Sequence

import torch

from .. import fused


class Rotation:
    """In the place of a shift: `tokens + rotation` is the tokens, shifted if there is a shift, then rotated.

        x + rotation = R(angle) (x + shift)
    Equation 6 of arXiv 2505.19122; the order of `functional.modulate`.

    Args:
        angle (torch.Tensor): radians, shape (B, D/2); with indices of None in between, anything that broadcasts
            against the tokens' (B, N).
        shift (torch.Tensor, optional): of shape (B, D), indexed alike.
    """

    def __init__(self, angle: torch.Tensor, shift: torch.Tensor | None = None):
        self.angle = angle
        self.shift = shift

    def _map(self, function: Callable[..., torch.Tensor], *others: "Rotation") -> "Rotation":
        if self.shift is None:
            return Rotation(function(self.angle, *(other.angle for other in others)))
        return Rotation(
            function(self.angle, *(other.angle for other in others)),
            function(self.shift, *(other.shift for other in others)),
        )

    def __getitem__(self, index) -> "Rotation":
        return self._map(lambda tensor: tensor[index])

    def unsqueeze(self, dim: int) -> "Rotation":
        return self._map(lambda tensor: tensor.unsqueeze(dim))

    def size(self, dim: int) -> int:
        return self.angle.size(dim)

    def added_to(self, tokens: torch.Tensor) -> torch.Tensor:
        """What `tokens + rotation` is.

        Args:
            tokens (torch.Tensor): shape (B, N, D).
        Returns:
            torch.Tensor: of the same shape.
        """
        if self.shift is not None:
            tokens = tokens + self.shift
        return fused.rotate(tokens, self.angle)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Addition to a tensor, and a choice between two (QwenImage's tokens of two conditions); nothing else."""
        if func in (torch.Tensor.add, torch.Tensor.__add__) and not kwargs:
            tokens, rotation = args
            return rotation.added_to(tokens)
        if func is torch.where and not kwargs:
            condition, chosen, other = args
            return chosen._map(lambda *tensors: torch.where(condition, *tensors), other)
        raise TypeError(f"A Rotation can only be added to tokens, got it as an argument of `{func.__name__}`.")


class ModulationMaps:
    """The maps of a modulation in their stock order, tensors and rotations; to be chunked as one tensor would be.

    Args:
        maps (sequence of torch.Tensor or Rotation): each for (B, D) rows of the stock map's output.
    """

    def __init__(self, maps: Sequence[torch.Tensor | Rotation]):
        self.maps = maps

    def __getitem__(self, index) -> "ModulationMaps":
        return ModulationMaps([rows[index] for rows in self.maps])

    def chunk(self, chunks: int, dim: int = 0) -> tuple:
        """The maps in equal groups; a group of one is the map itself.

        Args:
            chunks (int): number of groups.
            dim (int): the dimension of the rows, the last one, as the caller of a tensor says it.
        Raises:
            ValueError: if the groups are not equal, or of samples.
        """
        size, rest = divmod(len(self.maps), chunks)
        if rest or dim == 0:
            raise ValueError(
                f"`chunks` must divide the {len(self.maps)} maps of a modulation, along their rows, got {chunks} and "
                f"`dim` {dim}."
            )
        groups = [self.maps[index * size : (index + 1) * size] for index in range(chunks)]
        return tuple(group[0] if size == 1 else ModulationMaps(group) for group in groups)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.chunk:
            return args[0].chunk(*args[1:], **(kwargs or {}))
        raise TypeError(f"ModulationMaps must be chunked first, got them as an argument of `{func.__name__}`.")
