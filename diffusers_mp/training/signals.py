"""Ending a run in good order when the machine is taken away, or its user presses Ctrl+C."""

import os
import signal


class StopRequest:
    """Notes Ctrl+C, and SIGTERM and SIGUSR1, which clusters' schedulers send before they kill, for the loop to act on.

    A context manager for the main thread: it listens inside of the `with` block, after which the former handlers are
    back, whatever ended it. The signal has to reach the process that trains: launchers need not pass it on. Where all
    processes of a job are signalled, as by Ctrl+C, workers of a `DataLoader` take `leave_signals_to_main_process`, or
    they die and the run with them. The first Ctrl+C prints a line; the second raises `SystemExit(130)` at once. Where
    SIGINT is ignored, as in background jobs of a shell's script, it stays ignored.

    Args:
        when (str): when the loop will act, for the line of the first Ctrl+C.
    Attributes:
        received (str or None): name of the first signal that came.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, when: str = "this update"):
        self.received: str | None = None
        self._when = when
        self._is_interrupted = False

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._former[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _note(self, number, frame):
        self.received = self.received or signal.Signals(number).name

    def _interrupt(self, number, frame):
        if self._is_interrupted:
            raise SystemExit(128 + number)
        self._is_interrupted = True
        self._note(number, frame)
        if os.environ.get("RANK", "0") == "0":
            # Not `print`, which cannot be entered again where the signal comes in the middle of one.
            os.write(2, f"\nCtrl+C: saving after {self._when}; again to quit at once\n".encode())

    def __exit__(self, *error) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


def leave_signals_to_main_process(worker_id: int) -> None:
    """What `DataLoader` takes as `worker_init_fn`, for a loop that acts on a `StopRequest`.

    Args:
        worker_id (int): number of the worker, which makes no difference.
    """
    for number in (*StopRequest.SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
