"""The row contract: what layers with normalised rows keep, whoever touches their weights. Torch only.

Rows of a weight-normalised layer are stored at a fixed norm (1 in `MPLinear`, sqrt(D) in
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
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import nn

from . import functional, fused
from .sharding import is_sharded, local_rows, return_to_shards


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


def _relative_row_norms(rows: torch.Tensor, row_norm: float) -> torch.Tensor:
    rows = rows.to(functional.compute_dtype(rows.dtype))
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm if row_norm == 1 else norm.div_(row_norm)


@torch.no_grad()
def _normalize_(layers: Iterable["NormalizedRows"]) -> None:
    # One tensor of the norms of all layers, since what is done to norms takes longer to start than to do.
    kinds = collections.defaultdict(list)
    # By weight: one that layers share would be divided by its norm twice.
    for weight, row_norm in {id(layer.weight): (layer.weight, layer.row_norm) for layer in layers}.values():
        rows = local_rows(weight)
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


class NormalizedRows(nn.Module):
    """The row contract, for modules that own a `weight` of shape (rows, n) and the attributes below."""

    forced_weight_normalization: bool
    row_norm: float

    @torch.no_grad()
    def _settle_rows(self) -> None:
        """Normalise rows of a training module that is about to be read as it is stored."""
        if not (self.training and self.forced_weight_normalization) or self.weight.is_meta or _loading.get():
            return
        norm = _relative_row_norms(local_rows(self.weight), self.row_norm)
        if not norm.numel():
            return  # More processes than rows: this one holds none.
        drift = (norm - 1).abs().masked_fill(norm == 0, 0).max().item()
        if drift <= _row_tolerance(self.weight.dtype):
            return
        global _drift_warned
        # However little it is, replicas go apart if it is put right on one process alone, which saves or samples.
        is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        is_replica = is_distributed and not is_sharded(self.weight)
        if not _drift_warned and (drift > DRIFT_WORTH_A_WARNING or is_replica):
            _drift_warned = True
            warnings.warn(
                f"the rows of a {type(self).__name__} have drifted {100 * drift:.2g}% from their norm during "
                "training, which lowers the effective learning rate; add `normalize_weights_(model)` after "
                "`optimizer.step()`, on every process, since replicas go apart where one of them saves or samples "
                "alone. If a LoRA was merged: merge it in evaluation mode",
                stacklevel=3,
            )
        self.normalize_rows_()

    def normalize_rows_(self) -> None:
        """Put every row back to its norm, whatever the module is used for."""
        _normalize_([self])

    def train(self, mode: bool = True):
        if not mode:
            self._settle_rows()
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._settle_rows()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _normalize_on_use(self) -> bool:
        return self.training or not self.forced_weight_normalization


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
        if isinstance(submodule, NormalizedRows) and submodule.forced_weight_normalization:
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
    _normalize_(
        module for module in modules if isinstance(module, NormalizedRows) and module.forced_weight_normalization
    )


class LoadsRowsAsStored:
    """For models beside `ModelMixin`: loading changes no row, so that a merged LoRA survives it."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `ModelMixin.from_pretrained`, with the rows exactly as they were saved."""
        with rows_as_loaded():
            return super().from_pretrained(*args, **kwargs)
