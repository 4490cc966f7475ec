"""What a run shows and logs while it is under way: loss, learning rate, gradient norm, speed, time left."""

import argparse
import contextlib
import math
import time
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm

from .run import Run


class Progress:
    """A bar, and an entry of the log for the updates since the entry before.

    Args:
        args (argparse.Namespace): the command line.
        run (Run): with the update from which it goes on.
    """

    def __init__(self, args: argparse.Namespace, run: Run):
        self.args, self.run = args, run
        self.bar = tqdm(
            desc="Training",
            total=run.max_train_steps,
            initial=run.step,
            disable=not run.accelerator.is_local_main_process,
        )
        self._losses, self._grad_norm, self._learning_rate = [], None, None
        self._start = time.perf_counter()

    def add(self, losses: list[torch.Tensor], grad_norm: torch.Tensor | None) -> None:
        """Note an update before its schedule goes on. Reads nothing from the device.

        Args:
            losses (list of torch.Tensor): of its micro batches on this process.
            grad_norm (torch.Tensor, optional): of its whole gradient, before clipping; None for a skipped update. One
                that the device skips has values that are not finite, and is left out as well.
        """
        lr_scheduler = self.run.lr_scheduler
        # Groups have rates of different size that follow one schedule.
        factor = lr_scheduler.get_last_lr()[0] / lr_scheduler.base_lrs[0]
        self._learning_rate = self.run.facts["learning_rate"] * factor
        if grad_norm is not None:
            is_finite = torch.stack([grad_norm.isfinite(), *(loss.isfinite() for loss in losses)]).all()
            self._losses += [torch.where(is_finite, loss, math.nan) for loss in losses]
            last = grad_norm if self._grad_norm is None else self._grad_norm
            self._grad_norm = torch.where(is_finite, grad_norm, last)
        self.bar.update()

    def log(self) -> None:
        """Mean loss and speed since the last entry, rate and gradient norm of the last update; none after skips alone.

        To be called on every process.
        """
        if not self._losses:
            return
        accelerator, seconds = self.run.accelerator, time.perf_counter() - self._start
        loss = accelerator.reduce(torch.stack(self._losses).nanmean(), reduction="mean")
        loss, grad_norm = torch.stack([loss, self._grad_norm.to(loss)]).tolist()  # one read of the device
        images_per_second = len(self._losses) * self.args.train_batch_size * accelerator.num_processes / seconds
        self._losses, self._start = [], time.perf_counter()
        if math.isnan(loss):  # of updates that were all skipped
            return
        shown = f"loss={loss:.4f}, lr={self._learning_rate:.2g}, grad_norm={grad_norm:.3g}"
        self.bar.set_postfix_str(f"{shown}, images/s={images_per_second:.0f}")
        entry = {
            "train/loss": loss,
            "train/learning_rate": self._learning_rate,
            "train/grad_norm": grad_norm,
            "train/images_per_second": images_per_second,
        }
        accelerator.log(entry, step=self.run.step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is no training does not count in its speed."""
        pause = time.perf_counter()
        yield
        self._start += time.perf_counter() - pause
