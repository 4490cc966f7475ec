"""Watches a training run for a loss or gradient that is not finite, and finds where it came from; or that explodes.

While all is finite this costs one norm over the gradients and one read of the host per update, which on an accelerator
waits for nothing if the optimiser is fused. Only when it is not, the batch is run again with a hook on every module.

An update counts as failed if a loss of its micro batches, or the norm of its gradients, is not finite. All processes
decide together. A skipped update is an update by zero: parameters and the optimiser's state stay as they were, while
everything that counts updates (schedule, averages of the weights, checkpoints, the order of the data) goes on, so that
a resumed run is the same run. Buffers that a forward pass writes, such as BatchNorm's, are what it made of them.
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from ..files import whole_file, write_json
from ..sharding import unwrapped, whole
from .explosion import FACTOR, PATIENCE, WINDOW, LossHistory
from .trace import find_first, is_finite


REPORT_FILE = "report.json"
# Evidence of this many failures is kept: a run that skips one update in a thousand must not fill the disk.
MAX_REPORTS = 20


class NonFiniteError(FloatingPointError):
    """An update with a loss or gradient that is not finite, or with one of many losses that have exploded."""


class _Check(NamedTuple):
    """An update, and what is to be read of it: its loss, and whether its gradients are not finite."""

    step: int
    recorded: list[tuple[Any, torch.Tensor]]
    losses: list[torch.Tensor]
    grad_norm: torch.Tensor
    values: torch.Tensor
    event: torch.Event | None = None  # when they have come to the host


class Watchdog:
    """Keeps updates with a non-finite loss or gradient from a model, and names the module that made it.

        loss = compute_loss(batch)
        loss.backward()
        watchdog.record(batch, loss)                # after each micro batch
        if watchdog.check(step):                    # before the optimiser's step of each update
            optimizer.step()
        optimizer.zero_grad()

    On failure each recorded batch is run again, forward and backward, with hooks on every module, and the first module
    whose output, or whose gradient, is not finite is named: forward in order of execution, backward in its reverse.
    The report says as well whether the input of that module was finite already, in which case the fault lies between
    modules, in the `forward` of the module that called it. The evidence goes to `folder/step-N`: `report.json`, the
    batches of each process that found something as safetensors, and with `save_weights` the model's weights and
    buffers.

    - Random numbers: the second run starts from the random state at the time of the check, and that state is put back.
      A failure that hangs on dropout may not come again; the report says so.
    - Accumulation: batches of one update are kept until its check.
    - Several processes: `check` is to be called on all of them; one number more is reduced per update, so that all
      skip or stop. Under `fully_shard` gradients are shards, their norm is that of all shards.
    - Explosion: a loss that is finite, but above ten times the median of the last 100 updates, for 20 updates running,
      stops the run as well, or with "skip" is warned of, once. A learning rate that is too high is the usual cause.
      Nothing is run again for it; the report has the losses. Of several processes the largest loss counts.
    - Mixed precision: in bfloat16 nothing changes. With a `GradScaler` infinite gradients are how it finds its scale:
      they are left to it, which skips the step by itself, until its scale is down to 1, from where on scaling cannot
      be the reason. The loss, which is not scaled, always counts. Where clipping has called `scaler.unscale_`, an
      update that is skipped needs `scaler.update()` all the same: the next `unscale_` is refused without.
    - Accelerators: with a fused `optimizer` the device itself leaves a failed update out (`found_inf`), and the host
      learns of it at the next check, or at `settle`, so that no update waits for a read. The report has no list of
      gradients then, which are gone.

    Args:
        model (nn.Module): the model in training, wrapped (DistributedDataParallel, compiled) or not. Any module.
        folder (str or Path): where evidence goes; made on the first failure.
        compute_loss (callable): batch to loss, a scalar tensor, as in training; it is expected to call `model`.
        action (str): "stop" raises `NonFiniteError`, "skip" makes `check` return False, or warns of an explosion.
        max_skips (int): with "skip", so many failures in a row raise all the same.
        save_weights (bool): write the model's weights as well.
        scaler (torch.amp.GradScaler, optional): the scaler of float16 training.
        optimizer (torch.optim.Optimizer, optional): what makes the updates, wrapped by Accelerate or not.
    Attributes:
        num_skipped (int): failed updates that were skipped.
    Raises:
        ValueError: if an argument is outside of these rules.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        compute_loss: Callable[[Any], torch.Tensor],
        action: Literal["stop", "skip"] = "stop",
        max_skips: int = 10,
        save_weights: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        if action not in ("stop", "skip"):
            raise ValueError(f"`action` must be 'stop' or 'skip', got {action!r}.")
        if max_skips < 1:
            raise ValueError(f"`max_skips` must be at least 1, got {max_skips}.")
        self.model = model
        self.folder = Path(folder)
        self.compute_loss = compute_loss
        self.action = action
        self.max_skips = max_skips
        self.save_weights = save_weights
        self.scaler = scaler
        optimizer = getattr(optimizer, "optimizer", optimizer)
        is_fused = optimizer is not None and optimizer.defaults.get("fused")
        self._optimizer = optimizer if is_fused and scaler is None else None
        self._unread: _Check | None = None
        self.num_skipped = 0
        self._num_skipped_in_a_row = 0
        self._num_reports = 0
        self._history = LossHistory()
        self._recorded: list[tuple[Any, torch.Tensor]] = []

    def record(self, batch: Any, loss: torch.Tensor) -> None:
        """Remember a micro batch until the next check. Reads nothing from the device.

        Args:
            batch (any nest of dicts, lists and tensors): as `compute_loss` takes it.
            loss (torch.Tensor): its loss, not scaled.
        """
        self._recorded.append((batch, loss.detach()))

    def check(self, step: int, grad_norm: torch.Tensor | None = None) -> bool:
        """Whether the update may be made. Call it on every process, after the last backward pass of the update.

        Args:
            step (int): number of the update, for the evidence.
            grad_norm (torch.Tensor, optional): norm of all gradients, where clipping has computed it already.
        Returns:
            bool: False if the update failed and is to be skipped; the gradients are gone then. True where the device
            leaves failed updates out by itself: call the optimiser.
        Raises:
            NonFiniteError: if it failed and `action` is "stop", it is the last of `max_skips` failures in a row, or
                the weights themselves are not finite, so that all further updates would fail; or if the loss has
                exploded and `action` is "stop".
        Warns:
            UserWarning: if the loss has exploded and `action` is "skip".
        """
        recorded, self._recorded = self._recorded, []
        if grad_norm is None:
            grad_norm = gradient_norm(self.model)
        grad_norm = whole(grad_norm)
        losses = [loss for _, loss in recorded]
        device = losses[0].device if losses else grad_norm.device
        means = [loss.float().mean().to(device) for loss in losses]
        loss = torch.stack(means).mean() if means else torch.zeros((), device=device)
        # One host read: [loss, infinity if one is not finite; whether the norm is not], the larger of all processes.
        norm_failed = (~torch.isfinite(grad_norm).all()).float().to(device)
        values = torch.stack([torch.where(torch.isfinite(loss), loss, math.inf), norm_failed])
        if _num_processes() > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        if self._optimizer is None or device.type == "cpu":
            return self._judge(_Check(step, recorded, losses, grad_norm, values), is_late=False)
        self._optimizer.found_inf = torch.maximum(values[1], torch.isinf(values[0]))
        self.settle()
        values, event = values.to("cpu", non_blocking=True), torch.Event(device)
        event.record()
        self._unread = _Check(step, recorded, losses, grad_norm, values, event)
        return True

    def settle(self) -> None:
        """Learn of the last update what `check` has left to the device; before a checkpoint, and at the end.

        Raises:
            NonFiniteError: as `check`.
        """
        unread, self._unread = self._unread, None
        if unread is None:
            return
        unread.event.synchronize()
        # Those of the update under way.
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        if not self._judge(unread, is_late=True):
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def _judge(self, check: "_Check", is_late: bool) -> bool:
        loss, norm_failed = check.values.tolist()
        loss_failed = not math.isfinite(loss)
        if norm_failed and self.scaler is not None and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            norm_failed = 0.0
        if not (loss_failed or norm_failed):
            self._num_skipped_in_a_row = 0
            median = self._history.add(loss)
            if median is not None:
                self._explode(check.step, check.recorded, loss, median, check.grad_norm)
            return True
        self._fail(check.step, check.recorded, check.losses, check.grad_norm, is_late)
        return False

    def _explode(self, step, recorded, loss, median, grad_norm) -> None:
        message = (
            f"update {step}: the loss is {loss:.4g}, and has been above {FACTOR} times its median of {WINDOW} updates "
            f"({median:.4g}) for {PATIENCE} updates"
        )
        summary = {
            "step": step,
            "action": self.action,
            "message": message,
            "losses": list(self._history.losses),
            "gradient_norm": _as_json(grad_norm.item()),
        }
        message = (
            f"{message}; the usual cause is a learning rate that is too high: go back to a checkpoint from before "
            f"update {step - PATIENCE + 1}, and try a third of it; {self._keep(step, summary, recorded, True)}"
        )
        if self.action == "stop":
            raise NonFiniteError(message)
        if _process() == 0:
            warnings.warn(message, stacklevel=3)

    def _fail(self, step, recorded, losses, grad_norm, is_late) -> None:
        report = {
            "process": _process(),
            "losses": [_as_json(loss.item()) for loss in losses],
            "gradient_norm": _as_json(grad_norm.item()),
            **self._state_of_tensors(is_late),
            "batches_not_finite": [_not_finite(batch) for batch, _ in recorded],
            "first": find_first(self.model, self.compute_loss, [batch for batch, _ in recorded], self.scaler),
        }
        reports = [report]
        if _num_processes() > 1:
            reports = [None] * _num_processes()
            dist.all_gather_object(reports, report)
        # Forward before backward: a loss that is not finite on one process spoils the gradients of all.
        found = [report for report in reports if report["first"] is not None]
        # Likewise, the process whose activations show where it began spoils every shard of a gradient.
        found.sort(
            key=lambda report: (report["first"]["stage"] == "backward", report["first"]["value"] == "parameter")
        )
        weights_failed = any(report["parameters_not_finite"] for report in reports)
        num_in_a_row = self._num_skipped_in_a_row + 1
        stops = self.action == "stop" or weights_failed or num_in_a_row >= self.max_skips

        summary = {
            "step": step,
            "action": "stop" if stops else "skip",
            "message": _message(step, found[0] if found else reports[0]),
            "num_skipped_before": self.num_skipped,
            "scale": self.scaler.get_scale() if self.scaler is not None else None,
            "processes": reports,
        }
        where = self._keep(step, summary, recorded, is_witness=report in found or not found)
        if stops:
            reason = ""
            if weights_failed:
                reason = "; weights are not finite, so that no further update can be: resume from a checkpoint"
            elif self.action == "skip":
                reason = f"; {num_in_a_row} updates in a row have failed"
            raise NonFiniteError(f"{summary['message']}; {where}{reason}")
        self._num_skipped_in_a_row = num_in_a_row
        self.num_skipped += 1

    def _state_of_tensors(self, is_late: bool) -> dict[str, list[str] | None]:
        model = unwrapped(self.model)
        not_finite = None
        if not is_late:
            gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
            not_finite = [name for name, grad in gradients if grad is not None and not is_finite(grad)]
        return {
            "gradients_not_finite": not_finite,
            "parameters_not_finite": [name for name, tensor in model.named_parameters() if not is_finite(tensor)],
            "buffers_not_finite": [name for name, tensor in model.named_buffers() if not is_finite(tensor)],
        }

    def _keep(self, step: int, summary: dict, recorded, is_witness: bool) -> str:
        """Write evidence, unless there is much already; where it is, in words."""
        if self._num_reports >= MAX_REPORTS:
            return f"evidence of the first {MAX_REPORTS} failures only, in {self.folder}"
        self._num_reports += 1
        folder = self.folder / f"step-{step:07d}"
        try:
            self._save(folder, summary, recorded, is_witness)
        except (OSError, SafetensorError) as error:
            return f"the evidence could not be written: {error}"
        return f"evidence in {folder}"

    def _save(self, folder: Path, summary: dict, recorded, is_witness: bool) -> None:
        process = _process()
        weights = {}
        if self.save_weights:
            model = unwrapped(self.model)
            # Not `state_dict`, which may put rows back to their norm: evidence is what was there.
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                # All processes gather sharded tensors, one at a time; the first process keeps them.
                tensor = whole(tensor.detach())
                if process == 0:
                    weights[name] = tensor
        if is_witness:
            for number, (batch, _) in enumerate(recorded):
                tensors, others = _flatten(batch)
                metadata = {name: json.dumps(value, default=repr) for name, value in others.items()}
                with whole_file(folder / f"batch-process{process}-{number}.safetensors") as path:
                    save_file(_to_save(tensors), path, metadata=metadata)
        if process == 0:
            write_json(folder / REPORT_FILE, summary)
            if weights:
                with whole_file(folder / "weights.safetensors") as path:
                    save_file(_to_save(weights), path)


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """Norm of all gradients of a model, on its device: finite only if all of them are.

    Args:
        model (nn.Module): after a backward pass.
    Returns:
        torch.Tensor: scalar; a DTensor if gradients are. 0 without gradients.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter of a model is finite, with one answer for all processes. To be called on each of them.

    Args:
        model (nn.Module): any module, sharded or whole.
    Returns:
        bool: False if a process holds a value that is not finite.
    """
    parameters = list(model.parameters())
    failed = torch.tensor(0.0, device=parameters[0].device if parameters else None)
    failed += not all(map(is_finite, parameters))
    if _num_processes() > 1:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    return not failed


