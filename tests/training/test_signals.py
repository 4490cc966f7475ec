"""StopRequest: signals are noted inside of its block, and are somebody else's again after it."""

import os
import signal

import pytest

from diffusers_mp.training import StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_the_first_signal_is_noted(number):
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.Signals(number).name


def test_former_handlers_are_back_after_an_error():
    former = [signal.getsignal(number) for number in StopRequest.SIGNALS]

    def fail():
        with StopRequest():
            assert [signal.getsignal(number) for number in StopRequest.SIGNALS] != former
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == former
