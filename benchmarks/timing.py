"""Times of functions that take turns in one process, so that a machine's moods meet all of them alike."""

import ctypes
import random
import statistics
import time
from collections.abc import Callable

import torch


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
) -> dict[str, list[float]]:
    """Seconds of each call. Every round calls each function once, in an order drawn anew.

    In one order only turned round, each would follow the same other one, and meet the caches and the clock it leaves.

    Args:
        functions (dict): name to function; what it starts on a CUDA device is waited for.
        rounds (int): calls of each that are timed.
        warmup (int): calls of each before that.
        prepare (callable, optional): called with the name before each call, in no one's time; what it returns is what
            the function is called with, which takes nothing otherwise.
    Returns:
        dict: name to one time for each round.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name in order.sample(list(functions), len(functions)):
            arguments = () if prepare is None else (prepare(name),)
            _wait()
            start = time.perf_counter()
            functions[name](*arguments)
            _wait()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


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
