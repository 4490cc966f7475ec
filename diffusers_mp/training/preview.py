"""A validation: the loss of held-out images and a sheet of samples, with the first average in the model."""

import argparse
import difflib
import traceback

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..class_labels import ids_by_name, typed_labels
from ..files import whole_file
from ..pipeline_mpdit import MPDiTPipeline
from ..sheets import draw_sheet
from .loading import load_in_order
from .run import Run
from .validation import validation_losses, validation_timesteps


def validate(args: argparse.Namespace, run: Run) -> Exception | None:
    """Loss of the held-out images at fixed noise levels and a sheet of samples, with the first average in the model.

    What went wrong, if anything did, is returned on every process: weeks of updates are saved before it is raised.
    """
    accelerator, pipeline, failure = run.accelerator, run.pipeline, None
    run.ema.copy_to(pipeline.transformer, run.ema.stds[0])
    if accelerator.is_main_process:
        try:
            try:
                pipeline.to(accelerator.device)
                validate_pipeline(args, run, pipeline)
            finally:
                pipeline.to("cpu")
        except Exception as error:
            # Its frames hold tensors, and most often memory is what was wanting.
            traceback.clear_frames(error.__traceback__)
            failure = error
    (has_failed,) = broadcast_object_list([failure is not None])
    return failure or (RuntimeError("validation failed on the main process") if has_failed else None)


def validate_pipeline(args: argparse.Namespace, run: Run, pipeline: MPDiTPipeline) -> None:
    """What the main process does of a validation."""
    accelerator, objective = run.accelerator, run.objective
    if len(run.held_out):
        batches = load_in_order(run.held_out, args.train_batch_size, accelerator.device)
        levels = validation_timesteps(objective, args.num_validation_levels)
        losses = validation_losses(pipeline.transformer, objective, batches, levels, accelerator.device)
        accelerator.log({f"validation/{name}": value for name, value in losses.items()}, step=run.step)
    sheet = sample_sheet(args, run, pipeline)
    with whole_file(args.output_dir / "samples" / f"step-{run.step:07d}.png") as unfinished:
        sheet.save(unfinished, format="PNG")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.asarray(sheet.convert("RGB"))[None]
            tracker.log_images({"validation/samples": stacked}, step=run.step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation/samples": [sheet]}, step=run.step)


def classes_of_samples(labels: list[str] | None, pipeline: MPDiTPipeline) -> list[int] | None:
    """Ids of the classes of which samples are drawn; the first ten if none are asked for, None without classes.

    Args:
        labels (list of str, optional): names, or ids that are no names.
        pipeline (MPDiTPipeline): which knows both.
    Raises:
        ValueError: if there is no such class.
    """
    num_classes = pipeline.transformer.config.num_classes
    if labels is None:
        return None if num_classes is None else list(range(min(10, num_classes)))
    try:
        return pipeline.get_label_ids(typed_labels(labels, pipeline.id2label))
    except ValueError as error:
        raise ValueError(f"{error}".replace("`class_labels`", "`validation_labels`")) from error


def check_classes_of_samples(labels: list[str] | None, id2label: dict[int, str] | None) -> None:
    """Refuse labels that are no classes, before images are encoded; a stream tells its classes at its end only."""
    if not labels or id2label == {}:
        return
    if id2label is None:
        raise ValueError(f"`validation_labels` must be left out for images without classes, got {labels}.")
    names = ids_by_name(id2label)
    for label in typed_labels(labels, id2label):
        if label not in names and not (isinstance(label, int) and label < len(id2label)):
            label = str(label)
            close = difflib.get_close_matches(label, names, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"`validation_labels` must be names or ids of the {len(id2label):,} classes, got {label!r}.{hint}"
            )


def sample_sheet(args: argparse.Namespace, run: Run, pipeline: MPDiTPipeline) -> Image.Image:
    """An image of each class asked for, in few steps, from the same noise at every validation."""
    num_classes, conditions = pipeline.transformer.config.num_classes, {}
    if num_classes is not None:
        conditions["class_labels"] = classes_of_samples(args.validation_labels, pipeline)
    if pipeline.transformer.config.pooled_projection_dim is not None:
        # Those of real samples, with their own labels.
        source = run.held_out if len(run.held_out) else run.samples
        shown = [run.held_out.dataset[int(index)] for index in source.indices[:10]]
        conditions["pooled_projections"] = torch.stack([sample["pooled_projections"] for sample in shown])
        if num_classes is not None:
            conditions["class_labels"] = [sample["label"] for sample in shown]
    pipeline.set_progress_bar_config(disable=True)
    training_scheduler = pipeline.scheduler
    pipeline.scheduler = run.objective.preview_scheduler()
    try:
        images = pipeline(
            **conditions,
            num_images_per_class=1 if conditions else 10,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            generator=torch.Generator().manual_seed(args.seed),
        ).images
    finally:
        # Snapshots are saved with this pipeline's parts, also after a validation that failed.
        pipeline.scheduler = training_scheduler
    labels, names = conditions.get("class_labels"), pipeline.id2label or {}
    captions = None if labels is None else [names.get(label, str(label)) for label in labels]
    return draw_sheet(images, min(5, len(images)), captions=captions)
