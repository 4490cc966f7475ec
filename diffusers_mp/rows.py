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
  quantisation and export see. Without it rows are free: they keep any norm and are always normalised on use.

Rows that no training moves are whatever they are stored as: frozen ones, under a LoRA, quantised or not, whichever
library froze them, and those that a parametrisation computes. Merged, fused or residual rows (PiSSA) are therefore in
effect as they are in either mode, and are saved and loaded as they are. They are normalised once they are trained.
Rows of an average, which are shorter than their norm, are normalised when a copy in training mode is saved. Where rows
are not forced, whatever changes a weight that it does not train is refused by the model.
"""

import collections
import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import nn

from .projection import divide_, restore_norms_, row_norms, row_tolerance
from .sharding import is_sharded, local_rows, return_to_shards


# Ways to start a LoRA that change the weight beside it, by the beginning of their names in PEFT, in small letters.
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")
_NOT_QUANTISED = (
    "`quantization_config` must be None, and weights not quantised otherwise, for a model with "
    "`forced_weight_normalization=False`, whose rows are normalised on use, which quantised maps do not do; got {}."
)
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


def _relative_row_norms(weights: Sequence[torch.Tensor], wanted: Sequence[float]) -> list[torch.Tensor]:
    return [
        norm if row_norm == 1 else norm / row_norm for norm, row_norm in zip(row_norms(weights), wanted, strict=True)
    ]


@torch.no_grad()
def normalize_rows_(layers: Iterable["NormalizedRows"]) -> None:
    """Put every row of these layers back to its norm, in place, whatever they are used for."""
    # One tensor of the norms of all layers, since what is done to norms takes longer to start than to do.
    kinds = collections.defaultdict(list)
    # By weight: one that layers share would be divided by its norm twice.
    weights = {}
    for layer in layers:
        weight, row_norm = weights.setdefault(id(layer.weight), (layer.weight, layer.row_norm))
        if layer.row_norm != row_norm:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} must have rows of one norm, got layers that share it with "
                f"norms {row_norm:g} and {layer.row_norm:g}: untie them, or use two layers of one class."
            )
    for weight, row_norm in weights.values():
        rows = local_rows(weight)
        kinds[rows.device, rows.dtype].append((rows, row_norm))
    for rows_and_norms in kinds.values():
        rows, wanted = zip(*rows_and_norms, strict=True)
        divide_(rows, torch.cat(_relative_row_norms(rows, wanted)), [len(of_layer) for of_layer in rows])


@torch.no_grad()
def _before_reading_(modules: Iterable[nn.Module]) -> None:
    """Normalise rows in training that are about to be read as they are stored, and tell of drift; one host read."""
    layers = [layer for layer in forced_layers(modules) if layer.training and not layer.weight.is_meta]
    if not layers or _loading.get():
        return
    drifts = collections.defaultdict(list)
    norms = _relative_row_norms([local_rows(layer.weight) for layer in layers], [layer.row_norm for layer in layers])
    for layer, norm in zip(layers, norms, strict=True):
        if norm.numel():  # With more processes than rows, some hold none.
            drift = (norm - 1).abs_().masked_fill_(norm == 0, 0).max().float()
            drifts[norm.device].append(torch.stack([drift, drift - row_tolerance(layer.weight.dtype)]))
    largest = [torch.stack(of_device).amax(dim=0).tolist() for of_device in drifts.values()]
    if all(above_tolerance <= 0 for _, above_tolerance in largest):  # NaN is not
        return
    drift = max(drift for drift, _ in largest)
    global _drift_warned
    # However little it is, replicas go apart if it is put right on one process alone, which saves or samples.
    is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    is_replica = is_distributed and not any(is_sharded(layer.weight) for layer in layers)
    if not _drift_warned and (drift > DRIFT_WORTH_A_WARNING or is_replica):
        _drift_warned = True
        warnings.warn(
            f"the rows of a {type(layers[0]).__name__} have drifted {100 * drift:.2g}% from their norm during "
            "training, which lowers the effective learning rate; add `normalize_weights_(model)` after "
            "`optimizer.step()`, on every process, since replicas go apart where one of them saves or samples alone. "
            "Averages of weights, as those of EMAModel and AveragedModel, are shorter by nature: they are put right "
            "here, and nothing is to be done",
            stacklevel=4,
        )
    normalize_rows_(layers)


class NormalizedRows(nn.Module):
    """The row contract, for modules that own a `weight` of shape (rows, n) and the attributes below."""

    forced_weight_normalization: bool
    row_norm: float

    def reset_parameters(self) -> None:
        """Draw rows from N(0, 1) and scale them to their norm."""
        if not self.weight.is_meta:  # where operators take long and do nothing
            nn.init.normal_(self.weight)
            normalize_rows_([self])

    def _normalize_on_use(self) -> bool:
        if not self.forced_weight_normalization:
            return True
        return self.training and not self._is_frozen()

    def _is_frozen(self) -> bool:
        # A weight that stands in for the parameter, as those of `torch.func.functional_call`, is trained.
        weight = self.weight
        is_frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
        return is_frozen or "parametrizations" in self._modules

    def train(self, mode: bool = True):
        if not mode:
            _before_reading_([self])
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        _before_reading_([self])
        super()._save_to_state_dict(destination, prefix, keep_vars)


def forced_layers(modules: Iterable[nn.Module], frozen: bool = False) -> Iterator[NormalizedRows]:
    """Those of these modules that have forced weight normalisation and trained rows; with `frozen`, others' too."""
    for module in modules:
        if isinstance(module, NormalizedRows) and module.forced_weight_normalization:
            if frozen or not module._is_frozen():
                yield module


