"""What a training run consists of, handed from part to part."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..averages.ema import PowerFunctionEMA
from ..pipeline_mpdit import MPDiTPipeline
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
    total_batch_size: int
    max_train_steps: int
    step: int = 0
