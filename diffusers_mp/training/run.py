"""What a training run consists of, handed from part to part, and how long it is."""

import argparse
import math
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..averages.ema import PowerFunctionEMA
from ..pipeline_mpdit import MPDiTPipeline
from .checkpoints import TrainingState
from .objectives import Objective
from .samples import TrainingSamples
from .tracking import JSONLinesTracker


@dataclass
class Run:
    """What the parts of the trainer share."""

    accelerator: Accelerator
    curve: JSONLinesTracker
    samples: TrainingSamples
    held_out: TrainingSamples
    objective: Objective
    model: nn.Module  # as the engine wants it called
    transformer: nn.Module  # the same without wrappers; its parameters may be shards
    optimizer: AcceleratedOptimizer
    lr_scheduler: LRScheduler
    ema: PowerFunctionEMA
    pipeline: MPDiTPipeline  # with a whole model for the averages, which only the main process has
    facts: dict  # what makes this run this run
    max_train_steps: int
    step: int = 0
    norm_watch: dict | None = None  # of the checkpoint from which the run goes on

    @property
    def state(self) -> TrainingState:
        """What its checkpoints hold."""
        return TrainingState(self.transformer, self.optimizer, self.lr_scheduler, self.ema)


def run_length(args: argparse.Namespace, num_train_samples: int | None) -> int:
    """Number of updates.

    Raises:
        ValueError: if the run ends before the averages are updated once.
    """
    max_train_steps = 400_000 if args.max_train_steps is None else args.max_train_steps
    if args.num_train_epochs is not None:
        max_train_steps = math.ceil(args.num_train_epochs * num_train_samples / args.total_batch_size)
        if max_train_steps >= 2**31:
            raise ValueError(f"`num_train_epochs` must give less than 2**31 updates, got {max_train_steps:.3g}.")
    if args.ema_update_steps > max_train_steps:
        raise ValueError(
            f"`--ema_update_steps` must be at most the number of updates, {max_train_steps}, or the averages stay at "
            f"the initial weights, and so does the pipeline; got {args.ema_update_steps}."
        )
    return max_train_steps
