"""The batch of an update as micro batches: the same samples, however many processes share them."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from ..arguments import at_least


# Of arXiv 2505.19122: learning rate, its decay and the number of updates are for this many images an update.
RECIPE_BATCH_SIZE = 256


class BatchDivision(NamedTuple):
    """total = micro x processes x accumulation.

    Attributes:
        total (int): samples of an update.
        micro (int): samples of a process and micro batch.
        processes (int): how many share an update.
        accumulation (int): micro batches of a process and update.
    """

    total: int
    micro: int
    processes: int
    accumulation: int

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.total:,} images an update = {self.micro} x {processes} x {self.accumulation} accumulated"


def add_batch_arguments(add: Callable[..., Any], default: int) -> None:
    """How many samples make an update, and how many of them are in memory at once."""
    add("--total_batch_size", type=at_least(1), help=f"samples of an update, over all processes [{default}]")
    add(
        "--train_batch_size",
        type=at_least(1),
        help="at most so many samples of a process at once; accumulation follows [its whole share]",
    )
    add(
        "--gradient_accumulation_steps",
        type=at_least(1),
        help="instead of total_batch_size: an update is train_batch_size x processes x this",
    )


def check_batch_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser, default: int) -> None:
    """Refuse an update that is said in two ways, or by half; fill in what is left out."""
    if args.gradient_accumulation_steps is None:
        args.total_batch_size = args.total_batch_size or default
        args.train_batch_size = args.train_batch_size or args.total_batch_size
    elif args.total_batch_size is not None:
        parser.error(
            "give one of --total_batch_size, from which accumulation follows, and --gradient_accumulation_steps"
        )
    elif args.train_batch_size is None:
        parser.error("--gradient_accumulation_steps needs --train_batch_size beside it; or give --total_batch_size")


def divide_batch(args: argparse.Namespace, num_processes: int) -> BatchDivision:
    """What the flags of `add_batch_arguments` mean on so many processes.

    Args:
        args (argparse.Namespace): with those flags, checked by `check_batch_arguments`.
        num_processes (int): of the run.
    Returns:
        BatchDivision: with the largest micro batch that `train_batch_size` allows.
    Raises:
        ValueError: if the processes cannot share `total_batch_size` equally.
    """
    if args.gradient_accumulation_steps is not None:
        micro, accumulation = args.train_batch_size, args.gradient_accumulation_steps
        return BatchDivision(micro * num_processes * accumulation, micro, num_processes, accumulation)
    share, rest = divmod(args.total_batch_size, num_processes)
    if rest or not share:
        nearest = [size * num_processes for size in (share, share + 1) if size]
        raise ValueError(
            f"`total_batch_size` must be a multiple of the number of processes, {num_processes}, got "
            f"{args.total_batch_size}: {' or '.join(map(str, nearest))} would do."
        )
    micro = next(size for size in range(min(share, args.train_batch_size), 0, -1) if share % size == 0)
    return BatchDivision(args.total_batch_size, micro, num_processes, share // micro)
