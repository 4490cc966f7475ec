"""What a training loop needs beside the model; `examples/train_mpdit.py` puts it together.

Lazy, so that `arguments` answers before anything heavy is imported.
"""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "checkpoints": [
        "TrainingState",
        "check_checkpoint",
        "find_checkpoints",
        "load_checkpoint",
        "read_state",
        "resolve_checkpoint",
        "save_checkpoint",
    ],
    "flow_matching": ["FlowMatchObjective"],
    "loading": ["load_batches", "load_in_order"],
    "objectives": ["DDPMObjective", "Objective"],
    "samples": [
        "StreamBatchSampler",
        "TrainingSamples",
        "conditions_of",
        "hold_out",
        "split_validation",
    ],
    "signals": ["StopRequest", "leave_signals_to_main_process"],
    "tracking": ["JSONLinesTracker"],
    "validation": ["validation_losses", "validation_timesteps"],
    "watchdog": ["NonFiniteError", "Watchdog", "all_finite"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

if TYPE_CHECKING:
    from .checkpoints import TrainingState as TrainingState
    from .checkpoints import check_checkpoint as check_checkpoint
    from .checkpoints import find_checkpoints as find_checkpoints
    from .checkpoints import load_checkpoint as load_checkpoint
    from .checkpoints import read_state as read_state
    from .checkpoints import resolve_checkpoint as resolve_checkpoint
    from .checkpoints import save_checkpoint as save_checkpoint
    from .flow_matching import FlowMatchObjective as FlowMatchObjective
    from .loading import load_batches as load_batches
    from .loading import load_in_order as load_in_order
    from .objectives import DDPMObjective as DDPMObjective
    from .objectives import Objective as Objective
    from .samples import StreamBatchSampler as StreamBatchSampler
    from .samples import TrainingSamples as TrainingSamples
    from .samples import conditions_of as conditions_of
    from .samples import hold_out as hold_out
    from .samples import split_validation as split_validation
    from .signals import StopRequest as StopRequest
    from .signals import leave_signals_to_main_process as leave_signals_to_main_process
    from .tracking import JSONLinesTracker as JSONLinesTracker
    from .validation import validation_losses as validation_losses
    from .validation import validation_timesteps as validation_timesteps
    from .watchdog import NonFiniteError as NonFiniteError
    from .watchdog import Watchdog as Watchdog
    from .watchdog import all_finite as all_finite


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
