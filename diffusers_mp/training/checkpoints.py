"""Checkpoints of a training run: `checkpoint-N` folders, the same for one process, many, and shards.

    checkpoint-N/manifest.json         size and SHA-256 of every other file; written last
    checkpoint-N/training_state.json   the step, and what must not change when the run goes on
    checkpoint-N/shards/               `torch.distributed.checkpoint`: weights, pinned norms, optimiser, averages
    checkpoint-N/scheduler.bin, …      Accelerate's own: schedule, random states, scaler of float16

A folder of that name is complete: it is written as `checkpoint-N.unfinished` and then renamed. Every process writes
the shards that it holds, and reads those that it needs: nothing is gathered, and a run may go on with another number
of processes or another engine. The folder must be one that all of them see.
"""

import contextlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import SCALER_NAME
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves

from ..averages.ema import PowerFunctionEMA
from ..files import MISSING_IS_AN_ERROR, UNFINISHED, read_json, sha256_of_file, space_for, sync, write_json
from ..pinned_norms import set_weight_norms, weight_norms
from ..sharding import return_to_shards
from .watchdog import NonFiniteError, all_finite


# Not Accelerate's, which must be initialised: a checkpoint is looked for before.
logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "training_state.json"
MANIFEST_FILE = "manifest.json"
SHARDS_FOLDER = "shards"


