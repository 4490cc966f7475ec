"""Averages of widths that were never tracked, rebuilt from stored ones (EDM2, arXiv 2312.02696, section 3.2).

The average of any width, at the step of a snapshot, is close to a combination of the snapshots. How close follows from
the profiles alone, before a single weight is read.
"""

import operator
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..files import whole_folder, write_json
from ..rows import normalize_weights_
from ..transformer_mpdit import MPDiTTransformer2DModel
from .ema import exponent_of_std, profile_inner_product
from .snapshots import Snapshot, check_snapshots, find_snapshots, pipeline_parts


REPORT_FILE = "reconstruction.json"


# Profile maths.


# weights = argmin ‖Σ_i weights_i p_i - target‖², then divided by their sum: EDM2, algorithm 3.
def reconstruction_weights(
    snapshot_steps: Sequence[int], snapshot_stds: Sequence[float], step: int, std: float
) -> np.ndarray:
    """Weights whose combination of stored averages comes closest to the average of another width.

    Snapshots that are many and close together make the system ill-conditioned; the weights stay a near-optimal fit,
    but single ones grow large and cancel.

    Args:
        snapshot_steps (sequence of int): step of each snapshot.
        snapshot_stds (sequence of float): width of each snapshot, in the same order.
        step (int): step of the wanted average.
        std (float): width of the wanted average, in (0, 0.2887).
    Returns:
        np.ndarray: one weight per snapshot, float64, with sum 1.
    Raises:
        ValueError: if the two sequences differ in length or are empty, a snapshot comes twice, a step is not positive
            or a width is out of range.
    """
    snapshots = list(zip(snapshot_steps, snapshot_stds, strict=False))
    if not snapshots or len(snapshot_steps) != len(snapshot_stds):
        raise ValueError(
            "`snapshot_steps` and `snapshot_stds` must have the same length, at least 1, got "
            f"{len(snapshot_steps)} and {len(snapshot_stds)}"
        )
    if len(set(snapshots)) < len(snapshots):
        raise ValueError(f"snapshots must differ in step or std, got {snapshots}")
    if min(step, *snapshot_steps) < 1:
        raise ValueError(f"steps must be 1 or more, got `step` {step} and `snapshot_steps` {list(snapshot_steps)}")
    gram, target, _ = _inner_products(snapshot_steps, snapshot_stds, step, std)
    weights = np.linalg.solve(gram, target)
    return weights / weights.sum()


# ‖Σ_i weights_i p_i - p‖ = sqrt(weights·G·weights - 2 weights·b + <p, p>), G = <p_i, p_j>, b = <p_i, p>.
def profile_fit_error(
    weights: np.ndarray, snapshot_steps: Sequence[int], snapshot_stds: Sequence[float], step: int, std: float
) -> np.ndarray:
    """Distance of a combination of profiles from the wanted profile, relative to the norm of that.

    Let f = Σ_i weights_i p_i - p be the difference, of integral 0 as the weights' sum is 1, and θ(τ) the trajectory of
    the model's weights. The rebuilt average misses the tracked one by exactly ∫ f(τ) θ(τ) dτ: tracking takes θ to be
    constant between updates, so the sum that it forms is that integral. Two statements follow.

    For every trajectory and every constant c (Cauchy-Schwarz):

        ‖rebuilt - tracked‖ <= fit_error · ‖p‖ · (∫ ‖θ(τ) - c‖² dτ)^½

    For deviations of θ that are white noise, fit_error · ‖p‖ times the noise's magnitude IS the expected miss (RMS),
    and the same holds for a snapshot taken alone. So the quotient of two errors is the expected quotient of two misses
    for white noise. For other trajectories it is a figure of merit and no bound: a θ orthogonal to p_i - p, but not to
    f, has an infinite quotient. Weights in training drift more than they scatter; `tests/averages/`
    measures what that does. With widths 0.05 and 0.10 stored at 4 steps or more, width 0.075 at the last one is missed
    by less than the quotient, with 10 steps by an eighth of it. With 2 steps, the quotient is exceeded 1.4 times, and
    for width 0.03, which lies outside those stored, 3.2 times.

    Args:
        weights (np.ndarray): one for each snapshot, with sum 1; shape (…, n).
        snapshot_steps (sequence of int): step of each snapshot.
        snapshot_stds (sequence of float): width of each snapshot, in the same order.
        step (int): step of the wanted average.
        std (float): width of the wanted average, in (0, 0.2887).
    Returns:
        np.ndarray: shape (…). Rounding hides what is below about 1e-8 times the sum of the absolute weights.
    """
    gram, target, squared_norm = _inner_products(snapshot_steps, snapshot_stds, step, std)
    squared_distance = ((weights @ gram) * weights).sum(axis=-1) - 2 * weights @ target + squared_norm
    return np.sqrt(np.maximum(squared_distance, 0) / squared_norm)


