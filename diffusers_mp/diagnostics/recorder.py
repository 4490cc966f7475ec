"""Magnitudes of a model in training, per block: activations, weights, gradients, updates, modulations.

A recorder looks at one update in so many. Only then are there hooks, they leave their sums on the device, and all of
them are read at once. `plots` draws what it has recorded.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..modulation import Modulation
from ..sharding import return_to_shards, unwrapped
from .calls import Calls, chosen_modules
from .history import load_history, save_history, without_histograms
from .magnitudes import (
    fetch,
    norm_of,
    norm_of_difference,
    norms_over_shards,
    numbers_of,
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
        self._modules = chosen_modules(self._model, modules)
        if not self._modules:
            raise ValueError(
                f"`modules` must choose some of the modules of `model`, got {modules!r}, which chooses none of a "
                f"{type(self._model).__name__}; its children are {[name for name, _ in self._model.named_children()]}."
            )
        self._calls = Calls(self._model, self._modules, numbers_of)
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
        self._calls.close()
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
        self._parameters = {
            name: [parameter for parameter in module.parameters() if parameter.is_floating_point()]
            for name, module in self._modules.items()
        }
        self._gradients: dict[int, torch.Tensor] = {}
        self._old: dict[int, torch.Tensor] = {}

        self._calls.start(only_with_gradients)
        for optimizer in self._optimizers:
            self._hooks.callback(optimizer.register_step_pre_hook(self._before_update).remove)

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
        found = self._calls.taken()

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
        numbers = fetch([*whole, *(call.numbers for call in found)])
        norms = {key: norm for key, (norm,) in zip(norms, numbers, strict=False)}
        calls: dict[tuple[str, str], list[tuple[list[float], int]]] = {}
        for call, of_call in zip(found, numbers[len(norms) :], strict=True):
            calls.setdefault((call.kind, call.name), []).append((of_call, call.count))
        for name, module in self._modules.items():
            if (
                isinstance(module, Modulation)
                and ("activations", name) in calls
                and (module.kinds[0], name) not in calls
            ):
                raise RuntimeError(
                    f"the modulation {name} has run without a call of its `proj`, whose maps it applies."
                )
        self._gradients, self._old = {}, {}

        # From numbers to named values
        entry: dict = {"step": self.num_updates}
        for name, of_module in self._parameters.items():
            entry |= values_of_parameters(name, of_module, norms)
        for (kind, name), of_name in calls.items():
            entry |= values_of_calls(kind, name, of_name)
        if self.history:
            self.history[-1] = without_histograms(self.history[-1])
        self.history.append(dict(sorted(entry.items(), key=lambda item: item[0] != "step")))
