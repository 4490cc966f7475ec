"""What `examples/finetune_rotation.py` measures and says before its updates and after them."""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn

from ..data.feeding import to_device
from ..start_block import class_warnings, class_words, device_warnings, device_words, start_block
from .batch_size import divide_batch
from .loading import load_in_order
from .objectives import Objective
from .samples import TrainingSamples
from .summary import DataSummary
from .validation import validation_losses, validation_timesteps
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


def check_blocks(transformer: nn.Module) -> None:
    """Refuse files with more blocks than the config describes, which diffusers leaves out with a warning.

    Raises:
        ValueError: naming the first of them.
    """
    known, left_out = transformer.state_dict().keys(), set()
    for path in Path(transformer.config.get("_name_or_path") or "nowhere").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            left_out |= {name for name in file.keys() if name.startswith("transformer_blocks.")} - known
    if left_out:
        raise ValueError(
            "the weights must be those that the transformer's config.json describes, it leaves out "
            f"{len(left_out)}, such as {min(left_out)}."
        )


class HeldOut:
    """Held-out images with noise that is always the same, at fixed noise levels.

    Args:
        args (argparse.Namespace): with `num_validation_levels` and `train_batch_size`.
        samples (TrainingSamples): the images.
        objective (Objective): of the base.
        device (torch.device): that its transformer is on.
    """

    def __init__(self, args: argparse.Namespace, samples: TrainingSamples, objective: Objective, device: torch.device):
        self.objective = objective
        self.levels = validation_timesteps(objective, args.num_validation_levels)
        self.batches = load_in_order(samples, args.train_batch_size, device)

    def losses(self, model: nn.Module) -> dict[str, float]:
        """`loss`, `mse`, and the latter by noise level."""
        return validation_losses(model.eval(), self.objective, self.batches, self.levels, model.device)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, teacher: nn.Module) -> dict[str, float]:
        """These, and `relative_error`: |noise - teacher's noise|² / |teacher's noise|², of predictions, summed."""
        measures, error, power = self.losses(model), 0.0, 0.0
        for batch in self.batches:
            batch = to_device(batch, model.device)
            clean, noise, labels = (batch[name] for name in ("latents", "noise", "class_label"))
            for level in self.levels.tolist():
                timesteps = torch.full_like(labels, level)
                inputs = (self.objective.add_noise(clean, noise, timesteps), timesteps, labels)
                ours, theirs = (each(*inputs).sample[:, : clean.shape[1]].double() for each in (model, teacher))
                error += (ours - theirs).square().sum().item()
                power += theirs.square().sum().item()
        return {**measures, "relative_error": error / power}
