"""What stands beside every number: the command, the machine, the versions and the date; and tables of them."""

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusers
import torch


ROOT = Path(__file__).resolve().parents[2]


def facts_of_run(device: str | torch.device = "cpu") -> dict[str, str]:
    """Of this process. Cores are those it may use, which in a container are not all that there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, {_processor()}",
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU",
        # An environment variable of PyTorch's, of which a command shows nothing.
        "huge pages": "asked for" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "not asked for",
        "versions": f"Python {platform.python_version()}, {versions}",
        "date": datetime.date.today().isoformat(),
    }


def head(facts: dict[str, str]) -> str:
    """The same as the first lines of a list in Markdown."""
    names = [name for name in ("machine", "device", "huge pages", "versions", "date") if name in facts]
    return "\n".join([f"- command: `{facts['command']}`", *(f"- {name}: {facts[name]}" for name in names)])


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows))


def _processor() -> str:
    """Name and model number, the latter since processors of virtual machines share a name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    if {"model name", "cpu family", "model"} <= facts.keys():
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    return platform.processor() or "processor unknown"