def trust_rows_(module: nn.Module) -> nn.Module:
    """Promise that rows have norm 1 whenever the module runs, which makes training faster.

    In training mode an `MPLinear` normalises its rows in every forward, since it cannot know what an optimiser has
    done to them. After this call it takes them as they are and only projects the gradient: the same values and
    gradients for rows of norm 1, and wrong ones for others. The promise is kept by calling `normalize_weights_` after
    every `optimizer.step()`, and after whatever else changes weights of a module in training mode. Rows are normalised
    here, once. Free rows, those of layers without forced weight normalisation, are not concerned.

    Args:
        module (nn.Module): any module.
    Returns:
        nn.Module: the same module.
    """
    for layer in forced_layers(module.modules(), frozen=True):
        layer.rows_are_trusted = True
    return normalize_weights_(module)


def normalize_weights_(module: nn.Module) -> nn.Module:
    """Put the rows of every layer with forced weight normalisation back to their norm, in place, and pinned weights.

    Call it after each `optimizer.step()`, on every process. Idempotent to the bit: a row whose norm is right up to the
    rounding of its dtype is not touched. EDM2 (arXiv 2312.02696), section 2.3. Weights that `pin_weight_norms_` has
    pinned are brought back to the norms they had then, unless they are frozen.

    Args:
        module (nn.Module): any module that contains `MPLinear` or `MPEmbedding` layers or pinned weights, or none.
    Returns:
        nn.Module: the same module.
    Raises:
        ValueError: if a weight is sharded through its rows, or a pinned one has changed its shape.
    """
    return_to_shards(module)
    normalize_rows_(forced_layers(module.modules()))
    restore_norms_(module.modules())
    return module


