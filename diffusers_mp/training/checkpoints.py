"""Checkpoints of a training run: `checkpoint-N` folders that Accelerate and diffusers both understand."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import ModelMixin

from ..ema import PowerFunctionEMA


logger = get_logger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "training_state.json"
MODEL_FOLDER = "transformer"
EMA_FOLDER = "ema"


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run.

    Args:
        output_dir (str or Path): folder of the run.
    Returns:
        list of Path: `checkpoint-N` folders in the order of N.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(CHECKPOINT_NAME.fullmatch(path.name)[1]))


def resolve_checkpoint(resume_from_checkpoint: str, output_dir: str | Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` asks for.

    Args:
        resume_from_checkpoint (str): "latest", a name in `output_dir`, or a path.
        output_dir (str or Path): folder of the run.
    Returns:
        Path or None: None if "latest" is asked for and there is none yet.
    Raises:
        FileNotFoundError: if the named checkpoint does not exist.
    """
    checkpoints = find_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        return checkpoints[-1] if checkpoints else None
    for path in (Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if (path / STATE_FILE).is_file():
            return path
    raise FileNotFoundError(
        f"`--resume_from_checkpoint` must be 'latest' or a finished checkpoint, got {resume_from_checkpoint!r}; "
        f"{output_dir} has {[path.name for path in checkpoints]}."
    )


def register_model_hooks(accelerator: Accelerator) -> None:
    """Make `save_state` write the model as a diffusers folder, and `load_state` read it from there.

    Args:
        accelerator (Accelerator): its prepared models are single `ModelMixin`s, wrapped or not.
    """

    def save(models, weights, output_dir):
        # Accelerate writes whatever is left in `weights` itself.
        while weights:
            weights.pop()
        if accelerator.is_main_process:
            for model in models:
                accelerator.unwrap_model(model).save_pretrained(Path(output_dir) / MODEL_FOLDER)

    def load(models, input_dir):
        while models:
            model = accelerator.unwrap_model(models.pop())
            stored: ModelMixin = type(model).from_pretrained(input_dir, subfolder=MODEL_FOLDER)
            model.load_state_dict(stored.state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    ema: PowerFunctionEMA,
    state: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Write `checkpoint-<step>`; a folder of that name is always complete. To be called on every process.

    Args:
        accelerator (Accelerator): with `register_model_hooks` done.
        output_dir (str or Path): folder of the run.
        step (int): optimiser updates done.
        ema (PowerFunctionEMA): its averages.
        state (dict): JSON-serialisable facts that `load_checkpoint` gives back.
        total_limit (int, optional): checkpoints to keep, this one included; the oldest go once this one is complete.
    Returns:
        Path: the checkpoint.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    # Written under a name that is no checkpoint's, then renamed: a kill in between leaves nothing that looks finished.
    unfinished = output_dir / f"checkpoint-{step}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    if accelerator.is_main_process:
        ema.save(unfinished / EMA_FOLDER)
        (unfinished / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        if total_limit is not None:
            for path in find_checkpoints(output_dir)[:-total_limit]:
                logger.info("Deleting %s (`--checkpoints_total_limit %d`)", path, total_limit)
                shutil.rmtree(path)
    accelerator.wait_for_everyone()
    return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that a checkpoint was saved with, and its `step`.

    Args:
        checkpoint (Path): a finished checkpoint.
    Returns:
        dict: as passed to `save_checkpoint`.
    """
    return json.loads((checkpoint / STATE_FILE).read_text())


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: PowerFunctionEMA) -> None:
    """Restore model, optimiser, schedule, random states and averages. To be called on every process.

    Accelerate's part of a checkpoint contains pickles: load only what your own run has written.

    Args:
        accelerator (Accelerator): with the same objects prepared as when it was saved.
        checkpoint (Path): a finished checkpoint.
        ema (PowerFunctionEMA): receives the averages.
    """
    accelerator.load_state(str(checkpoint))
    ema.load(checkpoint / EMA_FOLDER)