class TrainingState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        model (nn.Module): the model that the averages follow, sharded or whole; its pinned norms are
            saved with it.
        optimizer (AcceleratedOptimizer): its optimiser, as `accelerator.prepare` gave it.
        lr_scheduler (LRScheduler): its schedule.
        ema (PowerFunctionEMA): its averages.
    """

    model: nn.Module
    optimizer: AcceleratedOptimizer
    lr_scheduler: LRScheduler
    ema: PowerFunctionEMA


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run.

    Args:
        output_dir (str or Path): folder of the run.
    Returns:
        list of Path: `checkpoint-N` folders in the order of N.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(CHECKPOINT_NAME.fullmatch(path.name)[1]))


def check_checkpoint(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest.

    Args:
        checkpoint (Path): a `checkpoint-N` folder.
    Returns:
        str or None: what is wrong with it, naming the file; None if nothing is.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        expected = {name: (file["num_bytes"], file["sha256"]) for name, file in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})"
    if STATE_FILE not in expected:
        return f"{MANIFEST_FILE} does not name {STATE_FILE}"
    for name, (num_bytes, sha256) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {num_bytes}"
        if sha256_of_file(path) != sha256:
            return f"{name} has other content than was written"
    return None


def resolve_checkpoint(resume_from_checkpoint: str, output_dir: str | Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` asks for; a damaged latest one is passed over, said aloud.

    Args:
        resume_from_checkpoint (str): "latest", a name in `output_dir`, or a path.
        output_dir (str or Path): folder of the run.
    Returns:
        Path or None: None if "latest" is asked for and there is none yet.
    Raises:
        FileNotFoundError: if the named checkpoint does not exist.
        ValueError: if the named checkpoint is damaged, or all there are.
    """
    checkpoints = find_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        for path in reversed(checkpoints):
            damage = check_checkpoint(path)
            if damage is None:
                return path
            logger.warning("%s is damaged, going back to the one before it: %s", path, damage)
        if checkpoints:
            raise ValueError(
                f"`--resume_from_checkpoint latest` needs an intact checkpoint, but all {len(checkpoints)} in "
                f"{output_dir} are damaged."
            )
        return None
    for path in (Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if path.is_dir():
            damage = check_checkpoint(path)
            if damage is not None:
                raise ValueError(f"`--resume_from_checkpoint {resume_from_checkpoint}` is damaged: {damage}.")
            return path
    raise FileNotFoundError(
        f"`--resume_from_checkpoint` must be 'latest' or a finished checkpoint, got {resume_from_checkpoint!r}; "
        f"{output_dir} has {[path.name for path in checkpoints]}."
    )


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    state: TrainingState,
    facts: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Write `checkpoint-<step>`; a folder of that name is always complete. To be called on every process.

    Args:
        accelerator (Accelerator): of the run, for the number of processes and the scaler.
        output_dir (str or Path): folder of the run.
        step (int): optimiser updates done.
        state (TrainingState): what is saved.
        facts (dict): JSON-serialisable facts that `read_state` gives back.
        total_limit (int, optional): checkpoints to keep, this one included; the oldest go once this one is complete.
    Returns:
        Path: the checkpoint.
    Raises:
        NonFiniteError: if a weight is not finite, on every process alike; nothing is written then.
        NoSpaceError: if the disk is full; what was written of this checkpoint is gone again.
    """
    if not all_finite(state.model):
        raise NonFiniteError(f"weights are not finite after update {step}: no checkpoint of them is written")
    output_dir = Path(output_dir)
    final, unfinished = output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}{UNFINISHED}"
    tensors = _tensors(state)
    with space_for(final, sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))):
        try:
            _write(accelerator, unfinished, step, state.lr_scheduler, tensors, facts)
        except BaseException:
            if accelerator.is_main_process and unfinished.exists():
                shutil.rmtree(unfinished)
            raise
    if accelerator.is_main_process:
        if final.exists():  # a damaged one that was passed over
            shutil.rmtree(final)
        unfinished.rename(final)
        # Before older ones go: a machine that fails now has this one.
        sync(output_dir)
        if total_limit is not None:
            # This one stays even among later ones, of a run that was sent back to an earlier checkpoint.
            others = [path for path in find_checkpoints(output_dir) if path != final]
            for path in others[: max(0, len(others) + 1 - total_limit)]:
                logger.info("Deleting %s (`--checkpoints_total_limit %d`)", path, total_limit)
                shutil.rmtree(path)
    accelerator.wait_for_everyone()
    return final


def _write(accelerator, unfinished: Path, step: int, lr_scheduler, tensors: dict[str, Any], facts) -> None:
    """All files of a checkpoint, on the disk, in a folder that is not yet one."""
    if accelerator.is_main_process:
        for leftover in unfinished.parent.glob(f"checkpoint-*{UNFINISHED}"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _one_process_is_no_mistake():
        dcp.save(tensors, checkpoint_id=unfinished / SHARDS_FOLDER)
    index, scaler = accelerator.process_index, accelerator.scaler
    save_accelerator_state(str(unfinished), [], [], [lr_scheduler], [], index, step, scaler)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(unfinished / STATE_FILE, {"step": step, **facts})
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        manifest = {
            path.relative_to(unfinished).as_posix(): {"num_bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            for path in files
        }
        write_json(unfinished / MANIFEST_FILE, manifest)
        for path in (*files, unfinished / MANIFEST_FILE, unfinished / SHARDS_FOLDER, unfinished):
            sync(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `facts` that a checkpoint was saved with, and its `step`.

    Args:
        checkpoint (Path): a finished checkpoint.
    Returns:
        dict: as passed to `save_checkpoint`.
    """
    way_out = "go on from another checkpoint"
    return read_json(checkpoint / STATE_FILE, MISSING_IS_AN_ERROR, keys=["step"], way_out=way_out)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, state: TrainingState) -> None:
    """Restore weights, optimiser, schedule, random states and averages. To be called on every process.

    Checkpoints contain pickles: load only what your own run has written.

    Args:
        accelerator (Accelerator): of the run. The number of processes and the engine may be others than when saving.
        checkpoint (Path): a finished checkpoint.
        state (TrainingState): what is restored, with the same parameters, groups and widths as when saving.
    """
    model, optimizer, lr_scheduler, ema = state
    tensors = _tensors(state)
    with _one_process_is_no_mistake():
        dcp.load(tensors, checkpoint_id=checkpoint / SHARDS_FOLDER)
    set_state_dict(
        model, optimizer.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
    )
    ema.load_state_dict(tensors["ema"])
    set_weight_norms(model, tensors.get("pinned_norms", {}), str(checkpoint))
    # A run may go on in float16 that began without, and then has no scaler yet.
    scaler = accelerator.scaler if (checkpoint / SCALER_NAME).is_file() else None
    load_accelerator_state(str(checkpoint), [], [], [lr_scheduler], [], accelerator.process_index, scaler)


def _tensors(state: TrainingState) -> dict[str, Any]:
    """The live tensors of a run by name; DTensors where it is sharded."""
    model, optimizer, _, ema = state
    return_to_shards(model)
    # The optimiser within Accelerate's: PyTorch fills an empty state by an update by zero, which no scaler should see,
    # and which does not count.
    was_empty = not optimizer.optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer.optimizer)
    if was_empty:
        # Where it counts by a number (bitsandbytes), the state that is saved is another than the optimiser's.
        for of_parameter in (*optimizer_state["state"].values(), *optimizer.optimizer.state.values()):
            # Momentum alone (SGD, Muon) counts nothing; NAdam counts twice.
            for name, start in (("step", 0), ("mu_product", 1)):
                if isinstance(of_parameter.get(name), torch.Tensor):
                    of_parameter[name].fill_(start)
                elif name in of_parameter:
                    of_parameter[name] = start
    tensors = {"model": model_state, "optimizer": optimizer_state, "ema": ema.state_dict()}
    norms = weight_norms(model)
    return {**tensors, "pinned_norms": norms} if norms else tensors


@contextlib.contextmanager
def _one_process_is_no_mistake() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield
