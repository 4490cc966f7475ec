"""What one large GPU shows: right values first, then speed and memory, then a training. Needs no network.

    make gpu
    python benchmarks/gpu/gpu.py --part xl2 sampling --minutes 5 --output build/gpu
    python benchmarks/gpu/gpu.py --device cpu --tiny --output build/gpu     a rehearsal, in a minute or two

Each row is written as soon as it is there, to a record (JSON) and to a page, so that a run that is cut off has shown
what came before. A part begins if its least time is left; at the end of `--minutes` whatever runs is stopped. What
does not fit into memory, and what fails, is a row that says so. Asserts nothing; ends with 1 if anything has failed.

It runs on the torch that is installed. Where other packages are missing and there is no network, make a folder of
wheels where there is one, `--vendor DIR --python_version 3.12`, and give it to the run, `--wheels DIR`.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import page
import wheels


ROOT = Path(__file__).resolve().parents[2]
# The parts in the order in which they run: where each is, and the seconds without which it does not begin.
PARTS = {
    "correctness": ("training_parts", 40),
    "xl2": ("model_parts", 40),
    "b2": ("model_parts", 25),
    "loader": ("training_parts", 90),
    "fsdp2": ("model_parts", 20),
    "sampling": ("model_parts", 20),
    "digits": ("digits_part", 120),
    "b2_compiled": ("model_parts", 90),
}


class TimeIsUp(BaseException):
    """Raised at the end of `--minutes`, wherever the run is; no `Exception`, which compilers catch."""


class Run:
    """What the parts share: the device, whether all is tiny, and the record, written anew with every row.

    Args:
        arguments (argparse.Namespace): the command line.
        facts (dict): name to text, for the head of the page.
        start (float): when the minutes began, of `time.monotonic`.
    """

    def __init__(self, arguments: argparse.Namespace, facts: dict[str, str], start: float):
        self.device, self.tiny, self.minutes = arguments.device, arguments.tiny, arguments.minutes
        self.end = start + 60 * arguments.minutes
        self.part, self.has_failed, self.matrix_rate = "", False, None
        self.record = {"tiny": self.tiny, "facts": facts, "rows": [], "left_out": [], "plots": {}}
        folder = arguments.output
        self.record_file = (folder or ROOT / "benchmarks" / "records") / "gpu.json"
        self.page_file = (folder or ROOT / "docs" / "results") / "gpu.md"
        self.page_file.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def row(self, table: str, what: str, **values: object) -> None:
        """Add a row: spreads, numbers and texts by their names, which are columns of the table."""
        self.record["rows"].append({"part": self.part, "table": table, "what": what, **values})
        print(f"{self.part}: {table}: {what}: {', '.join(map(page.cell, values.values()))}", flush=True)
        self.write()

    def plot(self, name: str, caption: str) -> Path:
        """Where to draw a plot, which the page then shows."""
        self.record["plots"][name] = caption
        return self.page_file.with_name(name)

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left, of which a tiny run needs none; if not, the record says so."""
        left = self.seconds_left()
        if left >= (0 if self.tiny else seconds):
            return True
        self.leave_out(f"{what}, which takes {seconds:.0f} s: {max(left, 0):.0f} s were left")
        return False

    def leave_out(self, line: str) -> None:
        self.record["left_out"].append(line)
        print(f"left out: {line}", flush=True)
        self.write()

    def failure(self, what: str, said: str) -> None:
        """A row for what did not work; the run goes on, and ends with 1."""
        self.has_failed = True
        self.row("Failed", what, error=said if len(said) < 2000 else f"{said[:1000]} … {said[-1000:]}")

    @contextlib.contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """An error in the block becomes a row."""
        try:
            yield
        except Exception as error:
            self.failure(what, f"{type(error).__name__}: {error}")

    def write(self) -> None:
        self.record_file.parent.mkdir(parents=True, exist_ok=True)
        self.record_file.write_text(json.dumps(self.record, indent=1) + "\n")
        self.page_file.write_text(page.text(self.record))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="all by default, in this order")
    parser.add_argument("--minutes", type=float, default=8.0, help="the run ends after them, imports included")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="models of two layers, few rounds: no results")
    parser.add_argument(
        "--output", type=Path, help="folder for gpu.json, gpu.md and plots [benchmarks/records and docs/results]"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are installed for this run")
    parser.add_argument("--vendor", type=Path, help="fill this folder with wheels for another machine, and end")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python_version", default=version, help="of the machine that --vendor is for [this one's]")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu must go with --tiny, got it alone: at full size a part takes hours there")
    if arguments.tiny and arguments.output is None:
        parser.error("--tiny needs --output: what it writes must not be taken for results")
    return arguments


def facts_of_machine(arguments: argparse.Namespace) -> dict[str, str]:
    """Head of the page: the command, machine, GPU and driver, versions, date."""
    import torch
    from facts import facts_of_run

    facts = facts_of_run(arguments.device)
    # Without folders, which are of this machine.
    parts = [] if arguments.part == list(PARTS) else ["--part", *arguments.part]
    facts["command"] = " ".join(["python benchmarks/gpu/gpu.py", *parts, f"--minutes {arguments.minutes:g}"])
    if arguments.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        facts["device"] += f", {memory}, {properties.multi_processor_count} multiprocessors"
        facts["driver"] = f"{driver()}, CUDA {torch.version.cuda}"
    del facts["huge pages"]
    floor = ".".join(map(str, wheels.TORCH_FLOOR))
    facts["torch"] = f"{torch.__version__}; {floor} is the floor, by the functions called; the other tests run on 2.13"
    return facts


def driver() -> str:
    """Version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"
    return "unknown"


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the block when so many seconds are over."""

    def stop(number, frame):
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def play(run: Run, parts: dict[str, Callable[[Run], None]], names: list[str]) -> None:
    """Run the named parts in their order, each a function of the run, until the time is over."""
    waiting = [name for name in parts if name in names]
    try:
        with bounded(run.seconds_left()):
            while waiting:
                run.part = waiting[0]
                with run.going_on(run.part):
                    if run.has_time(run.part, PARTS[run.part][1]):
                        parts[run.part](run)
                waiting.pop(0)
    except TimeIsUp:
        run.leave_out(f"the rest of {waiting[0]}: --minutes {run.minutes:g} were over")
        for name in waiting[1:]:
            run.leave_out(f"{name}: --minutes {run.minutes:g} were over")


def load_parts() -> dict[str, Callable[[Run], None]]:
    """The parts, which import what they need when they begin: what is missing for one stops no other."""

    def part(name: str, module: str) -> Callable[[Run], None]:
        return lambda run: getattr(importlib.import_module(module), name)(run)

    return {name: part(name, module) for name, (module, _) in PARTS.items()}


def main(argv: list[str] | None = None) -> None:
    start = time.monotonic()
    arguments = parse_arguments(argv)
    if arguments.vendor is not None:
        wheels.collect(arguments.vendor, arguments.python_version)
        return
    installed = None if arguments.wheels is None else wheels.install(arguments.wheels)
    try:
        wheels.check_torch()
        for folder in ("examples", "benchmarks/speed", "."):
            wheels.look_first_into(ROOT / folder)
        os.environ["HF_HUB_OFFLINE"] = "1"
        if arguments.device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "1"
        import torch

        if arguments.device == "cuda" and not torch.cuda.is_available():
            sys.exit("--device cuda needs a CUDA device, got none: try --device cpu --tiny --output build/gpu")
        run = Run(arguments, facts_of_machine(arguments), start)
        play(run, load_parts(), arguments.part)
        print(f"written: {run.page_file} and {run.record_file}")
    finally:
        if installed is not None:
            shutil.rmtree(installed)
    if run.has_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