def _inner_products(
    snapshot_steps: Sequence[int], snapshot_stds: Sequence[float], step: int, std: float
) -> tuple[np.ndarray, np.ndarray, np.float64]:
    """G = <p_i, p_j>, b = <p_i, p> and <p, p>."""
    steps, exponent = np.float64(snapshot_steps), exponent_of_std(std)
    exponents = np.float64([exponent_of_std(snapshot_std) for snapshot_std in snapshot_stds])
    gram = profile_inner_product(steps[:, None], exponents[:, None], steps[None, :], exponents[None, :])
    target = profile_inner_product(steps, exponents, step, exponent)
    return gram, target, profile_inner_product(step, exponent, step, exponent)


# Reconstruction.


@dataclass(frozen=True)
class Reconstruction:
    """How an average is rebuilt, and how well; `profile_fit_error` says what the errors bound.

    Attributes:
        step (int): its step.
        std (float): its width.
        weights (dict of str to float): factor on each snapshot, by the name of its folder; the sum is 1.
        fit_error (float): distance of the combined profile from the wanted one, relative to the norm of that.
        nearest_snapshot (str): the snapshot whose profile is nearest.
        fit_error_to_nearest (float): the same distance, relative to that of the nearest snapshot: what share of the
            way is left. 1 would mean that taking the nearest snapshot is as good.
        amplification (float): sum of the absolute weights, the most that rounding in the snapshots is multiplied by.
    """

    step: int
    std: float
    weights: dict[str, float]
    fit_error: float
    nearest_snapshot: str
    fit_error_to_nearest: float
    amplification: float


def plan_reconstruction(snapshots: Sequence[Snapshot], std: float, step: int | None = None) -> Reconstruction:
    """Weights and fit error of an average, from the steps and widths of the snapshots alone.

    Snapshots up to the first one at or after `step` take part: at the step of a snapshot, what came later in training
    plays no role. Steps between two snapshots are allowed, but a profile that ends where no snapshot does is fitted
    badly, and the error says how badly.

    Args:
        snapshots (sequence of Snapshot): as `find_snapshots` gives them.
        std (float): width of the wanted average, in (0, 0.2887).
        step (int, optional): its step, from that of the first snapshot to that of the last; the last if left out.
    Returns:
        Reconstruction: a single weight of 1 if the wanted average is stored.
    Raises:
        ValueError: if `std` or `step` is out of range, or there are fewer than two snapshots to combine.
    """
    std = float(std)
    exponent_of_std(std)
    if not snapshots:
        raise ValueError("`snapshots` must hold two snapshots or more to combine, got none")
    steps = sorted(snapshot.step for snapshot in snapshots)
    step = steps[-1] if step is None else operator.index(step)
    if not steps[0] <= step <= steps[-1]:
        raise ValueError(f"`step` must lie between the snapshots of {steps[0]} and {steps[-1]}, got {step}")
    used = snapshots_up_to(snapshots, step)
    names = [snapshot.path.name for snapshot in used]
    wanted = [(snapshot.step, snapshot.std) == (step, std) for snapshot in used]
    if any(wanted):
        name = names[wanted.index(True)]
        return Reconstruction(step, std, {name: 1.0}, 0.0, name, 0.0, 1.0)
    if len(used) < 2:
        raise ValueError(f"`snapshots` must hold two snapshots or more up to step {used[-1].step}, got {names}")
    profiles = [snapshot.step for snapshot in used], [snapshot.std for snapshot in used], step, std
    weights = reconstruction_weights(*profiles)
    error = profile_fit_error(weights, *profiles)
    errors_alone = profile_fit_error(np.eye(len(used)), *profiles)
    return Reconstruction(
        step=step,
        std=std,
        weights=dict(zip(names, weights.tolist(), strict=True)),
        fit_error=float(error),
        nearest_snapshot=names[errors_alone.argmin()],
        fit_error_to_nearest=float(error / errors_alone.min()),
        amplification=float(np.abs(weights).sum()),
    )