def _message(step: int, report: dict[str, Any]) -> str:
    """What happened in one sentence."""
    start = f"update {step}: "
    first = report["first"]
    if first is None:
        norm = report["gradient_norm"]
        if not isinstance(norm, float) and report["gradients_not_finite"] == []:
            return start + f"the norm of the gradients is {norm}, though each of them is finite"
        return start + (
            f"the loss is {', '.join(map(str, report['losses']))} and the norm of the gradients {norm}, which running "
            "the batch again did not reproduce"
        )
    module = f"{first['module']!r} ({first['class']})" if first["module"] else f"the model ({first['class']})"
    if first["value"] == "loss":
        text = "the loss is not finite, though the output of every module is"
    elif first["stage"] == "forward":
        text = f"the first module with an output that is not finite is {module}"
        if first["parameters_not_finite"]:
            text += f", as are its parameters {first['parameters_not_finite']}"
        elif not first["input_was_finite"]:
            text += ", whose input was not finite already"
    elif first["value"] == "parameter":
        text = f"the first gradient that is not finite is that of the parameter {first['parameter']!r} of {module}"
    elif first["value"] == "input":
        text = f"the first gradient that is not finite is that of the input of {module}, whose backward made it"
    else:
        text = (
            f"the first gradient that is not finite is the one that arrives at the output of {module}, made by what "
            "follows that module"
        )
    inputs = sorted({name for names in report["batches_not_finite"] for name in names})
    if inputs:
        text += f"; the batch itself is not finite in {inputs}"
    return f"{start}{text} (process {report['process']}, micro batch {first['micro_batch']})"


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _process() -> int:
    return dist.get_rank() if _num_processes() > 1 else 0


def _flatten(nest: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and everything else, of a nest by dotted names."""
    tensors, others = {}, {}
    for path, leaf in tree_flatten_with_path(nest)[0]:
        keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]
        name = ".".join(map(str, keys)) or "batch"
        (tensors if isinstance(leaf, torch.Tensor) else others)[name] = leaf
    return tensors, others


def _to_save(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Clones: safetensors takes no tensors that share memory.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _not_finite(batch: Any) -> list[str]:
    return [name for name, tensor in _flatten(batch)[0].items() if not is_finite(tensor)]


def _as_json(value: float) -> float | str:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else str(value)