class ModelOfRows:
    """For models beside `ModelMixin`: loading changes no row, and all rows are looked at together.

    Refuses what would change the weight of free rows: those of a config with `weight_normalization`, where it has that
    key, and without `forced_weight_normalization`.
    """

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `ModelMixin.from_pretrained`, with the rows exactly as they were saved.

        Raises:
            ValueError: if the file lacks weights that the config describes, or has others, unless the caller asks for
                them by `output_loading_info`; if a model whose rows are normalised on use (`weight_normalization`
                without `forced_weight_normalization`) is quantised: quantised maps use rows as they are stored.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        with rows_as_loaded():
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and model._has_free_rows():
            raise ValueError(_NOT_QUANTISED.format(type(quantizer.quantization_config).__name__))
        if wants_info:
            return model, info
        if quantizer is None:  # whose tensors have other names
            _check_all_are_loaded(model, info)
        return model

    def train(self, mode: bool = True):
        """As `torch.nn.Module.train`; leaving training mode puts rows back to their norm."""
        if mode:
            return super().train(mode)
        _before_reading_(self.modules())
        with rows_as_loaded():
            return super().train(mode)

    def state_dict(self, *args, **kwargs):
        """As `torch.nn.Module.state_dict`; in training mode rows are put back to their norm first."""
        _before_reading_(self.modules())
        with rows_as_loaded():
            return super().state_dict(*args, **kwargs)

    def _has_free_rows(self) -> bool:
        return self.config.get("weight_normalization", True) and not self.config.forced_weight_normalization


class AdaptedModelOfRows(ModelOfRows):
    """For models beside `PeftAdapterMixin`: refuses what would put part of a LoRA into free rows, by any door."""

    def add_adapter(self, adapter_config, adapter_name: str = "default") -> None:
        """As in diffusers; where rows are normalised on use, refuses a LoRA that moves part of a weight into itself.

        Raises:
            ValueError: for a model whose rows are normalised on use (`weight_normalization` without
                `forced_weight_normalization`), if `init_lora_weights` is "pissa", "olora", "corda", "loftq" or
                "lora_ga", or there is a `kasa_config`.
        """
        if self._has_free_rows():
            check_start(vars(adapter_config))
        super().add_adapter(adapter_config, adapter_name)

    def fuse_lora(self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None):
        """As in diffusers.

        Raises:
            ValueError: for a model whose rows are normalised on use (`weight_normalization` without
                `forced_weight_normalization`), where merged weights are another function.
        """
        self._check_free_rows(is_merging=True)
        super().fuse_lora(lora_scale, safe_fusing, adapter_names)

    def _check_free_rows(self, is_merging: bool = False) -> None:
        # In `forward`: PEFT and quantisers themselves ask nobody.
        if not self._has_free_rows():
            return
        for weight in () if torch.compiler.is_compiling() else self.parameters():
            if type(weight).__module__.partition(".")[0] != "torch" or not weight.is_floating_point():
                raise ValueError(_NOT_QUANTISED.format(f"{type(weight).__name__} of {weight.dtype}"))
        for adapter_config in getattr(self, "peft_config", {}).values():
            check_start(vars(adapter_config))
        if is_merging or any(getattr(module, "merged", False) for module in self.modules()):
            raise ValueError(
                "`fuse_lora` and PEFT's merges need rows that are used as they are stored; with "
                "`forced_weight_normalization=False` they are normalised on use: keep the LoRA unmerged."
            )


def _check_all_are_loaded(model: nn.Module, info: dict) -> None:
    """Refuse a file of other weights than its config describes: part of a model would be trained or sampled."""
    kinds = ("missing", "unexpected")
    if any(info[f"{kind}_keys"] for kind in kinds):
        told = "; ".join(
            f"{kind} {len(names)}, such as {min(names)}" for kind in kinds if (names := info[f"{kind}_keys"])
        )
        raise ValueError(
            f"the weights in {model.config._name_or_path} must be those that its config.json describes ({told}): one "
            "of the two files is of another model."
        )


def check_start(adapter_config: dict) -> None:
    """Refuse a LoRA, by the dict of its config, that would change the weight of free rows beside it.

    Raises:
        ValueError: naming how the LoRA starts.
    """
    start = adapter_config.get("init_lora_weights")
    if adapter_config.get("kasa_config") is not None:
        start = "kasa_config"  # comes beside any of the names
    # PEFT takes some names in any case.
    if isinstance(start, str) and start.lower().startswith(_CHANGES_WEIGHTS):
        raise ValueError(
            "`init_lora_weights` must leave the weights as they are for a model with "
            "`forced_weight_normalization=False`, whose rows are normalised on use: True, False, 'gaussian', "
            f"'orthogonal', 'eva' or 'mica'; got {start!r}."
        )
