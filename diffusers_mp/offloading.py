"""Models whose weights are not there to be read or written: offloaded, cast by layers, or never loaded. Torch only."""

from collections.abc import Iterable

import torch
from torch import nn


def check_loaded(model: nn.Module, tensors: Iterable[torch.Tensor], argument: str = "model") -> None:
    """Raise if tensors of a model that are to be read or written are offloaded, or were never loaded."""
    if any(tensor.is_meta for tensor in tensors):
        check_hooks(model, argument)
        raise ValueError(f"`{argument}` must hold weights, some of its tensors are on the meta device: load it first.")


def check_hooks(model: nn.Module, argument: str = "model") -> None:
    """Raise if a module of a model has a hook of Accelerate or diffusers, which may have its weights elsewhere."""
    for name, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if hasattr(module, "_hf_hook") or hooks:
            raise ValueError(
                f"`{argument}` must be without hooks (offloading, device_map, layerwise casting, caches), "
                f"{name or 'it'} has one: attach them afterwards."
            )
