"""A validation: the loss of held-out images and a row of samples, with the first average in the model."""

import argparse
import traceback

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import DataLoader

from ..files import whole_file
from ..pipeline_mpdit import MPDiTPipeline
from .run import Run
from .validation import validation_losses, validation_timesteps


def validate(args: argparse.Namespace, run: Run) -> Exception | None:
    """Loss of the held-out images at fixed noise levels and a row of samples, with the first average in the model.

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
        keys = [(0, position) for position in range(len(run.held_out))]
        batches = DataLoader(run.held_out, sampler=keys, batch_size=args.train_batch_size)
        levels = validation_timesteps(objective, args.num_validation_levels)
        losses = validation_losses(pipeline.transformer, objective, batches, levels, accelerator.device)
        accelerator.log({f"validation/{name}": value for name, value in losses.items()}, step=run.step)
    images = sample_images(args, run, pipeline)
    with whole_file(args.output_dir / "samples" / f"step-{run.step:07d}.png") as unfinished:
        make_image_grid(images, rows=1, cols=len(images)).save(unfinished, format="PNG")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
            tracker.log_images({"validation/samples": stacked}, step=run.step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation/samples": images}, step=run.step)


def sample_images(args: argparse.Namespace, run: Run, pipeline: MPDiTPipeline) -> list[Image.Image]:
    """Ten images at most, one for each of the first classes, in few steps; the same noise at every validation."""
    num_classes, conditions = pipeline.transformer.config.num_classes, {}
    if num_classes is not None:
        conditions["class_labels"] = list(range(min(10, num_classes)))
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
        return pipeline(
            **conditions,
            num_images_per_class=1 if conditions else 10,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            generator=torch.Generator().manual_seed(args.seed),
        ).images
    finally:
        # Snapshots are saved with this pipeline's parts, also after a validation that failed.
        pipeline.scheduler = training_scheduler
