"""The start block of a training run: what is trained on what, and what a user is likely to have overlooked."""

import argparse
from typing import Any, NamedTuple

from accelerate import Accelerator

from ..data.images import SourceReport
from ..data.latents import LatentDataset
from ..start_block import class_warnings, class_words, device_warnings, device_words, gibibytes, start_block
from ..transformer_mpdit import MPDiTTransformer2DModel
from .batch_size import RECIPE_BATCH_SIZE, divide_batch
from .memory import activation_bytes, state_bytes
from .model import make_objective
from .objective_arguments import OBJECTIVES
from .samples import num_to_hold_out


class DataSummary(NamedTuple):
    """What a run trains on.

    Attributes:
        num_images (int or None): all of them; None if only the end of a stream will tell.
        counts (dict or None): names of the classes to their images, in the order of the ids; None if unlabelled.
        num_held_out (int or None): of them, for validation.
        num_left_out (int): what could not be read.
    """

    num_images: int | None
    counts: dict[str, int] | None
    num_held_out: int | None
    num_left_out: int = 0

    @classmethod
    def of_latents(cls, latents: LatentDataset, num_held_out: int) -> "DataSummary":
        """Of encoded images."""
        counts = latents.index["num_samples_per_class"]
        if counts is not None:
            counts = {name: counts[str(id_)] for id_, name in latents.id2label.items()}
        return cls(len(latents), counts, num_held_out, len(latents.index["skipped"]))

    @classmethod
    def of_source(
        cls, report: SourceReport, id2label: dict[int, str] | None, num_validation: int | None
    ) -> "DataSummary":
        """Of images that are not encoded yet, as `load_image_dataset` describes them."""
        if report.num_images is None:
            return cls(None, None if id2label is None else dict.fromkeys(id2label.values(), 0), None)
        num_held_out = num_to_hold_out(report.num_images, num_validation)
        if report.counts is not None:
            num_held_out = min(num_held_out, report.num_images - sum(count > 0 for count in report.counts.values()))
        return cls(report.num_images, report.counts, num_held_out, sum(map(len, report.left_out.values())))


def start_of_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: DataSummary,
    model: MPDiTTransformer2DModel,
    learning_rate: float,
    max_train_steps: int | None,
    step: int = 0,
    num_known_classes: int | None = None,
) -> str:
    """The start block of a run.

    Args:
        args (argparse.Namespace): the command line.
        accelerator (Accelerator): of the run.
        data (DataSummary): what is trained on.
        model (MPDiTTransformer2DModel): whole, on any device.
        learning_rate (float): after warm-up.
        max_train_steps (int, optional): updates of the run; None if the end of a stream will tell.
        step (int): those that are done.
        num_known_classes (int, optional): classes that pretrained weights know by name.
    """
    batch, config = divide_batch(args, accelerator.num_processes), model.config
    rows = {
        "device": device_words(accelerator),
        "batch": str(batch),
        "data": _data_words(args, data),
        "model": _model_words(args, model, num_known_classes),
        "objective": _objective_words(args, config),
        "updates": _update_words(args, data, learning_rate, max_train_steps, step),
        "output": _output_words(args),
    }
    num_shards = accelerator.num_processes if accelerator.is_fsdp2 else 1
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    activations = activation_bytes(config, batch.micro, args.gradient_checkpointing)
    state = state_bytes(model, len(args.ema_stds), num_shards, args.optimizer, args.use_8bit_adam)
    rows["memory"] = (
        f"{gibibytes(state)} of weights, gradients, optimiser and {len(args.ema_stds)} averages; "
        f"{gibibytes(num_bytes)} of the model that is validated, in main memory; about {gibibytes(activations)} of "
        f"activations of {batch.micro} images"
    )
    warnings = _warnings(args, data, config, learning_rate, num_known_classes)
    return start_block(rows, device_warnings(accelerator) + warnings)


def recipe_learning_rate(config: dict[str, Any]) -> float:
    """The paper's rate: of rows of norm 1, or of plain weights."""
    return 1e-2 if config["weight_normalization"] else 1e-4


def _data_words(args, data):
    source = args.train_data_dir or args.dataset_name or args.latents_dir or args.output_dir / "latents"
    if data.num_images is None:
        classes = "" if data.counts is None else f" of {len(data.counts) or 'numbered'} classes"
        return f"{source}: a stream{classes}, counted while it is encoded at {args.resolution} pixels"
    return (
        f"{source}: {data.num_images:,} images at {args.resolution} pixels, {class_words(data.counts)}; "
        f"{data.num_held_out:,} held out, {data.num_left_out:,} left out"
    )


