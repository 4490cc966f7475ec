"""The first value that is not finite in a forward and backward pass, found by hooks on every module."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from ..sharding import is_sharded, local, unwrapped


def find_first(
    model: nn.Module,
    compute_loss: Callable[[Any], torch.Tensor],
    batches: Iterable,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Any] | None:
    """Run batches again, forward and backward, and return what is known of the first value that is not finite.

    Random state and buffers are put back, gradients are cleared. To be called on all processes.

    Args:
        model (nn.Module): as the training loop calls it.
        compute_loss (callable): batch to loss; it calls `model`.
        batches (iterable): the micro batches of one update.
        scaler (torch.amp.GradScaler, optional): scales the loss.
    Returns:
        dict: `micro_batch`, `stage` ("forward" or "backward"), `value` ("output", "input", "parameter" or "loss"),
        `module`, `class`, and more of an output; None if all is finite now.
    """
    called, model = model, unwrapped(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    is_replicated = isinstance(called, DistributedDataParallel)
    no_sync = called.no_sync() if is_replicated else contextlib.nullcontext()
    first = None
    with _random_state_kept(model), no_sync, _not_compiled():
        # To the end even when something was found: under `fully_shard` the others wait for this process's part.
        for number, batch in enumerate(batches):
            model.zero_grad(set_to_none=True)
            with Trace(model) as trace:
                loss = compute_loss(batch)
                if not is_finite(loss):
                    trace.found("forward", "loss")
                if loss.requires_grad:
                    (loss if scaler is None else scaler.scale(loss)).backward()
                for name, parameter in reversed(list(model.named_parameters())):
                    if parameter.grad is not None and not is_finite(parameter.grad):
                        trace.found("backward", "parameter", *_owner(model, name), parameter=name)
            if first is None and trace.first is not None:
                first = {"micro_batch": number, **trace.first}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return first


class Trace:
    """Hooks on every module that note the first value that is not finite, in the order in which values are made."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.first: dict[str, Any] | None = None
        self._running: list[str] = []
        self._handles = []

    def __enter__(self):
        for name, module in self.model.named_modules():
            kind = type(module).__name__
            self._handles += [
                module.register_forward_pre_hook(self._before(name, kind), with_kwargs=True),
                module.register_forward_hook(self._after(name, kind), with_kwargs=True),
            ]
        for name, parameter in self.model.named_parameters():
            # The hooks of a DTensor do not run under `fully_shard`, which works on the gathered parameter.
            if parameter.requires_grad and not is_sharded(parameter):
                hook = self._on_gradient("parameter", *_owner(self.model, name), parameter=name)
                self._handles.append(parameter.register_hook(hook))
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    def found(self, stage: str, value: str, name: str | None = None, kind: str | None = None, **more) -> None:
        if self.first is None:
            self.first = {"stage": stage, "value": value, "module": name, "class": kind, **more}

    def _before(self, name, kind):
        def hook(module, args, kwargs):
            self._running.append(name)

            def watched(tensor):
                if not (torch.is_grad_enabled() and tensor.requires_grad):
                    return tensor
                # The gradient of an alias is the part that this module contributes, without other users of the tensor.
                alias = tensor.view_as(tensor)
                alias.register_hook(self._on_gradient("input", name, kind))
                return alias

            return tree_map_only(torch.Tensor, watched, (args, kwargs))

        return hook

    def _after(self, name, kind):
        def hook(module, args, kwargs, output):
            # Checkpointing stops a second forward pass halfway, which leaves names behind.
            while self._running.pop() != name:
                pass
            for tensor in _tensors(output):
                if self.first is None and not is_finite(tensor):
                    self.found(
                        "forward",
                        "output",
                        *(name, kind),
                        input_was_finite=all(is_finite(value) for value in _tensors((args, kwargs))),
                        parameters_not_finite=[key for key, p in module.named_parameters() if not is_finite(p)],
                        called_by=self._running[-1] if self._running else None,
                    )
                if tensor.requires_grad:
                    tensor.register_hook(self._on_gradient("output", name, kind))

        return hook

    def _on_gradient(self, value, name, kind, **more):
        def hook(gradient):
            if self.first is None and not is_finite(gradient):
                self.found("backward", value, name, kind, **more)

        return hook


def _owner(model: nn.Module, parameter_name: str) -> tuple[str, str]:
    name = parameter_name.rpartition(".")[0]
    return name, type(model.get_submodule(name)).__name__


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers that this process holds of a tensor are finite."""
    tensor = local(tensor)
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor).all())


def _not_compiled() -> contextlib.AbstractContextManager:
    # Hooks inside compiled code would only compile it again. A process that has compiled has imported the compiler.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _tensors(nest: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield
