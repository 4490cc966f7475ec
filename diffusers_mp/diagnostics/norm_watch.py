"""An alarm before a training ends: norms, updates, the residual stream, gates and scales, against limits.

What a `MagnitudeRecorder` records for a figure, a `NormWatch` compares with limits, and it says which layer has left
them first. It shares the recorder's hooks.
"""

import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..modulation import Modulation
from ..sharding import local, return_to_shards, unwrapped
from .calls import Calls, chosen_modules, is_swapped_linear
from .magnitudes import fetch, norm_of, norm_of_difference, norms_over_shards


# The limits of each quantity, from runs that ended well and runs that did not: `benchmarks/quality/alarm.py`.
LIMITS = {
    "median_update": 0.0115,
    "relative_update": 0.03,
    "weight_growth": 5.0,
    "stream_growth": 30.0,
    "largest_growth": 100.0,
    "gate": 5.0,
    "scale": 5.0,
}
# One gradient among many is large and does nothing: updates must be above their limits at so many looks running.
PATIENCE = {"median_update": 2, "relative_update": 2}
_LOWER_THE_RATE = "the usual cause is a learning rate that is too high: go back to a checkpoint, and try a third of it"
_BOUND = f"{_LOWER_THE_RATE}, or bound the tokens (`max_magnitude`, configuration F)"
_WAYS_OUT = {
    "median_update": (
        "the median over all matrices of the update over the weight, the largest of which is in",
        _LOWER_THE_RATE,
    ),
    "relative_update": ("the update over the weight in", _LOWER_THE_RATE),
    "weight_growth": (
        "the norm over that at the start in",
        "weights that grow learn ever more slowly, and make what they put out grow: `pin_weight_norms_` holds them",
    ),
    "stream_growth": ("the root mean square of the output over that at the start in", _BOUND),
    "largest_growth": ("the largest entry of the output over that at the start in", _BOUND),
    "gate": ("the root mean square of the gate in", _BOUND),
    "scale": ("the root mean square of the scale in", _BOUND),
}


class Alarm(NamedTuple):
    """A quantity that has left its limit; as a string, a sentence for whoever trains.

    Attributes:
        update (int): number of the update that was looked at.
        quantity (str): a key of `LIMITS`.
        name (str): of the first parameter or module, in the model's order, beyond the limit; of the matrix with the
            largest update for "median_update".
        value (float): its value.
        limit (float): what it should be at most.
    """

    update: int
    quantity: str
    name: str
    value: float
    limit: float

    def __str__(self) -> str:
        what, way_out = _WAYS_OUT[self.quantity]
        looks = f" for {PATIENCE[self.quantity]} looks running" if self.quantity in PATIENCE else ""
        return (
            f"update {self.update}: {what} {self.name} ({self.quantity}) is {self.value:.3g}, above {self.limit:g}"
            f"{looks}; {way_out}"
        )


