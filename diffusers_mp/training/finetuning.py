"""What `examples/finetune_rotation.py` says before its updates and after them."""

import argparse
from typing import Any

from accelerate import Accelerator

from ..start_block import class_warnings, class_words, device_warnings, device_words, start_block
from .batch_size import divide_batch
from .summary import DataSummary
from .verdict import sampling_command


def start_of_finetuning(
    args: argparse.Namespace, accelerator: Accelerator, data: DataSummary, num_parameters: int
) -> str:
    """The start block.

    Args:
        args (argparse.Namespace): the command line.
        accelerator (Accelerator): of the run.
        data (DataSummary): what is trained on.
        num_parameters (int): of the base's transformer.
    """
    epochs = args.max_train_steps * args.total_batch_size / (data.num_images - data.num_held_out)
    swap = "nothing is swapped" if args.swap == "none" else f"swap {args.swap} in {', '.join(args.sublayers)}"
    rows = {
        "device": device_words(accelerator),
        "batch": str(divide_batch(args, accelerator.num_processes)),
        "data": f"{args.train_data_dir or args.dataset_name}: {data.num_images:,} images, {class_words(data.counts)}; "
        f"{data.num_held_out:,} held out, {data.num_left_out:,} left out",
        "model": f"{args.pretrained_model_name_or_path}: {num_parameters:,} parameters, of which {args.train} are "
        f"trained; {swap}",
        "objective": "predictions of the untouched model" if args.distillation else "noise",
        "updates": f"{args.max_train_steps:,} ({epochs:,.1f} epochs); learning rate {args.learning_rate:g}, "
        f"{args.lr_scheduler}",
        "output": f"{args.output_dir}: logs/metrics.jsonl each {args.logging_steps:,} updates, evaluation.json; no "
        "checkpoints",
    }
    return start_block(rows, device_warnings(accelerator) + class_warnings(data.counts))


def verdict_of_finetuning(args: argparse.Namespace, record: dict[str, Any]) -> str:
    """How the loss of held-out images compares with before, where the result is, and what comes next.

    Args:
        args (argparse.Namespace): the command line.
        record (dict): as `evaluation.json` has it.
    """
    before, after_swap, final = (record[stage]["loss"] for stage in ("before", "after_swap", "final"))
    share = record["num_parameters"]["after"] / record["num_parameters"]["before"] - 1
    folder = str(args.output_dir)
    lines = [
        f"{args.max_train_steps:,} updates: loss of held-out images {final:.4f}, before {before:.4f} "
        f"({final / before - 1:+.1%}), right after the swap {after_swap:.4f}; parameters {share:+.1%}"
    ]
    if args.save == "adapter":
        return "\n".join(
            [
                *lines,
                f"Saved the adapter to {folder}",
                f"Next, with the base's pipeline: load_rotation_adapter(pipeline.transformer, {folder!r})",
            ]
        )
    imports = "import diffusers_mp; from diffusers import DiTPipeline"
    command = sampling_command(imports, "DiTPipeline", args.output_dir, "[0]")
    return "\n".join([*lines, f"Saved the pipeline to {folder}", f"Next, an image of it: {command}"])
