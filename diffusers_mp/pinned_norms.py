"""Forced weight normalisation for weights that were not trained with it: each keeps the norms that it has now.

    report = pin_weight_norms_(model)
    accelerator.register_for_checkpointing(report)
    ...
    optimizer.step()
    normalize_weights_(model)

The mechanism is that of EDM2 (arXiv 2312.02696, section 2.3), with the norms that weights have instead of 1: the model
is unchanged when it is pinned, and a weight cannot grow afterwards. Nothing is projected in the forward pass or in the
gradient. Averages of weights are shorter than the weights, and are left so.

What is pinned, by rule: parameters of two or more dimensions whose name ends in "weight", those of linear maps,
convolutions, embeddings and their like. A row is what the first index counts: an output of a map or a convolution, an
entry of a table, an input of a transposed convolution. Left alone: biases, tables that are added, normalisation
layers, whatever is frozen, maps that PEFT has added (the norm of a LoRA is its strength), and layers with normalised
rows of this package, which have their own rule. Rows of zeros are free, as those of AdaLN-Zero and of fresh rotation
heads: pinned they would never learn.

Pin before `fully_shard` or after it, but after all that replaces layers: a rotation swap, a LoRA, resized tables.
"""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .files import whole_file
from .functional import compute_dtype
from .offloading import check_hooks, check_loaded
from .projection import Pin, pinned, row_norms, set_pins
from .rows import NormalizedRows
from .sharding import return_to_shards, unwrapped, whole