class NormWatch:
    """Warns when weights, updates or activations leave their limits, and names the first layer that does.

        watch = NormWatch(model)                # after all wrapping
        ...
            optimizer.step()
            optimizer.zero_grad()
            watch.step()                        # once for each update, after it, on every process

    It looks at the first update and at one in `every`. The quantities, and the limit of each:

    - `relative_update`, 0.03: for each matrix in training ‖new - old‖ / ‖w‖ of one update, forced normalisation
      included if that comes before `step`; ‖w‖ is the new norm, or that of the start where it is larger.
    - `median_update`, 0.0115: the median of these over all matrices. For unit rows, whose norms are fixed, it is what
      tells of a failure long before. Both must be above their limits at two looks running.
    - `weight_growth`, 5: ‖w‖ of each matrix over that at the start.
    - `stream_growth`, 30, and `largest_growth`, 100: root mean square and largest absolute entry of what each block
      returns, over those at the first look. Blocks are those of `MagnitudeRecorder`, or the members of a
      `nn.Sequential`; a model without any has none of the two.
    - `gate` and `scale`, 5: their root mean square at each modulation of this package, and at each linear layer that
      `swap_adaln_for_rotation` has swapped.

    A matrix that starts at zero counts as if it had started with rows of norm 1. A value that is not finite is beyond
    any limit. Each quantity warns once.

    Training is the same to the bit with a watch and without. A look reads the host once, needs a copy of the matrices,
    and runs uncompiled, as a record of `MagnitudeRecorder` does; `close` belongs in a `finally` likewise. Of several
    processes the largest activations count, by one reduction; matrices that `fully_shard` divides are measured whole.

    Args:
        model (nn.Module): any model in training, wrapped or not; it is, or wraps, the module that is called.
        every (int): updates from one look to the next.
        limits (dict, optional): other limits, by quantity; `math.inf` for none.
        num_updates (int): updates that were made already. For a run that is resumed take `load_state_dict`, or the
            start is here.
        warn (bool): False leaves it to the caller to say what `step` returns.
    Attributes:
        num_updates (int): calls of `step`, and the updates before them.
        alarms (list of Alarm): all so far.
    Raises:
        ValueError: if an argument is outside of these rules.
    """

    __module__ = "diffusers_mp"

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        limits: Mapping[str, float] | None = None,
        num_updates: int = 0,
        warn: bool = True,
    ):
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        limits = dict(limits or {})
        if not limits.keys() <= LIMITS.keys() or not all(limit > 0 for limit in limits.values()):
            raise ValueError(f"`limits` must be positive numbers for some of {list(LIMITS)}, got {limits}.")
        self.every = every
        self.limits = {**LIMITS, **limits}
        self.num_updates = num_updates
        self.warn = warn
        self.alarms: list[Alarm] = []
        self._model = unwrapped(model)
        chosen = chosen_modules(self._model, None)
        self._modules = {name: module for name, module in chosen.items() if _quantities(module)}
        self._calls = Calls(self._model, self._modules, _measured)
        # Quantities of one look by name and, of weights and blocks, their values at the start.
        self._values: dict[tuple[str, str], float] = {}
        self._num_above: dict[tuple[str, str], int] = {}
        self._start: dict[tuple[str, str], float] = {}
        return_to_shards(self._model)
        matrices = self._matrices()
        if matrices:
            norms = norms_over_shards([norm_of(weight) for weight in matrices.values()], list(matrices.values()))
            (numbers,) = fetch([_stacked(norms)])
            for (name, weight), norm in zip(matrices.items(), numbers, strict=True):
                self._start["weight_growth", name] = norm or math.sqrt(weight.shape[0])
        self._old: dict[str, torch.Tensor] | None = None
        self._begin_if_due()

    def step(self) -> list[Alarm]:
        """End an update, and begin the next one. On every process.

        Returns:
            list of Alarm: new ones, on every process; mostly none.
        Raises:
            RuntimeError: if an update to be looked at went past the model.
        Warns:
            UserWarning: each alarm, on the first process.
        """
        self.num_updates += 1
        alarms = []
        if self._old is not None:
            alarms = self._look()
            self.alarms += alarms
        if self.warn and (not _are_several() or dist.get_rank() == 0):
            for alarm in alarms:
                warnings.warn(str(alarm), stacklevel=2)
        self._begin_if_due()
        return alarms

    def values(self) -> dict[str, float]:
        """What the last look has seen, for a tracker.

        Returns:
            dict: "<quantity>/<name>" to value, and "median_update"; empty before the first look.
        """
        return {f"{quantity}/{name}".rstrip("/"): value for (quantity, name), value in self._values.items()}

    def close(self) -> None:
        """Let go of a look that has begun, and of its hooks."""
        self._old = None
        self._calls.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: how it started, and what it has been told. Numbers, lists and dicts alone.

        Returns:
            dict: for `load_state_dict`, and for Accelerate's `register_for_checkpointing`.
        """
        return {
            "num_updates": self.num_updates,
            "alarms": [list(alarm) for alarm in self.alarms],
            "start": _nested(self._start),
            "num_above": _nested(self._num_above),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. After the model has its weights, because a look may begin here.

        Args:
            state (dict): of `state_dict`.
        """
        self.close()
        self.num_updates = state["num_updates"]
        self.alarms = [Alarm(*alarm) for alarm in state["alarms"]]
        self._start |= _flat(state["start"])
        self._num_above = _flat(state["num_above"])
        self._begin_if_due()

    def _matrices(self) -> dict[str, nn.Parameter]:
        """Weights in training with rows, by their names, in which compilation leaves no trace."""
        return {
            name.replace("_orig_mod.", ""): parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and parameter.ndim >= 2 and parameter.is_floating_point()
        }

    def _begin_if_due(self) -> None:
        update = self.num_updates + 1
        if update == 1 or update % self.every == 0:
            return_to_shards(self._model)
            self._old = {name: local(weight).detach().clone() for name, weight in self._matrices().items()}
            if self._modules:
                self._calls.start()

    @torch.no_grad()
    def _look(self) -> list[Alarm]:
        old = self._old
        self.close()
        return_to_shards(self._model)
        matrices = {name: weight for name, weight in self._matrices().items() if name in old}
        weights = list(matrices.values())
        norms = [norm_of(weight) for weight in weights]
        norms += [norm_of_difference(weight, old[name]) for name, weight in matrices.items()]
        norms = norms_over_shards(norms, weights * 2)
        # All numbers, in one read
        largest = self._largest_of_calls()
        numbers = iter(fetch([_stacked(tensors) for tensors in (norms, [*largest.values()]) if tensors]))
        self._values = {}
        if weights:
            of_weights, updates = next(numbers), {}
            for name, norm, change in zip(matrices, of_weights, of_weights[len(weights) :], strict=False):
                # Beside its start, because a matrix that was zero has moved by all of its norm.
                start = self._start.setdefault(("weight_growth", name), norm or 1.0)
                self._values["weight_growth", name] = norm / start
                updates[name] = change / max(norm, start)
                self._values["relative_update", name] = updates[name]
            self._values["median_update", ""] = statistics.median(updates.values())
        if largest:
            for key, value in zip(largest, next(numbers), strict=True):
                if key[0].endswith("_growth"):
                    value /= self._start.setdefault(key, value or 1.0)
                self._values[key] = value
        return self._new_alarms()

    def _largest_of_calls(self) -> dict[tuple[str, str], torch.Tensor]:
        """Of each module and quantity the largest of all calls and processes: the same keys on each of them."""
        if not self._modules:
            return {}
        calls = defaultdict(list)
        for call in self._calls.taken():
            quantities = ("stream_growth", "largest_growth") if call.kind == "activations" else (call.kind,)
            for quantity, number in zip(quantities, call.numbers.unbind(), strict=True):
                calls[quantity, call.name.partition("/")[0]].append(number)
        keys = [(quantity, name) for name, module in self._modules.items() for quantity in _quantities(module)]
        zero = torch.zeros_like(next(iter(calls.values()))[0])
        of_keys = [calls.get(key, [zero]) for key in keys]
        largest = _stacked([_stacked(numbers).amax() if len(numbers) > 1 else numbers[0] for numbers in of_keys])
        if _are_several():
            # Not every backend takes NaN for the largest.
            dist.all_reduce(largest.nan_to_num_(nan=math.inf, posinf=math.inf), op=dist.ReduceOp.MAX)
        return dict(zip(keys, largest.unbind(), strict=True))

    def _new_alarms(self) -> list[Alarm]:
        """Of each quantity that has not warned yet, the first value beyond its limit."""
        self._num_above = {
            key: self._num_above.get(key, 0) + 1
            for key, value in self._values.items()
            if not value <= self.limits[key[0]]
        }
        told, alarms = {alarm.quantity for alarm in self.alarms}, []
        for (quantity, name), num_above in self._num_above.items():
            if quantity not in told and num_above >= PATIENCE.get(quantity, 1):
                told.add(quantity)
                value = self._values[quantity, name]
                if quantity == "median_update":
                    of_matrices = {key: update for key, update in self._values.items() if key[0] == "relative_update"}
                    _, name = max(of_matrices, key=of_matrices.get)
                alarms.append(Alarm(self.num_updates, quantity, name, value, self.limits[quantity]))
        return alarms


