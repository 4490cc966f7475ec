"""Power-function averages of weights (EDM2, arXiv 2312.02696, section 3 and appendix C): profile maths, then tracking.

Widths that were not tracked are rebuilt in reconstruction.py.

The weights θ(τ), 0 <= τ <= t, enter the average in proportion to τ^γ. The width `std` of that profile is its standard
deviation as a fraction of t, so a width means the same at every length of training. The profile maths is plain
float64: steps reach 1e6 and exponents 100, which float32 cannot multiply out.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..functional import compute_dtype
from ..rows import forced_layers, normalize_rows_
from ..sharding import is_sharded, return_to_shards, whole


# The width of γ = 0, the plain mean of all weights so far: no power function that grows is wider.
MAX_STD = 12**-0.5


# Profile maths.


# γ³ + 7γ² + (16 - std⁻²) γ + (12 - std⁻²) = 0, from std² = (γ + 1) / ((γ + 2)² (γ + 3)): EDM2, equations 123 and 126.
def exponent_of_std(std: float) -> float:
    """Exponent γ of the profile whose relative width is `std`.

    Args:
        std (float): width, a fraction of training, in (0, 0.2887), the upper end being 1/√12.
    Returns:
        float: γ > 0, the largest real root.
    Raises:
        ValueError: if `std` is outside that interval.
    """
    if not 0 < std < MAX_STD:
        raise ValueError(f"`std` must lie in (0, 1/sqrt(12)), that is (0, {MAX_STD:.4f}), got {std}")
    precision = float(std) ** -2
    # One root is positive and the others have a negative real part, so the largest real part is the root we want.
    return float(np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision]).real.max())


# average(t) = decay · average(t - Δt) + (1 - decay) · θ(t) with decay = (1 - Δt / t)^(γ + 1): EDM2, equation 127.
def power_function_decay(step: int, std: float, stride: int = 1) -> float:
    """Factor that multiplies the AVERAGE at an update; the current weights are multiplied by one minus it.

    Args:
        step (int): optimiser updates done so far, t, 1 or more.
        std (float): width of the average, in (0, 0.2887).
        stride (int): updates done since the average was last updated, Δt, from 1 to `step`.
    Returns:
        float: in [0, 1); 0 when the average has seen nothing yet (`stride` equal to `step`).
    Raises:
        ValueError: if `stride` is not between 1 and `step`, or `std` is out of range.
    """
    if not 1 <= stride <= step:
        raise ValueError(f"`stride` must be between 1 and `step`, got stride {stride} at step {step}")
    return float((1.0 - stride / step) ** (exponent_of_std(std) + 1.0))


# <p_a, p_b> = (γa + 1)(γb + 1) (ta / tb)^(γb if ta < tb else -γa) / ((γa + γb + 1) max(ta, tb)): EDM2, equation 151.
def profile_inner_product(
    step_a: np.ndarray, exponent_a: np.ndarray, step_b: np.ndarray, exponent_b: np.ndarray
) -> np.ndarray:
    """Integral over training of the product of two profiles, each of integral one. Arguments broadcast.

    Args:
        step_a (np.ndarray): steps ta at which the first profiles end.
        exponent_a (np.ndarray): their exponents γa.
        step_b (np.ndarray): steps tb at which the second profiles end.
        exponent_b (np.ndarray): their exponents γb.
    Returns:
        np.ndarray: float64, of the broadcast shape.
    """
    step_a, step_b = np.float64(step_a), np.float64(step_b)
    exponent_a, exponent_b = np.float64(exponent_a), np.float64(exponent_b)
    # Either way the ratio raised to the power is at most 1, so nothing overflows.
    overlap = (step_a / step_b) ** np.where(step_a < step_b, exponent_b, -exponent_a)
    scale = (exponent_a + 1) * (exponent_b + 1) / (exponent_a + exponent_b + 1)
    return scale * overlap / np.maximum(step_a, step_b)


# Tracking.


class PowerFunctionEMA:
    """Power-function averages of a model's parameters, several widths at once.

        average ← decay · average + (1 - decay) · θ,   decay = (1 - Δt / t)^(γ + 1)
    Equation 127 of EDM2 (arXiv 2312.02696). Differs from it: rows of weight-normalised layers are re-normalised when
    an average is used (an average of unit rows is shorter than 1), never in the average itself.

    Every floating-point parameter is averaged, trained or frozen, in at least float32 on its own device: bf16 would
    round the small steps of a wide average away. Buffers and integer parameters are neither averaged nor stored: a
    model that an average is copied into keeps its own.

    Pass the plain model, after it was moved to its device: not the wrapper of DistributedDataParallel, and for a
    compiled model its `_orig_mod`: names are those of the model given here. With Accelerate,
    `unwrap_model(model, keep_torch_compile=False)` takes off both.

    Args:
        model (nn.Module): the model to follow. `update` reads its current parameters.
        stds (sequence of float): widths, fractions of training, each in (0, 0.2887).
    Attributes:
        step (int): step of the last update, 0 before the first. Until then averages equal the initial weights.
        stds (tuple of float): the widths.
    Raises:
        TypeError: if `stds` is a number.
        ValueError: if `stds` is empty, repeats a width or has one out of range, or the model has nothing to average.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, stds: Sequence[float] = (0.05, 0.10)):
        if not isinstance(stds, Iterable):
            raise TypeError(f"`stds` must be a sequence of widths, such as (0.05, 0.10), got {stds}")
        self.stds = tuple(float(std) for std in stds)
        if not self.stds or len(set(self.stds)) < len(self.stds):
            raise ValueError(f"`stds` must be one or more different widths, got {list(stds)}")
        for std in self.stds:
            exponent_of_std(std)
        parameters = _floating_parameters(model)
        if not parameters:
            raise ValueError(f"`model` must have floating-point parameters, {type(model).__name__} has none")
        self.model = model
        self.step = 0
        self._averages = {
            std: {
                name: parameter.to(compute_dtype(parameter.dtype), copy=True) for name, parameter in parameters.items()
            }
            for std in self.stds
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every average towards the model's current parameters.

        Call it after the optimiser step (and forced normalisation), at every step or every few: the average takes the
        weights in between to be those of now.

        Args:
            step (int): optimiser updates done so far, the first being 1.
        Raises:
            ValueError: if `step` is not above that of the last update, or the model's parameters have changed in name
                or shape.
        """
        step = operator.index(step)
        if step <= self.step:
            raise ValueError(f"`step` must be above that of the last update, {self.step}, got {step}")
        parameters = self._parameters_of(self.model)
        # Cast once for all widths; a parameter of the average's dtype is used as it is.
        dtypes = [average.dtype for average in self._averages[self.stds[0]].values()]
        current = [parameter.to(dtype) for parameter, dtype in zip(parameters, dtypes, strict=True)]
        shares = [1.0 - power_function_decay(step, std, stride=step - self.step) for std in self.stds]
        # By parameter, then by width, so that a parameter is read from memory once.
        # lerp(average, θ, w) = average + w (θ - average): constant weights stay to the bit, and w = 1 gives θ.
        torch._foreach_lerp_(
            [self._averages[std][name] for name in self._averages[self.stds[0]] for std in self.stds],
            [parameter for parameter in current for _ in self.stds],
            shares * len(current),
        )
        self.step = step

    @torch.no_grad()
    def copy_to(self, model: nn.Module, std: float) -> None:
        """Copy the average of one width into a model and put its normalised rows back to their norm.

        Under `fully_shard` averages are sharded. Into a model with the same shards they are copied without a word to
        other processes. For a whole model they are gathered, one parameter at a time: every process calls it, those
        that want nothing with a model on the device "meta".

        Args:
            model (nn.Module): the tracked model or another with the same parameters, of any floating-point dtype.
                Its buffers and integer parameters stay as they are.
            std (float): one of the tracked widths.
        Raises:
            ValueError: if `std` is not tracked or the model's parameters differ in name or shape.
        """
        averages = self._averages_of(std)
        _copy_each(self._parameters_of(model), averages.values())
        # Averages of rows are shorter than the rows; those that nothing trains are what they were.
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        layers = (module for name, module in model.named_modules() if f"{name}.weight".lstrip(".") in trained)
        normalize_rows_(forced_layers(layers, frozen=True))

    @contextmanager
    def averaged(self, model: nn.Module, std: float) -> Iterator[nn.Module]:
        """Run a block with the average of one width in the model; the raw weights return bit for bit.

        They return when the block raises, too. Layers that the block takes out of training mode come back with rows at
        their norm, as from `eval()`. Costs one copy of the parameters on their device.

        Args:
            model (nn.Module): as in `copy_to`.
            std (float): one of the tracked widths.
        Yields:
            nn.Module: the same model.
        Raises:
            ValueError: as in `copy_to`.
        """
        raw = [parameter.clone() for parameter in self._parameters_of(model)]
        trained = [module for module in model.modules() if module.training]
        try:
            self.copy_to(model, std)
            yield model
        finally:
            with torch.no_grad():
                _copy_each(self._parameters_of(model), raw)
            # Leaving training mode within the block has settled rows of the average; the rows put back need it too.
            normalize_rows_(forced_layers(module for module in trained if not module.training))

    def state_dict(self) -> dict:
        """Step, widths and averages. Tensors are the live ones, as in `nn.Module.state_dict`: copy them to keep them.

        Returns:
            dict: `step` (int), `stds` (list of float), `averages` (one dict of name to tensor per width, in order).
        """
        return {
            "step": self.step,
            "stds": list(self.stds),
            "averages": [dict(self._averages[std]) for std in self.stds],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state from `state_dict`; averages stay on the device of this tracker's.

        Args:
            state_dict (dict): from a tracker with the same widths, of a model with the same parameters.
        Raises:
            ValueError: if keys, widths, names, shapes or dtypes differ. Nothing has been changed then.
        """
        expected_keys = {"step", "stds", "averages"}
        if set(state_dict) != expected_keys:
            raise ValueError(f"`state_dict` must have the keys {sorted(expected_keys)}, got {sorted(state_dict)}")
        stds, averages = list(state_dict["stds"]), state_dict["averages"]
        if stds != list(self.stds) or len(averages) != len(stds):
            raise ValueError(
                f"`state_dict` must hold averages of the tracked stds {list(self.stds)}, got stds {stds} and "
                f"{len(averages)} averages"
            )
        for std, loaded in zip(self.stds, averages, strict=True):
            where = f"average of std {std} in `state_dict`"
            _check_parameters(where, self._averages[std], loaded)
            for name, average in self._averages[std].items():
                if loaded[name].dtype != average.dtype:
                    raise ValueError(f"{where}: {name!r} must be {average.dtype}, got {loaded[name].dtype}")
        for std, loaded in zip(self.stds, averages, strict=True):
            for name, average in self._averages[std].items():
                average.copy_(loaded[name])
        self.step = int(state_dict["step"])

    def _averages_of(self, std: float) -> dict[str, torch.Tensor]:
        if std not in self._averages:
            raise ValueError(f"`std` must be one of the tracked widths {list(self.stds)}, got {std}")
        return self._averages[std]

    def _parameters_of(self, model: nn.Module) -> list[torch.Tensor]:
        """Parameters of a model in the order of the averages."""
        parameters = _floating_parameters(model)
        averages = self._averages[self.stds[0]]
        _check_parameters("parameters of `model`", averages, parameters)
        return [parameters[name] for name in averages]


def _copy_each(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    # One by one: DTensors know `copy_` but not `_foreach_copy_`, and no more than one is gathered at a time.
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source if is_sharded(target) else whole(source))


def _floating_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return_to_shards(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def _check_parameters(where: str, expected: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    if loaded.keys() != expected.keys():
        missing, unexpected = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
        raise ValueError(f"{where} must have the tracked names, missing {missing}, unexpected {unexpected}")
    for name, tensor in expected.items():
        if loaded[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name!r} must have shape {tuple(tensor.shape)}, got {tuple(loaded[name].shape)}"
            )
