"""The scripts of `benchmarks` can be imported, and run in this process."""

import importlib
import sys
from pathlib import Path

import pytest
from helpers import BENCHMARKS


sys.path[:0] = [str(BENCHMARKS / folder) for folder in ("speed", "quality", "gpu")]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A script in this process, by its path in `benchmarks`; what it prints. A new process takes longer to start."""

    def run_here(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / script), *arguments])
        capsys.readouterr()
        importlib.import_module(Path(script).stem).main()
        return capsys.readouterr().out

    return run_here
