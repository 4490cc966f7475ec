"""Magnitude-preserving layers: they hold hyper-parameters and weights, the arithmetic is in `functional`. Torch only.

The row contract. Rows of a weight-normalised layer are stored at a fixed norm (1 in `MPLinear`, sqrt(D) in
`MPEmbedding`), so that the stored weight is the weight in effect:

- in training mode value and gradient are those of the normalised rows whatever norm is stored, so that a training loop
  that has never heard of this package is correct; only a loop that promises to keep the norm (`trust_rows_`) has the
  rows used as they are;
- `normalize_weights_` puts rows back after an optimiser step (forced weight normalisation, EDM2 section 2.3); leaving
  training mode, and saving in training mode, do it too;
- under `fully_shard`, which shards rows, each process puts its own rows back: nothing is gathered or sent;
- in evaluation mode with forced normalisation the stored rows are used as they are, which is what LoRA merging,
  quantisation and export see. Without it rows keep a norm of their own and are always normalised on use.

Rows that are meant to have another norm (a LoRA was merged into them) survive saving and loading: save in evaluation
mode; `from_pretrained` leaves rows as they are stored, and so does `load_state_dict` in evaluation mode.
"""

import collections
import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import functional, fused


# A foreign loop that lets rows drift further than this has an effective learning rate that decays on its own.
DRIFT_WORTH_A_WARNING = 0.05
_drift_warned = False
_loading = ContextVar("_loading", default=False)


