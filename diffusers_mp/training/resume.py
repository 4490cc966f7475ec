"""How a run goes on: what it goes on from, what must not change, and what a former try left of updates to come."""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ..averages.snapshots import discard_snapshots_after
from ..data.latents import LatentDataset
from ..files import read_json, remove_unfinished, write_json
from ..optimization import scale_learning_rate
from ..publishing.hub import public_arguments
from ..transformer_mpdit import MPDiTTransformer2DModel
from .arguments import LOCK_NAME, OPTIMIZER_FLAGS
from .checkpoints import find_checkpoints, load_checkpoint, read_state, resolve_checkpoint
from .model import Pretrained
from .objective_arguments import OBJECTIVE_FLAGS
from .run import Run
from .summary import recipe_learning_rate
from .tracking import JSONLinesTracker, tracker_options


logger = get_logger(__name__)


def checkpoint_to_resume(args: argparse.Namespace, accelerator: Accelerator, curve: JSONLinesTracker) -> Path | None:
    """What the run is to go on from; None for a new run, which says so where one was to be resumed."""
    if args.resume_from_checkpoint is None:
        return None
    # What else is in a folder without this file is somebody's, whose README.md the run would replace.
    former = args.output_dir / "training_arguments.json"
    found = (
        [] if former.is_file() or not args.output_dir.is_dir() else [path.name for path in args.output_dir.iterdir()]
    )
    others = sorted(
        name for name in found if name not in ("latents", LOCK_NAME) and not name.startswith("checkpoint-")
    )
    if others:
        raise ValueError(
            f"`--resume_from_checkpoint` must go on in the folder of a run or in an empty one: {args.output_dir} has "
            f"{others[0]} but no {former.name}. Give another `--output_dir`."
        )
    if accelerator.is_main_process and not args.dry_run:
        # The room that a former try has lost: to a kill, or to a disk that was full.
        for folder in (args.output_dir, args.output_dir / args.logging_dir, args.output_dir / "ema_snapshots"):
            remove_unfinished(folder)
    checkpoint = _resolved_by_one(args, accelerator)
    if checkpoint is None:
        if (args.output_dir / "model_index.json").is_file():
            raise ValueError(
                f"`--resume_from_checkpoint latest` must find a checkpoint where a run has ended: {args.output_dir} "
                "has its pipeline (model_index.json) but no checkpoint, and a new run would delete its log and its "
                "snapshots. Give another `--output_dir`."
            )
        # As the former try was called: this one may want them more often.
        way_out = "remove it, and a run without a checkpoint begins anew"
        due = read_json(former, {}, way_out=way_out).get("checkpointing_steps", args.checkpointing_steps)
        if curve.last_step > due:
            raise ValueError(
                f"`--resume_from_checkpoint latest` must find a checkpoint where a run has come to update "
                f"{curve.last_step:,}: {args.output_dir} has its log, but no checkpoint, and a new run would delete "
                "log and snapshots. Bring the checkpoints back, or give another `--output_dir`."
            )
        accelerator.print(f"No checkpoint in {args.output_dir} yet, starting from the beginning")
    return checkpoint


