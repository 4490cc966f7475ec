"""The fuzzer of the scripts: it tells good ends from bad ones, draws the same again, and finds nothing bad in ours."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import BENCHMARKS, ROOT

from diffusers_mp.arguments import at_least
from diffusers_mp.scripts import RunFailedError, ScriptParser


TOOL = BENCHMARKS / "fuzz" / "fuzz_scripts.py"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOL.parent))
    former = list(sys.path)
    import fuzz_inputs  # noqa: F401
    import fuzz_scripts

    yield fuzz_scripts
    sys.path[:] = former
    sys.path.remove(str(TOOL.parent))


def make_parser():
    parser = ScriptParser()
    parser.add_argument("--size", type=at_least(1), default=1)
    for flag in ("kind", "idle", "output_dir", "vae"):
        parser.add_argument(f"--{flag}")
    return parser


def main(args):
    errors = {
        "named": ValueError("`size` and `kind` must fit."),
        "nameless": ValueError("something must fit."),
        "diverges": RunFailedError("the loss is nan"),
    }
    if args.kind in errors:
        raise errors[args.kind]
    if args.kind == "unforeseen":
        raise {}["x"]
    Path(args.output_dir).mkdir()
    (Path(args.output_dir) / "result.json").write_text(f'{{"size": {args.size}}}')


@pytest.fixture
def fuzzer(tool, tmp_path, monkeypatch):
    """Of one small script instead of ours."""
    script = SimpleNamespace(make_parser=make_parser, parse_args=lambda: make_parser().parse_args(), main=main)
    made = tool.Fuzzer.__new__(tool.Fuzzer)
    made.folder, made.scripts, made.bases, made.plain = tmp_path, {"small": script}, {"small": {}}, {}
    return made


@pytest.mark.parametrize(
    "flag, value, kind",
    [
        ("size", "0", "clear"),
        ("kind", "named", "clear"),
        ("kind", "", "clear"),
        ("kind", "nameless", "unclear"),
        ("kind", "unforeseen", "foreign"),
        ("kind", "diverges", "failed"),
        ("size", "2", "effect"),
        ("size", "1", "default"),
        ("idle", "x", "no effect"),
        ("vae", "x", "speed"),
    ],
)
def test_ends_are_told_apart(fuzzer, monkeypatch, flag, value, kind):
    monkeypatch.setattr(fuzzer, "draw", lambda number: ("small", {flag: [value]}, [flag], None))
    assert fuzzer.outcome(0)[0] == kind


def test_what_is_damaged_is_a_copy_and_the_same_again(tool, tmp_path):
    from fuzz_inputs import damage

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"a": 1, "b": 2}')
    said = set()
    for number in range(20):
        path, what = damage(tmp_path / "source", tmp_path / str(number), random.Random(number))
        assert path.parent == tmp_path / str(number)
        assert damage(tmp_path / "source", tmp_path / f"{number} again", random.Random(number))[1] == what
        assert not path.is_file() or path.read_text(errors="replace") != '{"a": 1, "b": 2}'
        said.add(what.split(" = ")[0])
    assert {"config.json cut", "config.json emptied", "config.json removed"} < said
    assert (tmp_path / "source" / "config.json").read_text() == '{"a": 1, "b": 2}'


@pytest.mark.slow
def test_a_hundred_inputs_end_well():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), "--num_inputs", "100"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    (counts,) = re.findall(r"^all +(.+)$", ran.stdout, re.MULTILINE)
    assert sum(map(int, counts.split())) == 100