class PinnedNorms:
    """What `pin_weight_norms_` or `load_weight_norms` has done to a model; printed, it says so in a few lines.

    Has `state_dict` and `load_state_dict`, so that `accelerator.register_for_checkpointing` takes it.

    Args:
        model (nn.Module): a model with pinned weights.
        zero (sequence of str): names of its weights that were zero when the others were pinned.
    Attributes:
        model (nn.Module): the model, without wrappers.
    """

    def __init__(self, model: nn.Module, zero: Sequence[str] = ()):
        self.model = unwrapped(model)
        self._zero = set(zero)

    @property
    def pinned(self) -> dict[str, int]:
        """Name of each pinned weight → how many norms it keeps: of its rows that are not free, or 1 for a matrix."""
        return {name: int(norms.count_nonzero()) for name, norms in weight_norms(self.model).items()}

    @property
    def free(self) -> dict[str, int]:
        """Name of each weight with rows that are free, because they were zero → how many these are."""
        norms, free = weight_norms(self.model), {}
        for name, _, weight in _maps(self.model):
            if name in norms:
                free[name] = int((norms[name] == 0).sum())
            elif name in self._zero:
                free[name] = len(weight)
        return {name: count for name, count in free.items() if count}

    @property
    def frozen(self) -> list[str]:
        """Names of weights that are left as they are because nothing trains them."""
        return [
            name
            for name, module, weight in _maps(self.model)
            if not weight.requires_grad and not isinstance(module, NormalizedRows)
        ]

    @property
    def normalized(self) -> list[str]:
        """Names of the weights of `MPLinear` and `MPEmbedding`, whose rows have their own rule."""
        return [name for name, module, _ in _maps(self.model) if isinstance(module, NormalizedRows)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Norms by the names of their weights, on the CPU: shape (rows,), or () for a matrix. Nothing is gathered."""
        return weight_norms(self.model)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Pin the weights of the model to these norms, and no others.

        Args:
            state_dict (dict): as `state_dict` returns it.
        Raises:
            ValueError: if the model lacks one of these weights, or it has other rows; the model is unchanged then.
        """
        set_weight_norms(self.model, state_dict, "`state_dict`")

    def __str__(self) -> str:
        pinned = self.pinned
        lines = [f"{sum(pinned.values()):,} norms of {len(pinned):,} weights are pinned"]
        for what, names in (
            ("rows that were zero are free", self.free),
            ("nothing to do for frozen weights", self.frozen),
            ("normalised rows have their own rule", self.normalized),
        ):
            if names:
                lines.append(f"{what}: {_words(names)}")
        return "\n".join(lines)


@torch.no_grad()
def pin_weight_norms_(
    model: nn.Module,
    per: Literal["row", "matrix"] = "row",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> PinnedNorms:
    """Remember the norms that the weights of a model have now; `normalize_weights_` brings them back after an update.

        w ← ‖w₀‖ w / ‖w‖        of each row w, or of each matrix as a whole
    The module docstring says which weights. Call it on every process, before `parameter_groups`, which leaves weight
    decay off pinned weights; their learning rate stays what it is. A second call forgets the norms of the first.

    Args:
        model (nn.Module): any model, sharded (`fully_shard`, on dimension 0), replicated or neither.
        per (str): "row" or "matrix". Under `fully_shard` rows are local; matrices take one all-reduce of one number
            each, all together, in each `normalize_weights_`.
        include (str or sequence of str, optional): names, as PEFT's `target_modules`: a regular expression that must
            match the whole name of a weight or of its module, or a list of names or ends of names, such as "to_q".
        exclude (str or sequence of str, optional): likewise, of weights that are left alone.
    Returns:
        PinnedNorms: what was done, to be printed, and to be registered for checkpoints.
    Raises:
        ValueError: if `per` is neither, a pattern matches no weight, the model has none, or weights are offloaded,
            quantised or not finite. The model is unchanged then.
    """
    if per not in ("row", "matrix"):
        raise ValueError(f"`per` must be 'row' or 'matrix', got {per!r}.")
    model = unwrapped(model)
    check_hooks(model)
    return_to_shards(model)
    maps = _chosen(list(_maps(model)), include, exclude)
    if not maps:
        raise ValueError(
            "`model` must have weights of two or more dimensions that `include` and `exclude` leave, a "
            f"{type(model).__name__} has none to pin: pin the norms of another model, or leave the two out."
        )
    check_loaded(model, [weight for *_, weight in maps])
    norms, zero = {}, []
    for name, module, weight in maps:
        if isinstance(module, NormalizedRows):
            continue
        _check_plain(name, weight)
        if weight.requires_grad:
            of_rows = whole(row_norms([weight.detach()])[0]).flatten()
            norm = torch.linalg.vector_norm(of_rows) if per == "matrix" else of_rows
            # Above 0, and not true of NaN: one read for each weight, once in a run.
            if not 0 <= norm.max().item() < math.inf:
                raise ValueError(f"`model` must have finite weights, {name} has NaN or infinity: load it again.")
            if norm.any():
                norms[name] = norm
            else:
                zero.append(name)
    set_weight_norms(model, norms, "`model`")
    return PinnedNorms(model, zero)


def save_weight_norms(model: nn.Module, path: str | Path) -> None:
    """Write the norms that the weights of a model are pinned to: a few bytes for each row. The main process alone may.

    Args:
        model (nn.Module): pinned by `pin_weight_norms_`.
        path (str or Path): a safetensors file; its folder is made if missing.
    Raises:
        ValueError: if nothing is pinned.
    """
    norms = weight_norms(model)
    if not norms:
        raise ValueError(
            f"`model` must have pinned weights, a {type(model).__name__} has none: call `pin_weight_norms_`."
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        with whole_file(path) as unfinished:
            save_file(norms, unfinished, metadata={"format": "pt"})


def load_weight_norms(model: nn.Module, path: str | Path) -> PinnedNorms:
    """Pin the weights of a model to the norms in a file; the next `normalize_weights_` brings them there.

    Args:
        model (nn.Module): of the same weights as the one whose norms were saved.
        path (str or Path): what `save_weight_norms` has written.
    Returns:
        PinnedNorms: as `pin_weight_norms_` returns it; weights that the file does not name are not spoken of.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or of another model, with a weight that is not there or has other rows. The model
            is unchanged then.
    """
    check_hooks(unwrapped(model))
    try:
        norms = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): save the norms again.") from error
    set_weight_norms(model, norms, str(path))
    return PinnedNorms(model)


def weight_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """The norms that weights are pinned to, by the names of the weights; copies on the CPU."""
    return {
        f"{path}.{name}".lstrip("."): pin.norms.to("cpu", copy=True)
        for path, module in unwrapped(model).named_modules()
        for _, name, pin in pinned([module])
    }


def set_weight_norms(model: nn.Module, norms: dict[str, torch.Tensor], source: str) -> None:
    """Pin the weights of a model to these norms, and no others; `source` is what an error says they are of."""
    model = unwrapped(model)
    maps = {name: (module, weight) for name, module, weight in _maps(model) if not isinstance(module, NormalizedRows)}
    for name, of_weight in norms.items():
        if name not in maps:
            raise ValueError(
                f"{source} must be of this model: it has norms of {name}, which is no weight of a "
                f"{type(model).__name__} that can be pinned. Take the norms of this model."
            )
        shape = maps[name][1].shape
        if of_weight.shape not in ((), shape[:1]):
            raise ValueError(
                f"{source} must be of this model: {name} has shape {tuple(shape)}, got {tuple(of_weight.shape)} norms "
                "of its rows. Take the norms of this model."
            )
    for module in model.modules():
        set_pins(module, {})
    pins = {}
    for name, of_weight in norms.items():
        module, weight = maps[name]
        pins.setdefault(module, {})[name.rpartition(".")[2]] = Pin(
            of_weight.to(compute_dtype(weight.dtype), copy=True)
        )
    for module, of_module in pins.items():
        set_pins(module, of_module)


def _maps(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Name, module and weight of each map, by the rule of the module docstring; one that is shared comes once."""
    # The names under which PEFT's layers keep what they add.
    added = {
        f"{path}.{part}".lstrip(".")
        for path, module in model.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
    }
    seen = set()
    for path, module in model.named_modules():
        if "Norm" in type(module).__name__ or any(f"{path}.".startswith(f"{part}.") for part in added):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if name.endswith("weight") and weight.ndim >= 2 and id(weight) not in seen:
                seen.add(id(weight))
                yield f"{path}.{name}".lstrip("."), module, weight


def _chosen(maps, include, exclude):
    """Those that `include` names, or all, without those that `exclude` names."""
    included = {name for name, *_ in maps} if include is None else _matching(maps, include, "include")
    excluded = set() if exclude is None else _matching(maps, exclude, "exclude")
    return [each for each in maps if each[0] in included - excluded]


def _matching(maps, patterns, argument):
    """Names that a regular expression or one of a list of ends of names matches, each of which must match one."""
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = {
            name
            for name, *_ in maps
            for form in (name, name.rpartition(".")[0])
            if (re.fullmatch(pattern, form) if isinstance(patterns, str) else f".{form}".endswith(f".{pattern}"))
        }
        if not matching:
            raise ValueError(
                f"`{argument}` must match weights that can be pinned, {pattern!r} matches none of {len(maps):,}"
                f"{', such as ' + maps[0][0] if maps else ''}: a string is a regular expression for a whole name, a "
                "list has names or ends of names."
            )
        found |= matching
    return found


def _check_plain(name: str, weight: torch.Tensor) -> None:
    is_plain = type(weight).__module__.partition(".")[0] == "torch" and weight.is_floating_point()
    if not is_plain or weight.dtype.itemsize == 1:
        raise ValueError(
            f"`model` must have weights that are not quantised, {name} is a {type(weight).__name__} of "
            f"{weight.dtype}: leave it out by `exclude`."
        )


def _words(names: Sequence[str] | dict[str, int]) -> str:
    """Names with the numbers of blocks left out, and how many weights, or rows, each stands for."""
    counts: dict[str, int] = {}
    for name in names:
        short = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        counts[short] = counts.get(short, 0) + (names[name] if isinstance(names, dict) else 1)
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())
