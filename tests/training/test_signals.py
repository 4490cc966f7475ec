"""StopRequest: signals are noted inside of its block, and are somebody else's again after it."""

import os
import signal

import pytest

from diffusers_mp.training import StopRequest


@pytest.fixture(autouse=True)
def _foreground():
    """As a process that Ctrl+C reaches, which those in the background of a shell's script ignore."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("number", [*StopRequest.SIGNALS, signal.SIGINT])
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


def test_the_second_ctrl_c_quits_at_once(capfd):
    former = signal.getsignal(signal.SIGINT)

    def interrupt_twice():
        with StopRequest("update 7") as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == "SIGTERM"
            assert capfd.readouterr().err == "\nCtrl+C: saving after update 7; again to quit at once\n"
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("still here")

    with pytest.raises(SystemExit) as quits:
        interrupt_twice()
    assert quits.value.code == 130
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is former


def test_one_of_several_processes_says_so(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert (stop.received, capfd.readouterr().err) == ("SIGINT", "")


def test_an_ignored_ctrl_c_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is None
