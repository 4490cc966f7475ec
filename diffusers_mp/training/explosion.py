"""A loss that explodes, but stays finite: by the losses of the updates before, numbers that the host has anyway."""

import math
import statistics
from collections import deque


# Above so many times the median of so many updates, for so many updates running.
FACTOR, WINDOW, PATIENCE = 10, 100, 20
# A median below this counts as this: of samples of RMS 1, rounding in bfloat16 alone makes a larger squared error, and
# what a model knows by heart may double or halve for no reason.
SMALLEST_MEDIAN = 1e-6


class LossHistory:
    """The losses of the last updates, and whether they tell of an explosion.

    Nothing is said of the first `WINDOW` updates, of a resumed run either, nor of an explosion that goes on. A single
    batch that is hard does nothing; a loss that stays where it has risen to becomes the median.

    Attributes:
        losses (deque of float): of the last `WINDOW` updates.
    """

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self._num_above = 0

    def add(self, loss: float) -> float | None:
        """Take in the loss of an update.

        Args:
            loss (float): finite.
        Returns:
            float or None: the median that it is above `FACTOR` times of, if it is the update number `PATIENCE` running
            that is; None otherwise.
        """
        median = statistics.median(self.losses) if len(self.losses) == WINDOW else math.inf
        self._num_above = self._num_above + 1 if loss > FACTOR * max(median, SMALLEST_MEDIAN) else 0
        self.losses.append(loss)
        return median if self._num_above == PATIENCE else None
