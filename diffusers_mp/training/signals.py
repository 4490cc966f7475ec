"""Ending a run in good order when the machine is taken away."""

import signal


class StopRequest:
    """Notes SIGTERM and SIGUSR1, which schedulers of clusters send before they kill, for the loop to act on.

    A context manager for the main thread: it listens inside of the `with` block, after which the former handlers are
    back, whatever ended it. The signal has to reach the process that trains: launchers need not pass it on. Where all
    processes of a job are signalled, workers of a `DataLoader` take `leave_signals_to_main_process`, or they die and
    the run with them.

    Attributes:
        received (str or None): name of the first signal that came.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number, frame):
        self.received = self.received or signal.Signals(number).name

    def __exit__(self, *error) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


def leave_signals_to_main_process(worker_id: int) -> None:
    """What `DataLoader` takes as `worker_init_fn`, for a loop that acts on a `StopRequest`.

    Args:
        worker_id (int): number of the worker, which makes no difference.
    """
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
