"""What the modules of a model return during one update: the hooks, and which modules they are put on."""

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..functional import compute_dtype
from ..modulation import Modulation
from ..sharding import unwrapped


# How many rest compilation at this time: they begin and end in any order, and a stance knows nothing but nesting.
_num_resting = 0
_stance = contextlib.ExitStack()


def _rest_compilation() -> None:
    global _num_resting
    if not _num_resting:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _num_resting += 1


def _go_on_compiling() -> None:
    global _num_resting
    _num_resting -= 1
    if not _num_resting:
        _stance.close()


class Call(NamedTuple):
    """One tensor that a module has returned, or one map of a modulation."""

    kind: str
    name: str
    numbers: torch.Tensor
    count: int


class Calls:
    """Hooks that measure on the device what modules return. There are hooks from `start` to `close` only.

    Args:
        model (nn.Module): without wrappers. Only what happens within its own forward passes counts.
        modules (dict of nn.Module): by their names.
        measure (callable): takes the kind ("activations", or one out of `MODULATION_KINDS`), the module and the
            tensor, and returns numbers on the tensor's device, or None for what is of no interest.
    Attributes:
        found (list of Call): since `start`.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        measure: Callable[[str, nn.Module, torch.Tensor], torch.Tensor | None],
    ):
        self.found: list[Call] = []
        self._model, self._modules, self._measure = model, modules, measure
        self._hooks = contextlib.ExitStack()

    def start(self, only_with_gradients: bool = True) -> None:
        """Put the hooks on; all compilation in the process rests until `close`, because it does not see them."""
        self.found = []
        self._only_with_gradients = only_with_gradients
        self._is_inside = False
        _rest_compilation()
        self._hooks.callback(_go_on_compiling)
        handles = [
            self._model.register_forward_pre_hook(self._before_model()),
            self._model.register_forward_hook(self._after_model(), always_call=True),
        ]
        for name, module in self._modules.items():
            handles.append(module.register_forward_hook(self._after_module(name)))
            if isinstance(module, Modulation):
                handles.append(module.proj.register_forward_hook(self._after_projection(name, module)))
        for handle in handles:
            self._hooks.callback(handle.remove)

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.close()

    def taken(self) -> list[Call]:
        """What was found, which is forgotten here.

        Raises:
            RuntimeError: if nothing was: the training went past the model.
        """
        found, self.found = self.found, []
        if not found:
            raise RuntimeError(
                "no forward pass of `model` was seen in an update to be recorded: `model` must be the module that the "
                f"training loop calls, got a {type(self._model).__name__}."
            )
        return found

    # Hooks are closures rather than methods, so that a deep copy of the model, for an average of its weights, does not
    # bring a copy of the owner along. The copy's hooks do nothing, as only this very model opens the gate.

    def _before_model(self):
        def hook(module, args):
            is_counted = torch.is_grad_enabled() or not self._only_with_gradients
            self._is_inside = is_counted and unwrapped(module) is self._model

        return hook

    def _after_model(self):
        def hook(module, args, output):
            self._is_inside = False

        return hook

    def _after_module(self, name: str):
        def hook(module, args, output):
            if not self._is_inside:
                return
            if is_swapped_linear(module):
                maps = getattr(output, "maps", [output])
                maps = [rows if isinstance(rows, torch.Tensor) else rows.angle for rows in maps]
                self._add_maps(name, module, module.kinds, maps)
                return
            tensors = [leaf for leaf in tree_leaves(output) if _is_measurable(leaf)]
            if isinstance(module, Modulation):
                tensors = tensors[:1]
            for index, tensor in enumerate(tensors):
                self._add("activations", name if len(tensors) == 1 else f"{name}/{index}", module, tensor)

        return hook

    def _after_projection(self, name: str, site: Modulation):
        @torch.no_grad()
        def hook(module, args, output):
            if not self._is_inside:
                return
            maps = site.maps(output.to(compute_dtype(output.dtype)))
            self._add_maps(name, site, list(maps), list(maps.values()))

        return hook

    def _add_maps(self, site: str, module: nn.Module, kinds: Sequence[str], maps: Sequence[torch.Tensor]) -> None:
        for index, (kind, rows) in enumerate(zip(kinds, maps, strict=True)):
            self._add(kind, site if kinds.count(kind) == 1 else f"{site}/{kinds[:index].count(kind)}", module, rows)

    @torch.no_grad()
    def _add(self, kind: str, name: str, module: nn.Module, tensor: torch.Tensor) -> None:
        numbers = self._measure(kind, module, tensor)
        if numbers is not None:
            self.found.append(Call(kind, name, numbers, tensor.numel()))


def chosen_modules(model: nn.Module, modules: str | Callable[[str, nn.Module], bool] | None) -> dict[str, nn.Module]:
    """The modules to be recorded by their names, in which compilation leaves no trace."""
    named = {
        name.replace("._orig_mod", ""): module
        for name, module in model.named_modules()
        if name and not hasattr(module, "_orig_mod")
    }
    blocks = _names_of_blocks(model, named)

    def is_chosen(name: str, module: nn.Module) -> bool:
        if callable(modules):
            return modules(name, module)
        if modules is not None:
            return re.fullmatch(modules, name) is not None
        return name in blocks or isinstance(module, Modulation) or is_swapped_linear(module)

    return {name: module for name, module in named.items() if is_chosen(name, module)}


def _names_of_blocks(model: nn.Module, named: dict[str, nn.Module]) -> set[str]:
    classes = getattr(model, "_repeated_blocks", None) or []
    blocks = {name for name, module in named.items() if type(module).__name__ in classes}
    if blocks:
        return blocks
    lists = [name for name, module in named.items() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not name.startswith(tuple(f"{other}." for other in lists))]
    if not lists and isinstance(model, nn.Sequential):
        outermost = [""]
    return {name for name in named if name.rpartition(".")[0] in outermost}


def is_swapped_linear(module: nn.Module) -> bool:
    """Whether a module is what `swap_adaln_for_rotation` puts in; by its name, as neither imports the other."""
    return type(module).__name__ == "RotationLinear"


def _is_measurable(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0
