"""Ending a run in good order when the machine is taken away."""

import signal


class StopRequest:
    """Notes SIGTERM and SIGUSR1, which schedulers of clusters send before they kill, for the loop to act on.

    Listens from its making until `close`, which puts the former handlers back. To be made on the main thread.

    Attributes:
        received (str or None): name of the first signal that came.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received: str | None = None
        self._former = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number, frame):
        self.received = self.received or signal.Signals(number).name

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
