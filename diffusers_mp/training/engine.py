"""What runs a script: processes that found each other, an engine that is supported, a folder for one run alone."""

import argparse
import contextlib
import datetime
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from .arguments import LOCK_NAME
from .batch_size import divide_batch
from .tracking import JSONLinesTracker


def start(args: argparse.Namespace, logging_dir: Path) -> tuple[Accelerator, JSONLinesTracker]:
    """Accelerate, checked to be what was asked for, and the curve that every run keeps.

    Args:
        args (argparse.Namespace): with `mixed_precision`, `report_to`, `output_dir`, `seed`, and the flags of the
            batch, which become what they mean on so many processes; perhaps with `allow_tf32`, `deterministic` and
            `compile`, which becomes what it means on this device.
        logging_dir (Path): folder of the curve and of what other trackers write.
    Raises:
        RuntimeError: see `check_engine`.
    """
    curve = JSONLinesTracker(logging_dir)
    # The main process alone validates, saves and publishes; NCCL by itself waits ten minutes for it.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=[curve] if args.report_to == "none" else [curve, args.report_to],
        project_config=ProjectConfiguration(project_dir=str(args.output_dir), logging_dir=str(logging_dir)),
        kwargs_handlers=[patience],
    )
    check_engine(accelerator, getattr(args, "use_8bit_adam", False), bool(getattr(args, "compile", None)))
    batch = divide_batch(args, accelerator.num_processes)
    share = batch.total // batch.processes
    if batch.micro < min(share, args.train_batch_size):
        accelerator.print(
            f"--train_batch_size {args.train_batch_size} becomes {batch.micro}, the most that divides the {share} "
            "samples that an update has for each process"
        )
    args.total_batch_size, args.train_batch_size = batch.total, batch.micro
    args.gradient_accumulation_steps = accelerator.gradient_accumulation_steps = batch.accumulation
    if accelerator.is_fsdp2:
        # Accelerate's policy rounds weights and timesteps to half precision. Autocast computes as under the other
        # engines: rows are normalised, and gradients summed, in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    set_seed(args.seed)
    _set_kernels(args, accelerator)
    return accelerator, curve


def _set_kernels(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """What PyTorch multiplies with, and whether twice the same; whether blocks are compiled."""
    torch.backends.cuda.matmul.allow_tf32 = getattr(args, "allow_tf32", False)
    is_deterministic = getattr(args, "deterministic", False)
    torch.use_deterministic_algorithms(is_deterministic)
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    if getattr(args, "compile", None) is None:
        args.compile = accelerator.device.type == "cuda" and not accelerator.is_fsdp2


def check_processes(accelerator: Accelerator, consequence: str) -> None:
    """Refuse processes that did not find each other.

    Args:
        accelerator (Accelerator): of this process.
        consequence (str): what each process would do by itself, for the message.
    Raises:
        RuntimeError: if the launcher started another number of processes than Accelerate knows.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"launched as {launched} processes, but Accelerate runs {accelerator.num_processes}: each would "
            f"{consequence}. Without accelerators, use `ACCELERATE_USE_CPU=1 torchrun`."
        )


def check_engine(accelerator: Accelerator, use_8bit_adam: bool = False, is_compiled: bool = False) -> None:
    """Refuse what is not supported, or was asked for and not given: Accelerate says nothing about it."""
    check_processes(accelerator, "train a model of its own in the same folder")
    asked_for = [
        engine
        for engine in ("DEEPSPEED", "MEGATRON_LM", "FSDP")
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1")
    ]
    if asked_for and asked_for[0] != "FSDP":
        raise RuntimeError(
            f"{asked_for[0]} was asked for, but this trainer runs on one process, DDP or FSDP2: shard a large model "
            "with `--use_fsdp --fsdp_version 2`."
        )
    if asked_for and accelerator.distributed_type != DistributedType.FSDP:
        raise RuntimeError(
            f"FSDP was asked for, but Accelerate chose {accelerator.distributed_type.value}: it shards on several "
            "accelerators only. Launch without it."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RuntimeError(
            "FSDP version 1 was asked for, which flattens parameters and has no rows to normalise: launch with "
            "`--fsdp_version 2`."
        )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise RuntimeError(
            "`--fsdp_activation_checkpointing` renames parameters, and checkpoints would fit no other engine: use "
            "the trainer's own `--gradient_checkpointing`."
        )
    if accelerator.is_fsdp2 and use_8bit_adam:
        raise RuntimeError(
            "`--use_8bit_adam` was asked for under FSDP2, whose shards bitsandbytes does not take: leave out one of "
            "the two."
        )
    if accelerator.is_fsdp2 and is_compiled:
        raise RuntimeError("`--compile` was asked for under FSDP2, which was not tried: leave out one of the two.")
    if accelerator.mixed_precision == "fp8":
        raise RuntimeError(
            "fp8 was asked for, by `accelerate launch` or `accelerate config`, which puts other linear maps in the "
            "place of those with unit rows: train in bf16, with `--mixed_precision bf16`."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise RuntimeError(
            "`--mixed_precision fp16` was asked for, which Accelerate leaves out on this device "
            f"({accelerator.device.type}): use `no` or `bf16`."
        )
    if "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in os.environ:
        raise RuntimeError(
            "accumulation follows from `--total_batch_size`, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set in the "
            f"environment, to {os.environ['ACCELERATE_GRADIENT_ACCUMULATION_STEPS']}: unset it."
        )


@contextlib.contextmanager
def lock_folder(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """The folder for this run alone, until the block ends or the process does, however it does; or all are refused."""
    refusal = [None]
    with contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((output_dir / LOCK_NAME).open("a+"))
            try:
                # Not flock, whose lock workers inherit: they outlive a trainer that is killed by some seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                refusal = [
                    f"`--output_dir` must be a folder that no other trainer is at work in, {output_dir} is in use by "
                    f"{file.read().strip() or 'another process'}: give another folder, or end that process first."
                ]
            except OSError as error:
                accelerator.print(f"{output_dir} cannot be locked ({error}): start no second trainer in it")
            else:
                file.truncate(0)
                print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
        if broadcast_object_list(refusal)[0] is not None:
            raise RuntimeError(refusal[0])
        yield