def _model_words(args, model, num_known_classes):
    config = model.config
    if args.pretrained_model_name_or_path is not None:
        name = args.pretrained_model_name_or_path
        if num_known_classes is not None:
            name += f" knows {num_known_classes:,} of {config.num_classes:,} classes by name"
    elif args.model_config_name_or_path is not None:
        name = f"config {args.model_config_name_or_path}"
    else:
        name = f"{args.preset}, configuration {args.configuration}"
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{config.in_channels} x {config.sample_size} x {config.sample_size}"
    kind = "pixels" if args.vae == "none" else "latents"
    pins = "" if args.pin_weight_norms is None else f"; the norm of each {args.pin_weight_norms} is pinned"
    return f"{name}; {', '.join(config.modulation)}; {num_parameters:,} parameters, {kind} of {size}{pins}"


def _objective_words(args, config):
    values = {name: getattr(args, name) for name in OBJECTIVES[args.prediction_type]}
    values = {name: value for name, value in values.items() if value is not None}
    if isinstance(values.get("shift"), str):
        values["shift"] += f" ({make_objective(args, config).shift:.4g})"
    return ", ".join([args.prediction_type, *(f"{name} {value}" for name, value in values.items())])


def _update_words(args, data, learning_rate, max_train_steps, step):
    length = f"{args.num_train_epochs} epochs" if max_train_steps is None else f"{max_train_steps:,}"
    if data.num_images is not None:
        passes = max_train_steps * args.total_batch_size / (data.num_images - data.num_held_out)
        length += f" ({passes:,.1f} epochs)"
    start = f", from update {step:,}" if step else ""
    return f"{length}{start}; learning rate {learning_rate:g}, {args.lr_scheduler}"


def _output_words(args):
    parts = [f"{args.logging_dir}/metrics.jsonl each {args.logging_steps:,} updates"]
    if args.validation_steps:
        parts.append(f"samples/ each {args.validation_steps:,}")
    kept = f"the last {args.checkpoints_total_limit} are kept" if args.checkpoints_total_limit else "all are kept"
    parts.append(f"checkpoints each {args.checkpointing_steps:,} ({kept})")
    return f"{args.output_dir}: {', '.join(parts)}"


def _warnings(args, data, config, learning_rate, num_known_classes):
    warnings, is_counted = [], data.num_images is not None
    if data.counts is None:
        if config.pooled_projection_dim is None and args.label_column not in (None, "none"):
            warnings += class_warnings(None)
    elif is_counted:
        warnings += class_warnings(data.counts)
    if num_known_classes == 0:
        warnings.append(
            f"{args.pretrained_model_name_or_path} knows none of the classes by name, and learns all of them anew"
        )
    if is_counted:
        num_trained = data.num_images - data.num_held_out
        wanted = num_to_hold_out(data.num_images, args.num_validation_images)
        if data.num_held_out < wanted:
            warnings.append(f"{data.num_held_out:,} images are held out and not {wanted:,}: each class keeps its last")
        if args.total_batch_size > num_trained:
            warnings.append(f"an update has {args.total_batch_size:,} images, more than the {num_trained:,} there are")
    width = config.num_attention_heads * config.attention_head_dim
    token = config.in_channels * config.patch_size**2
    if args.vae != "none" and width < token:
        warnings.append(
            f"the model is {width:,} wide and its tokens have {token:,} numbers: a narrower model cannot learn them "
            "(RAE, arXiv 2510.11690)"
        )
    if args.total_batch_size != RECIPE_BATCH_SIZE:
        warnings.append(
            f"an update has {args.total_batch_size:,} images, the recipe's {RECIPE_BATCH_SIZE}, to which its learning "
            "rate belongs"
        )
    usual = recipe_learning_rate(config)
    is_new = args.pretrained_model_name_or_path is None  # fine-tuning takes lower ones
    if is_new and not usual / 10 < learning_rate < usual * 10:
        kind = "weights of norm 1" if config.weight_normalization else "plain weights"
        warnings.append(f"the learning rate is {learning_rate:g}, the recipe's for {kind} is {usual:g}")
    return warnings