@contextlib.contextmanager
def rows_as_loaded() -> Iterator[None]:
    """Leave rows alone within this context: a model that is being loaded leaves training mode without any training."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


@functools.cache
def _row_tolerance(dtype: torch.dtype) -> float:
    # Rounding a normalised row to `dtype` moves its norm by eps / 2 at most; the rest is room for the norm's own sum.
    return torch.finfo(dtype).eps + 32 * torch.finfo(functional.compute_dtype(dtype)).eps


def _rows_here(weight: torch.Tensor) -> torch.Tensor:
    """The rows of a weight that this process holds: all of them unless it is a DTensor. Shares its memory."""
    # Asked of the tensor, since importing DTensor takes half a second.
    placements = getattr(weight, "placements", None)
    if placements is None:
        return weight
    if not all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in placements):
        raise ValueError(
            "the weight of a weight-normalised layer must be sharded on dimension 0, which keeps its rows whole, or "
            f"replicated, got {tuple(placements)}."
        )
    return weight.to_local()


def _relative_row_norms(rows: torch.Tensor, row_norm: float) -> torch.Tensor:
    rows = rows.to(functional.compute_dtype(rows.dtype))
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm if row_norm == 1 else norm.div_(row_norm)


@torch.no_grad()
def _normalize_rows_(layers: Iterable["_NormalizedRows"]) -> None:
    # One tensor of the norms of all layers, since what is done to norms takes longer to start than to do.
    kinds = collections.defaultdict(list)
    # By weight: one that layers share would be divided by its norm twice.
    for weight, row_norm in {id(layer.weight): (layer.weight, layer.row_norm) for layer in layers}.values():
        rows = _rows_here(weight)
        kinds[rows.device, rows.dtype].append((rows, _relative_row_norms(rows, row_norm)))
    for (_, dtype), rows_and_norms in kinds.items():
        rows, norms = zip(*rows_and_norms, strict=True)
        norm = torch.cat(norms)
        # Rows that are there already are left alone to the bit, without asking the device how many that are.
        settled = (norm - 1).abs_() <= _row_tolerance(dtype)
        # Rows too long for a norm become NaN, which is noticed, rather than zeros, which are not.
        norm.masked_fill_(settled, 1).clamp_(min=fused.SMALLEST_NORMS[norm.dtype])
        norm.nan_to_num_(nan=math.nan, posinf=math.nan)
        norms = norm.split([len(of_layer) for of_layer in rows])
        if dtype.itemsize == 1:  # float8, in which layerwise casting stores weights, knows no division
            for of_layer, norm in zip(rows, norms, strict=True):
                of_layer.copy_(of_layer.to(norm.dtype).div_(norm))
        else:
            torch._foreach_div_(rows, norms)


class _NormalizedRows(nn.Module):
    """The row contract, for modules that own a `weight` of shape (rows, n) and the attributes below."""

    forced_weight_normalization: bool
    row_norm: float

    @torch.no_grad()
    def _settle_rows(self) -> None:
        """Normalise rows of a training module that is about to be read as it is stored."""
        if not (self.training and self.forced_weight_normalization) or self.weight.is_meta or _loading.get():
            return
        norm = _relative_row_norms(_rows_here(self.weight), self.row_norm)
        if not norm.numel():
            return  # More processes than rows: this one holds none.
        drift = (norm - 1).abs().masked_fill(norm == 0, 0).max().item()
        if drift <= _row_tolerance(self.weight.dtype):
            return
        global _drift_warned
        # However little it is, replicas go apart if it is put right on one process alone, which saves or samples.
        is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        is_replica = is_distributed and not hasattr(self.weight, "placements")
        if not _drift_warned and (drift > DRIFT_WORTH_A_WARNING or is_replica):
            _drift_warned = True
            warnings.warn(
                f"the rows of a {type(self).__name__} have drifted {100 * drift:.2g}% from their norm during "
                "training, which lowers the effective learning rate; add `normalize_weights_(model)` after "
                "`optimizer.step()`, on every process, since replicas go apart where one of them saves or samples "
                "alone. If a LoRA was merged: merge it in evaluation mode",
                stacklevel=3,
            )
        _normalize_rows_([self])

    def train(self, mode: bool = True):
        if not mode:
            self._settle_rows()
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._settle_rows()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _normalize_on_use(self) -> bool:
        return self.training or not self.forced_weight_normalization


class MPLinear(_NormalizedRows, nn.Linear):
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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rows from N(0, 1) and scale them to norm 1."""
        nn.init.normal_(self.weight)
        _normalize_rows_([self])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the map.

        Args:
            hidden_states (torch.Tensor): shape (..., in_features).
        Returns:
            torch.Tensor: shape (..., out_features).
        """
        weight = self.weight
        if self.training and self.rows_are_trusted:
            weight = fused.unit_rows(weight)
        elif self._normalize_on_use():
            weight = functional.unit_norm(weight)
        return F.linear(hidden_states, weight)


class MPEmbedding(_NormalizedRows, nn.Embedding):
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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rows from N(0, 1) and scale them to RMS 1."""
        nn.init.normal_(self.weight)
        _normalize_rows_([self])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look rows up.

        Args:
            input (torch.Tensor): integer ids in [0, num_embeddings), shape (...).
        Returns:
            torch.Tensor: shape (..., embedding_dim).
        """
        rows = F.embedding(input, self.weight)
        return functional.unit_magnitude(rows) if self._normalize_on_use() else rows


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


def return_to_shards(module: nn.Module) -> None:
    """Make the modules of `fully_shard` drop the parameters that they have gathered. Nothing happens to others.

    After a forward without a backward, the outermost of them still holds gathered copies as its parameters: what is
    written into these is lost, and what is written into the shards is not seen before they are gathered again.

    Args:
        module (nn.Module): any module.
    """
    for submodule in module.modules():
        # Of the class, because a module looks long for what it has not.
        if hasattr(type(submodule), "reshard"):
            submodule.reshard()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module within its wrappers: DistributedDataParallel's, and that of compilation."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
    return module


def trust_rows_(module: nn.Module) -> nn.Module:
    """Promise that rows have norm 1 whenever the module runs, which makes training faster.

    In training mode an `MPLinear` normalises its rows in every forward, since it cannot know what an optimiser has
    done to them. After this call it takes them as they are and only projects the gradient: the same values and
    gradients for rows of norm 1, and wrong ones for others. The promise is kept by calling `normalize_weights_` after
    every `optimizer.step()`, and after whatever else changes weights of a module in training mode. Rows are normalised
    here, once. Layers without forced weight normalisation, whose rows keep a norm of their own, are not concerned.

    Args:
        module (nn.Module): any module.
    Returns:
        nn.Module: the same module.
    """
    for submodule in module.modules():
        if isinstance(submodule, MPLinear) and submodule.forced_weight_normalization:
            submodule.rows_are_trusted = True
    return normalize_weights_(module)


def normalize_weights_(module: nn.Module) -> nn.Module:
    """Put the rows of every layer with forced weight normalisation back to their norm, in place.

    Call it after each `optimizer.step()`, on every process. Idempotent to the bit: a row whose norm is right up to the
    rounding of its dtype is not touched. EDM2 (arXiv 2312.02696), section 2.3.

    Args:
        module (nn.Module): any module that contains `MPLinear` or `MPEmbedding` layers, or none.
    Returns:
        nn.Module: the same module.
    Raises:
        ValueError: if a weight is sharded through its rows.
    """
    return_to_shards(module)
    settle_rows_(module.modules())
    return module


def settle_rows_(modules: Iterable[nn.Module]) -> None:
    """As `normalize_weights_` of these modules themselves, without those within them; others pass."""
    _normalize_rows_(
        module for module in modules if isinstance(module, _NormalizedRows) and module.forced_weight_normalization
    )