def _resolved_by_one(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """`resolve_checkpoint` by the main process for all, since it reads checkpoints to their end; or all refuse."""
    found = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
        except (OSError, ValueError) as error:
            found[1] = error
    checkpoint, refusal = broadcast_object_list(found)
    if refusal is not None:
        raise refusal
    return checkpoint


def run_facts(
    args: argparse.Namespace,
    model: MPDiTTransformer2DModel,
    latents: LatentDataset,
    pretrained: Pretrained | None,
    num_train_samples: int,
    max_train_steps: int,
) -> dict[str, Any]:
    """What makes this run this run: kept with its checkpoints, and what a resumed one has to agree with."""
    vae = latents.index["vae"]
    learning_rate, lr_warmup_steps, lr_constant_steps = (
        args.learning_rate,
        args.lr_warmup_steps,
        args.lr_constant_steps,
    )
    if learning_rate is None:
        learning_rate = recipe_learning_rate(model.config)
    return {
        "seed": args.seed,
        "total_batch_size": args.total_batch_size,
        "num_train_samples": num_train_samples,
        "random_flip": args.random_flip,
        "learning_rate": learning_rate,
        "lr_scheduler": args.lr_scheduler,
        "lr_warmup_steps": max_train_steps // 150 if lr_warmup_steps is None else lr_warmup_steps,
        "lr_constant_steps": max(1, max_train_steps // 10) if lr_constant_steps is None else lr_constant_steps,
        "ema_stds": args.ema_stds,
        "ema_update_steps": args.ema_update_steps,
        **{name: getattr(args, name) for name in OPTIMIZER_FLAGS},
        **{name: getattr(args, name) for name in ("prediction_type", "pin_weight_norms", *OBJECTIVE_FLAGS)},
        **{f"model.{name}": value for name, value in model.config.items() if not name.startswith("_")},
        # What was encoded and not the latents, whose last bits are a device's own.
        "images_sha256": latents.index["rows_sha256"],
        "vae_weights_sha256": None if vae is None else vae["weights_hash"],
        # Ids mean other classes in other data, while the label table fits.
        "id2label_sha256": hashlib.sha256(json.dumps(latents.id2label).encode()).hexdigest(),
        "pretrained_weights_sha256": None if pretrained is None else pretrained.weights_sha256,
    }


def resumed_facts(checkpoint: Path, facts: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Facts of the run as its checkpoint has them; refuses a command line that would make it another run."""
    state = read_state(checkpoint)
    stored = {name: state.get(name) for name in facts}
    # The lengths that follow from --max_train_steps stay what they were, so that a longer run keeps its rates. Another
    # learning rate is applied once the checkpoint is loaded.
    kept = [name for name in ("lr_warmup_steps", "lr_constant_steps") if getattr(args, name) is None]
    wanted = {**facts, **{name: stored[name] for name in [*kept, "learning_rate"]}}
    differences = [f"{name} {stored[name]} (now {wanted[name]})" for name in facts if stored[name] != wanted[name]]
    if differences:
        raise ValueError(
            f"`--resume_from_checkpoint` must go on with the run of {checkpoint}, which has {', '.join(differences)}."
        )
    return stored


def resume(args: argparse.Namespace, run: Run, checkpoint: Path) -> None:
    """Go on where a checkpoint was left, with another learning rate if one is given."""
    stored = read_state(checkpoint)
    step, run.norm_watch = stored["step"], stored.get("norm_watch")
    if step > run.max_train_steps:
        raise ValueError(
            f"`max_train_steps` must be at least {step:,}, the updates that {checkpoint} has seen, got "
            f"{run.max_train_steps:,}: to go back, resume from an earlier checkpoint."
        )
    run.accelerator.print(f"Resuming from {checkpoint}")
    load_checkpoint(run.accelerator, checkpoint, run.state)
    run.step = step
    former = run.facts["learning_rate"]
    if args.learning_rate is not None and args.learning_rate != former:
        run.accelerator.print(f"Learning rate {former:g} of the checkpoint, now {args.learning_rate:g}")
        scale_learning_rate(run.optimizer, run.lr_scheduler, args.learning_rate / former)
        run.facts["learning_rate"] = args.learning_rate


def clear_what_comes_again(args: argparse.Namespace, run: Run) -> None:
    """Drop what a former try left of the updates to come, and note how this one was called."""
    run.curve.discard_after(run.step)
    arguments = public_arguments(vars(args))
    if run.accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        discard_snapshots_after(args.output_dir / "ema_snapshots", run.step)
        for later in find_checkpoints(args.output_dir):
            # Of updates that are made again now: `latest` must not go on from them after a kill.
            if int(later.name.partition("-")[2]) > run.step:
                abandoned = later.with_name(f"{later.name}.abandoned")
                shutil.rmtree(abandoned, ignore_errors=True)
                later.rename(abandoned)
                logger.warning("%s is of updates that come again, and is kept as %s", later.name, abandoned.name)
        plain = json.loads(json.dumps(arguments, default=str))
        write_json(args.output_dir / "training_arguments.json", plain)
    project, init_kwargs = tracker_options(args, run.step)
    config = {name: str(value) for name, value in arguments.items()}
    run.accelerator.init_trackers(project, config=config, init_kwargs=init_kwargs)
