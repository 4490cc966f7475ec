"""Magnitude-preserving layers: they hold hyper-parameters and weights; the arithmetic is in `functional`, the contract
of their rows in `rows`. Torch only.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from . import functional, fused
from .rows import NormalizedRows


class MPLinear(NormalizedRows, nn.Linear):
    """Linear map with unit rows and no bias; keeps RMS 1 for uncorrelated inputs.

        y_i = <w_i / ||w_i||, x>
    Lemma 3 of arXiv 2505.19122; forced normalisation is section 2.3 of EDM2 (arXiv 2312.02696), which does it at the
    start of a training forward where this package does it after the update.

    Args:
        in_features (int): size of the last dimension of the input.
        out_features (int): size of the last dimension of the output.
        bias (bool): False, at the place that it has in `torch.nn.Linear`.
        device (torch.device, optional): as in `torch.nn.Linear`.
        dtype (torch.dtype, optional): as in `torch.nn.Linear`.
        forced_weight_normalization (bool): rows return to norm 1 by `normalize_weights_`, on leaving training mode and
            on saving, and are used as stored in evaluation mode.
    Shapes:
        (..., in_features) → (..., out_features), weight (out_features, in_features).
    Raises:
        ValueError: if a bias is asked for.
    """

    row_norm = 1.0
    # Set by `trust_rows_`.
    rows_are_trusted = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        forced_weight_normalization: bool = True,
    ):
        if bias is not False:
            raise ValueError(
                "`bias` must be False: a constant added to the output changes its magnitude. Where one is needed, "
                f"append a constant 1 to the input, as MPPatchEmbed does; got {bias!r}."
            )
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.forced_weight_normalization = forced_weight_normalization

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the map.

        Args:
            hidden_states (torch.Tensor): shape (..., in_features).
        Returns:
            torch.Tensor: shape (..., out_features).
        """
        weight = self.weight
        if self._normalize_on_use():
            weight = fused.unit_rows(weight) if self.rows_are_trusted else fused.unit_norm(weight)
        return F.linear(hidden_states, weight)


class MPEmbedding(NormalizedRows, nn.Embedding):
    """Embedding whose rows are used at RMS 1.

        y = sqrt(D) w_i / ||w_i||
    Section 4 of arXiv 2505.19122. EDM2 uses a linear map of one-hot vectors where this is a table.

    Args:
        num_embeddings (int): number of rows.
        embedding_dim (int): width D of a row.
        device (torch.device, optional): as in `torch.nn.Embedding`.
        dtype (torch.dtype, optional): as in `torch.nn.Embedding`.
        forced_weight_normalization (bool): rows return to norm sqrt(D) by `normalize_weights_`, on leaving training
            mode and on saving, and are used as stored in evaluation mode.
    Shapes:
        integers (...) → (..., D), weight (num_embeddings, D).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        forced_weight_normalization: bool = True,
    ):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.forced_weight_normalization = forced_weight_normalization

    @property
    def row_norm(self) -> float:
        return math.sqrt(self.embedding_dim)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look rows up.

        Args:
            input (torch.Tensor): integer ids in [0, num_embeddings), shape (...).
        Returns:
            torch.Tensor: shape (..., embedding_dim).
        """
        rows = F.embedding(input, self.weight)
        return fused.unit_magnitude(rows) if self._normalize_on_use() else rows


class MPSiLU(nn.Module):
    """SiLU divided by 0.596, its RMS on standard normal input. See `functional.mp_silu`.

    Args:
        inplace (bool): overwrite the input, as in `torch.nn.SiLU`.
    """

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.inplace = inplace

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return functional.mp_silu(hidden_states, self.inplace)


class MPLeakyReLU(nn.Module):
    """Leaky ReLU that keeps any magnitude. See `functional.mp_leaky_relu`.

    Args:
        negative_slope (float): slope for negative inputs.
        inplace (bool): overwrite the input, as in `torch.nn.LeakyReLU`.
    """

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False):
        super().__init__()
        self.negative_slope = negative_slope
        self.inplace = inplace

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return functional.mp_leaky_relu(hidden_states, self.negative_slope, self.inplace)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class MPTimestepEmbedding(nn.Module):
    """Timestep to vector: cosine and sine features, linear map, activation, linear map; keeps RMS 1.

    Args:
        dim (int): width D of the result.
        magnitude_preserving (bool): features times sqrt(2), which makes their RMS exactly 1.
        linear (callable): makes a linear map of (in_features, out_features).
        activation (callable): makes the activation between the two maps.
    """

    def __init__(
        self,
        dim: int,
        magnitude_preserving: bool = True,
        linear: Callable[[int, int], nn.Module] = MPLinear,
        activation: Callable[[], nn.Module] = MPSiLU,
    ):
        super().__init__()
        self.magnitude_preserving = magnitude_preserving
        self.linear_1 = linear(functional.NUM_TIME_FEATURES, dim)
        self.act = activation()
        self.linear_2 = linear(dim, dim)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Embed timesteps.

        Args:
            timestep (torch.Tensor): shape (B,), integer or at least float32.
            dtype (torch.dtype): dtype of the model.
        Returns:
            torch.Tensor: shape (B, D).
        """
        features = functional.timestep_features(timestep, dtype, self.magnitude_preserving)
        return self.linear_2(self.act(self.linear_1(features)))


class MPPatchEmbed(nn.Module):
    """Image to tokens: each patch with a constant 1 appended, then one linear map; the 1 stands in for the bias.

    Args:
        patch_size (int): side p of a patch.
        in_channels (int): channels C of the image.
        dim (int): width D of a token.
        linear (callable): makes a linear map of (in_features, out_features).
    Shapes:
        (B, C, H, W) → (B, H W / p^2, D).
    """

    def __init__(
        self, patch_size: int, in_channels: int, dim: int, linear: Callable[[int, int], nn.Module] = MPLinear
    ):
        super().__init__()
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.proj = linear(patch_size * patch_size * in_channels + 1, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Embed an image.

        Args:
            hidden_states (torch.Tensor): shape (B, C, H, W), H and W divisible by the patch size.
        Returns:
            torch.Tensor: shape (B, H W / p^2, D).
        Raises:
            ValueError: if the image is of another shape.
        """
        p, shape = self.patch_size, hidden_states.shape
        if len(shape) != 4 or shape[1] != self.in_channels or shape[2] % p or shape[3] % p:
            raise ValueError(
                f"`hidden_states` must have shape (B, {self.in_channels}, H, W), H and W divisible by {p}, got "
                f"{tuple(shape)}."
            )
        return self.proj(F.pad(functional.patchify(hidden_states, self.patch_size), (0, 1), value=1.0))