def _measured(kind: str, module: nn.Module, tensor: torch.Tensor) -> torch.Tensor | None:
    if kind not in _quantities(module) and (kind != "activations" or "stream_growth" not in _quantities(module)):
        return None
    tensor = local(tensor)
    magnitude = (norm_of(tensor) / math.sqrt(tensor.numel())).float()
    if kind != "activations":
        return magnitude.reshape(1)
    return torch.stack([magnitude, torch.linalg.vector_norm(tensor, math.inf).float()])


def _quantities(module: nn.Module) -> tuple[str, ...]:
    """What is watched of a module: gate and scale of a modulation, and what a block returns."""
    if isinstance(module, Modulation) or is_swapped_linear(module):
        return tuple(kind for kind in ("gate", "scale") if kind in module.kinds)
    return ("stream_growth", "largest_growth")


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _stacked(numbers: list[torch.Tensor]) -> torch.Tensor:
    """Scalars, of one device or of several, as one tensor."""
    return torch.stack([number.to(numbers[0]) for number in numbers])


def _nested(flat: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    nested: dict[str, dict[str, float]] = {}
    for (quantity, name), value in flat.items():
        nested.setdefault(quantity, {})[name] = value
    return nested


def _flat(nested: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    return {(quantity, name): value for quantity, of_quantity in nested.items() for name, value in of_quantity.items()}
