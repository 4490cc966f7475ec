"""Checkpoints of a training run: `checkpoint-N` folders that Accelerate and diffusers both understand.

    checkpoint-N/manifest.json         size and SHA-256 of every other file; written last
    checkpoint-N/training_state.json   the step, and what must not change when the run goes on
    checkpoint-N/transformer/          the raw model, a diffusers folder
    checkpoint-N/ema/                  the averages
    checkpoint-N/optimizer.bin, …      Accelerate's own: optimiser, schedule, random states

A folder of that name is complete: it is written as `checkpoint-N.unfinished` and then renamed.
"""

import hashlib
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
MANIFEST_FILE = "manifest.json"
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


def check_checkpoint(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest.

    Args:
        checkpoint (Path): a `checkpoint-N` folder.
    Returns:
        str or None: what is wrong with it, naming the file; None if nothing is.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["num_bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['num_bytes']}"
        if _sha256(path) != expected["sha256"]:
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
                accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(
                    Path(output_dir) / MODEL_FOLDER
                )

    def load(models, input_dir):
        while models:
            model = accelerator.unwrap_model(models.pop(), keep_torch_compile=False)
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
    final, unfinished = output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}.unfinished"
    if accelerator.is_main_process:
        for leftover in output_dir.glob("checkpoint-*.unfinished"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ema.save(unfinished / EMA_FOLDER)
        (unfinished / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        manifest = {
            path.relative_to(unfinished).as_posix(): {"num_bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in files
        }
        (unfinished / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        if final.exists():  # a damaged one that was passed over
            shutil.rmtree(final)
        unfinished.rename(final)
        if total_limit is not None:
            for path in find_checkpoints(output_dir)[:-total_limit]:
                logger.info("Deleting %s (`--checkpoints_total_limit %d`)", path, total_limit)
                shutil.rmtree(path)
    accelerator.wait_for_everyone()
    return final


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
