"""What the experiments share: the scripts of examples/, which they run as they are, a model for digits, its loss."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from diffusers_mp.training import (
    DDPMObjective,
    TrainingSamples,
    hold_out,
    load_in_order,
    validation_losses,
    validation_timesteps,
)


BENCHMARKS = Path(__file__).resolve().parents[1]
EXAMPLES = BENCHMARKS.parent / "examples"
sys.path += [str(EXAMPLES), str(BENCHMARKS / "speed")]

import demo  # noqa: E402, F401
import finetune_rotation  # noqa: E402, F401
import train_mpdit  # noqa: E402, F401
from facts import facts_of_run, head, table  # noqa: E402, F401


MODEL = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32, "patch_size": 2}


def run_trainer(folder, options):
    """Run train_mpdit.py with these flags, from its last checkpoint, unless what it leaves is in `folder`.

    Raises:
        RuntimeError: if it was stopped.
    """

    def has_ended():
        return (folder / "model_index.json").is_file() or (folder / "non_finite").is_dir()

    if not has_ended():
        options = {**options, "--output_dir": folder, "--resume_from_checkpoint": "latest"}
        words = [EXAMPLES / "train_mpdit.py", *sum(options.items(), ())]
        status = subprocess.run([sys.executable, *map(str, words)]).returncode
        if not has_ended():
            raise RuntimeError(f"the run in {folder} left with status {status}; start again to go on with it")


def read_log(folder):
    """What a run has logged: a dict for each entry."""
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def held_out_losses(transformer, scheduler, latents, num_held_out, seed=0, num_levels=8):
    """What the trainer logs as `validation/…`, of any model.

    Args:
        transformer (MPDiTTransformer2DModel): in evaluation mode.
        scheduler (DDPMScheduler): of training.
        latents (LatentDataset): the encoded training part of the digits.
        num_held_out, seed (int): of the run, which say what was held out.
        num_levels (int): noise levels, the trainer's by default.
    Returns:
        dict[str, float]: `loss`, `mse` and `mse_t<timestep>`.
    """
    _, held_out = hold_out(latents, num_held_out, seed)
    samples = TrainingSamples(latents, seed=seed, num_classes=len(latents.id2label), indices=held_out)
    objective = DDPMObjective(scheduler)
    batches = load_in_order(samples, 64, torch.device("cpu"))
    levels = validation_timesteps(objective, num_levels)
    return validation_losses(transformer, objective, batches, levels, torch.device("cpu"))
