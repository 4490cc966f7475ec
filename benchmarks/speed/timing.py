"""Times of functions that take turns in one process, so that a machine's moods meet all of them alike."""

import ctypes
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch


Result = TypeVar("Result")

# Share of the processors' time that other virtual machines may take of a round.
LITTLE = 0.02
# Of the rounds of this process that count.
_shares_taken: list[float] = []


def keep_memory() -> None:
    """Make glibc keep what is freed, rather than return it to the system and ask for it again.

    Each page that comes back costs microseconds, and how many do depends on all that the process has allocated before.

    Raises:
        RuntimeError: if the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4
    if mallopt is None or not (mallopt(trim_threshold, -1) and mallopt(mmap_max, 0)):
        raise RuntimeError("only glibc can be told to keep freed memory, by `mallopt`.")


def take_turns(
    functions: dict[str, Callable[..., object]],
    rounds: int,
    warmup: int = 2,
    prepare: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call. Every round calls each function once, in an order drawn anew; quiet rounds count.

    In one order only turned round, each would follow the same other one, and meet the caches and the clock it leaves.

    Args:
        functions (dict): name to function; what it starts on a CUDA device is waited for.
        rounds (int): calls of each that are timed.
        warmup (int): calls of each before that.
        prepare (callable, optional): called with the name before each call, in no one's time; what it returns is what
            the function is called with, which takes nothing otherwise.
        clock (callable): seconds; `time.thread_time` leaves out what other processes take of this one's core.
    Returns:
        dict: name to one time for each round.
    """
    order = random.Random(0)

    def play() -> dict[str, float]:
        times = {}
        for name in order.sample(list(functions), len(functions)):
            arguments = () if prepare is None else (prepare(name),)
            _wait()
            start = clock()
            functions[name](*arguments)
            _wait()
            times[name] = clock() - start
        return times

    for _ in range(warmup):
        play()
    played = quiet_rounds(play, rounds)
    return {name: [times[name] for times in played] for name in functions}


def quiet_rounds(play: Callable[[], Result], rounds: int) -> list[Result]:
    """What the quietest of up to three times as many rounds gave, in their order.

    A round is quiet if other virtual machines took little of the processors' time; once enough were, no more are
    played.

    Args:
        play (callable): plays a round.
        rounds (int): rounds that count.
    Returns:
        list: one result for each.
    """
    played, shares = [], []
    while len(played) < 3 * rounds and sum(share <= LITTLE for share in shares) < rounds:
        start, taken = time.perf_counter(), _seconds_taken()
        played.append(play())
        seconds = (time.perf_counter() - start) * os.cpu_count()
        shares.append((_seconds_taken() - taken) / seconds)
    quietest = sorted(sorted(range(len(played)), key=shares.__getitem__)[:rounds])
    _shares_taken.extend(shares[index] for index in quietest)
    return [played[index] for index in quietest]


def share_taken() -> float:
    """The largest share of the processors' time that others took of a round that counts, so far in this process."""
    return max(_shares_taken, default=0.0)


def _seconds_taken() -> float:
    """Time of all processors that the hypervisor gave to others while work was waiting; 0 where nothing tells."""
    path = Path("/proc/stat")
    fields = path.read_text().split("\n", 1)[0].split() if path.is_file() else []
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def ratio(times: dict[str, list[float]], name: str, over: str) -> dict[str, float]:
    """Median and quartiles of the ratios within a round."""
    return spread([a / b for a, b in zip(times[name], times[over], strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
