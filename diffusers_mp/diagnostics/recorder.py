"""Magnitudes of a model in training, per block: activations, weights, gradients, updates, modulations.

A recorder looks at one update in so many. Only then are there hooks, they leave their sums on the device, and all of
them are read at once. `plots` draws what it has recorded.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..functional import compute_dtype
from ..modulation import Modulation
from ..sharding import local, return_to_shards, unwrapped
from .history import load_history, save_history, without_histograms
from .magnitudes import (
    angle_counts,
    fetch,
    norm_of,
    norm_of_difference,
    norms_over_shards,
    values_of_calls,
    values_of_parameters,
)


class MagnitudeRecorder:
    """Records magnitudes of a model's blocks and modulations: in training at a stride, elsewhere inside of a `with`.

        recorder = MagnitudeRecorder(model, optimizer)      # after all wrapping
        ...
            optimizer.step()
            optimizer.zero_grad()
            if recorder.step():                             # once for each update, after it
                accelerator.log(recorder.values(), step=step)

        with MagnitudeRecorder(model) as recorder:          # without training
            model(...)
        recorder.values()

    An update is all that happens between two calls of `step`, with all its micro batches. The names of the values,
    with M the root mean square (section 3 of arXiv 2505.19122):

    - `magnitude/activations/<module>`: M of what the module returns, over all entries of all calls. Several tensors
      are numbered: `<module>/0`. For a modulation only the tokens count.
    - `magnitude/weights/<module>`, `magnitude/gradients/<module>`: M over all parameters below the module; gradients
      as the optimiser receives them, that is, accumulated, averaged over processes, unscaled and clipped.
    - `relative_update/<module>`: `M[new - old] / M[old]` of the parameters that have a gradient, from before the
      optimiser's step until `step` is called: after `normalize_weights_`, if that comes first. Absent where they are
      all zero, and like the gradients for an update that was skipped.
    - `<kind>/<mean, rms or max>/<site>` of each modulation: its angles in radians (`rotate`), `scale` and `shift` as
      they are added, and `gate` as the factor in effect. `max` is that of absolute values. A map that a swapped
      linear layer (`swap_adaln_for_rotation`) has more than once is numbered: `<site>/0`.

    The last entry of `history` also has `rotate/histogram/<site>`: counts of the angles, modulo a turn, in
    256 equal bins from -pi to pi.

    Norms are taken in float32 at least. Training is the same to the bit with a recorder and without. Only forward
    passes of `model` itself count, in training those with gradients: neither a validation in between nor what
    checkpointing computes again. Each process measures its own part of a batch; weights and gradients that
    `fully_shard` divides are measured whole, which takes one reduction on all processes. `torch.compile` does not see
    hooks: a recorded update runs uncompiled, as slowly and with as much memory as that takes, and may differ from the
    compiled one by rounding. All else in the process is uncompiled as well until the next `step` or `close`: a loop
    that may raise calls `close` in a `finally`. A record also needs a copy of the recorded parameters.

    Args:
        model (nn.Module): any model, wrapped (DistributedDataParallel, compiled, sharded) or not. It is the module, or
            in the wrapper of the module, that the training loop calls.
        optimizer (torch.optim.Optimizer or sequence of them, optional): for training: what updates the model, as it is
            or as `accelerator.prepare` returns it.
        stride (int): updates from one record to the next. The first update is recorded as well: its activations are
            those of the start.
        modules (str or callable, optional): which modules, by a regular expression that matches the whole name, or by
            a function of name and module. The model's blocks (diffusers' `_repeated_blocks`; else the members of the
            outermost `ModuleList`s) and modulations if None.
        num_updates (int): updates that were made already, for a run that is resumed.
    Attributes:
        history (list of dict): for each record its `step` (the number of the update) and its values.
        num_updates (int): calls of `step`, and the updates before them.
    Raises:
        ValueError: if an argument is outside of these rules, or no module is chosen.
    """

    __module__ = "diffusers_mp"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        stride: int = 100,
        modules: str | Callable[[str, nn.Module], bool] | None = None,
        num_updates: int = 0,
    ):
        if stride < 1:
            raise ValueError(f"`stride` must be at least 1, got {stride}.")
        self.stride = stride
        self.num_updates = num_updates
        self.history: list[dict] = []
        self._model = unwrapped(model)
        self._modules = _chosen(self._model, modules)
        optimizers = optimizer if isinstance(optimizer, Sequence) else [] if optimizer is None else [optimizer]
        # Hooks of Accelerate's wrapper would never run.
        self._optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        self._hooks = contextlib.ExitStack()
        self._is_recording = False
        if self._optimizers:
            self._start_if_due()

    def step(self) -> bool:
        """End an update, and begin the next one. On every process.

        Returns:
            bool: whether that update was recorded; its values are `values()` then.
        Raises:
            ValueError: for a recorder without an optimiser.
            RuntimeError: if an update to be recorded went past the model.
        """
        if not self._optimizers:
            raise ValueError("`optimizer` must be given to record training by `step`, got None.")
        self.num_updates += 1
        was_recording = self._is_recording
        if was_recording:
            self._finish()
        self._start_if_due()
        return was_recording

    def values(self) -> dict[str, float]:
        """Values of the last record, for `accelerator.log`.

        Returns:
            dict: names to floats.
        Raises:
            RuntimeError: if there is no record yet.
        """
        if not self.history:
            raise RuntimeError(
                "nothing has been recorded yet: ask when `step()` has returned True, or after a `with` block."
            )
        return {name: value for name, value in without_histograms(self.history[-1]).items() if name != "step"}

    def save(self, path: str | Path) -> None:
        """Write the history to a JSON file, numbers to six digits, which the functions of `plots` read.

        Args:
            path (str or Path): the file; replaced as a whole if it is there.
        """
        save_history(path, self.history)

    def load(self, path: str | Path) -> None:
        """Take over what a run that is resumed here has recorded, up to the updates that it has made.

        Args:
            path (str or Path): a file that `save` has written.
        """
        self.history = [entry for entry in load_history(path) if entry["step"] <= self.num_updates]

    def close(self) -> None:
        """Let go of a record that has begun, and of its hooks; the history stays."""
        self._is_recording = False
        self._hooks.close()

    def __enter__(self) -> "MagnitudeRecorder":
        if self._is_recording:
            raise RuntimeError("this recorder is recording an update: for a `with` block make another one.")
        self._start(only_with_gradients=False)
        return self

    def __exit__(self, error_class, *error) -> None:
        if error_class is None:
            self._finish()
        self.close()

    def _start_if_due(self) -> None:
        update = self.num_updates + 1
        if update == 1 or update % self.stride == 0:
            self._start(only_with_gradients=True)

    def _start(self, only_with_gradients: bool) -> None:
        return_to_shards(self._model)
        self._is_recording = True
        self._only_with_gradients = only_with_gradients
        self._is_inside = False
        # What each call of a module had: kind and name, numbers on the device, of how many entries.
        self._calls: list[tuple[tuple[str, str], torch.Tensor, int]] = []
        self._parameters = {
            name: [parameter for parameter in module.parameters() if parameter.is_floating_point()]
            for name, module in self._modules.items()
        }
        self._gradients: dict[int, torch.Tensor] = {}
        self._old: dict[int, torch.Tensor] = {}

        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        handles = [
            self._model.register_forward_pre_hook(self._before_model()),
            self._model.register_forward_hook(self._after_model(), always_call=True),
            *(optimizer.register_step_pre_hook(self._before_update) for optimizer in self._optimizers),
        ]
        for name, module in self._modules.items():
            handles.append(module.register_forward_hook(self._after_module(name)))
            if isinstance(module, Modulation):
                handles.append(module.proj.register_forward_hook(self._after_projection(name, module)))
        for handle in handles:
            self._hooks.callback(handle.remove)

    # Hooks are closures rather than methods, so that a deep copy of the model, for an average of its weights, does not
    # bring a copy of the recorder along. The copy's hooks do nothing, as only this very model opens the gate.

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
            if _is_swapped_linear(module):
                maps = getattr(output, "maps", [output])
                maps = [rows if isinstance(rows, torch.Tensor) else rows.angle for rows in maps]
                self._add_maps(name, module.kinds, maps)
                return
            tensors = [leaf for leaf in tree_leaves(output) if _is_measurable(leaf)]
            if isinstance(module, Modulation):
                tensors = tensors[:1]
            for index, tensor in enumerate(tensors):
                key = name if len(tensors) == 1 else f"{name}/{index}"
                self._calls.append((("activations", key), norm_of(tensor), tensor.numel()))

        return hook

    def _after_projection(self, name: str, site: Modulation):
        @torch.no_grad()
        def hook(module, args, output):
            if not self._is_inside:
                return
            dtype = compute_dtype(output.dtype)
            maps = site.maps(output.to(dtype), dtype)
            self._add_maps(name, list(maps), list(maps.values()))

        return hook

    @torch.no_grad()
    def _add_maps(self, site: str, kinds: Sequence[str], maps: Sequence[torch.Tensor]) -> None:
        for index, (kind, rows) in enumerate(zip(kinds, maps, strict=True)):
            name = site if kinds.count(kind) == 1 else f"{site}/{kinds[:index].count(kind)}"
            rows = local(rows).to(compute_dtype(rows.dtype)).flatten()
            numbers = torch.stack([rows.sum(), torch.linalg.vector_norm(rows), rows.abs().max()])
            if kind == "rotate":
                numbers = torch.cat([numbers, angle_counts(rows)])
            self._calls.append(((kind, name), numbers, rows.numel()))

    @torch.no_grad()
    def _before_update(self, optimizer, args, kwargs) -> None:
        # A GradScaler leaves to a fused optimiser to divide its gradients, and to do nothing where they overflow.
        scale, overflow = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if overflow is not None and overflow.item():
            return
        watched = {id(parameter) for parameters in self._parameters.values() for parameter in parameters}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in watched and parameter.grad is not None:
                    norm = norm_of(parameter.grad)
                    self._gradients[id(parameter)] = norm if scale is None else norm / scale.to(norm.device)
                    self._old[id(parameter)] = parameter.detach().clone()

    @torch.no_grad()
    def _finish(self) -> None:
        self.close()
        if not self._calls:
            raise RuntimeError(
                "no forward pass of `model` was seen in an update to be recorded: `model` must be the module that the "
                f"training loop calls, got a {type(self._model).__name__}."
            )

        # One read of the norms of all parameters and the numbers of all calls
        return_to_shards(self._model)
        parameters = {id(p): p for of_module in self._parameters.values() for p in of_module}
        norms = {
            **{("weights", key): norm_of(parameter) for key, parameter in parameters.items()},
            **{("gradients", key): norm for key, norm in self._gradients.items()},
            **{("old", key): norm_of(old) for key, old in self._old.items()},
            **{("changes", key): norm_of_difference(parameters[key], old) for key, old in self._old.items()},
        }
        whole = norms_over_shards(list(norms.values()), [parameters[key] for _, key in norms])
        numbers = fetch([*whole, *(numbers for _, numbers, _ in self._calls)])
        norms = {key: norm for key, (norm,) in zip(norms, numbers, strict=False)}
        calls: dict[tuple[str, str], list[tuple[list[float], int]]] = {}
        for (key, _, count), of_call in zip(self._calls, numbers[len(norms) :], strict=True):
            calls.setdefault(key, []).append((of_call, count))
        for name, module in self._modules.items():
            if (
                isinstance(module, Modulation)
                and ("activations", name) in calls
                and (module.kinds[0], name) not in calls
            ):
                raise RuntimeError(
                    f"the modulation {name} has run without a call of its `proj`, whose maps it applies."
                )
        self._calls, self._gradients, self._old = [], {}, {}

        # From numbers to named values
        entry: dict = {"step": self.num_updates}
        for name, of_module in self._parameters.items():
            entry |= values_of_parameters(name, of_module, norms)
        for (kind, name), of_name in calls.items():
            entry |= values_of_calls(kind, name, of_name)
        if self.history:
            self.history[-1] = without_histograms(self.history[-1])
        self.history.append(dict(sorted(entry.items(), key=lambda item: item[0] != "step")))


def _chosen(model: nn.Module, modules: str | Callable[[str, nn.Module], bool] | None) -> dict[str, nn.Module]:
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
        return name in blocks or isinstance(module, Modulation) or _is_swapped_linear(module)

    chosen = {name: module for name, module in named.items() if is_chosen(name, module)}
    if not chosen:
        raise ValueError(
            f"`modules` must choose some of the modules of `model`, got {modules!r}, which chooses none of a "
            f"{type(model).__name__}; its children are {[name for name, _ in model.named_children()]}."
        )
    return chosen


def _names_of_blocks(model: nn.Module, named: dict[str, nn.Module]) -> set[str]:
    classes = getattr(model, "_repeated_blocks", None) or []
    blocks = {name for name, module in named.items() if type(module).__name__ in classes}
    if blocks:
        return blocks
    lists = [name for name, module in named.items() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not name.startswith(tuple(f"{other}." for other in lists))]
    return {name for name in named if name.rpartition(".")[0] in outermost}


def _is_swapped_linear(module: nn.Module) -> bool:
    # By its name: `rotation_swap` and this file do not import each other.
    return type(module).__name__ == "RotationLinear"


def _is_measurable(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0