def snapshots_up_to(snapshots: Sequence[Snapshot], step: int) -> list[Snapshot]:
    """Snapshots that take part in an average: up to the first step that is `step` or later.

    Args:
        snapshots (sequence of Snapshot): as `find_snapshots` gives them, with a step from `step` on.
        step (int): step of the wanted average.
    Returns:
        list of Snapshot: in the same order.
    """
    last_step = min(snapshot.step for snapshot in snapshots if snapshot.step >= step)
    return [snapshot for snapshot in snapshots if snapshot.step <= last_step]


@torch.no_grad()
def reconstruct_ema(
    snapshots_dir: str | Path, output_dir: str | Path, std: float, step: int | None = None
) -> Reconstruction:
    """Rebuild the average of any width from the snapshots of a run, as a pipeline.

        average = Σ_i weights_i snapshot_i,   rows put back to their norm
    Algorithm 3 of EDM2 (arXiv 2312.02696). Works tensor by tensor in float64; it takes the memory of two models,
    however many snapshots there are.

    Args:
        snapshots_dir (str or Path): `ema_snapshots` of a run.
        output_dir (str or Path): the new pipeline, for `MPDiTPipeline.from_pretrained`; new or empty. The
            `Reconstruction` lies in it as `reconstruction.json`.
        std (float): width of the wanted average, in (0, 0.2887).
        step (int, optional): its step, as in `plan_reconstruction`; the last if left out.
    Returns:
        Reconstruction: weights and fit error.
    Raises:
        FileNotFoundError: if a snapshot or the pipeline's parts lack a file.
        FileExistsError: if `output_dir` has something in it.
        ValueError: as in `plan_reconstruction`, or if a snapshot is damaged or of another model.
    """
    snapshots_dir, output_dir = Path(snapshots_dir), Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"`output_dir` must be new or empty, {output_dir} is not")
    snapshots = find_snapshots(snapshots_dir)
    if not snapshots:
        raise FileNotFoundError(f"`snapshots_dir` must hold folders like step-0001000_std-0.05, got {snapshots_dir}")
    plan = plan_reconstruction(snapshots, std, step)
    used = [snapshot for snapshot in snapshots if snapshot.path.name in plan.weights]
    config = check_snapshots(used)
    parts = pipeline_parts(snapshots_dir)

    model = MPDiTTransformer2DModel.from_config(config).eval()
    parameters = dict(model.named_parameters())
    _check_tensors(used, parameters)
    for name, parameter in parameters.items():
        total = torch.zeros(parameter.shape, dtype=torch.float64)
        for snapshot in used:
            # Opened again for each tensor: the pages of a file that stays open would stay in memory too.
            with safe_open(snapshot.path / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
                total.add_(file.get_tensor(name), alpha=plan.weights[snapshot.path.name])
        parameter.copy_(total)
    normalize_weights_(model)

    with whole_folder(output_dir) as unfinished:
        model.save_pretrained(unfinished / "transformer")
        for part in parts:
            (shutil.copytree if part.is_dir() else shutil.copyfile)(part, unfinished / part.name)
        write_json(unfinished / REPORT_FILE, asdict(plan))
        if output_dir.exists():
            output_dir.rmdir()  # an error, not a loss, if something was put there meanwhile
    return plan


def _check_tensors(snapshots: list[Snapshot], parameters: dict[str, torch.Tensor]) -> None:
    expected = {name: list(parameter.shape) for name, parameter in parameters.items()}
    for snapshot in snapshots:
        path = snapshot.path / SAFETENSORS_WEIGHTS_NAME
        try:
            with safe_open(path, framework="pt") as file:
                received = {name: file.get_slice(name).get_shape() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        names = expected.keys() | received.keys()
        different = sorted(name for name in names if expected.get(name) != received.get(name))
        if different:
            raise ValueError(f"{path} must hold the weights that its config describes, it differs in {different}")
