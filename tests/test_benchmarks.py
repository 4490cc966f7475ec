"""The benchmarks run and write what they say; what times come out is not asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from timing import ratio, take_turns  # noqa: E402


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    ).stdout


def test_functions_take_turns():
    calls = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, warmup=1)
    assert "".join(calls) == "abcbcacababcbca"
    assert {name: len(of_name) for name, of_name in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_ratio_is_that_of_each_round():
    # A machine that slows down by the round changes no ratio.
    times = {"a": [1.0, 2.0, 30.0], "b": [2.0, 4.0, 60.0]}
    assert ratio(times, "a", "b") == {"median": 0.5, "low": 0.5, "high": 0.5}


def test_speed_writes_its_table(tmp_path):
    run(
        *("speed.py", "--size", "XS/8", "--sample_size", "16", "--batch_size", "2", "--rounds", "2"),
        *("--num_images", "64", "--num_inference_steps", "1", "--no_compile", "--output", str(tmp_path / "speed")),
    )
    results = json.loads((tmp_path / "speed.json").read_text())
    saved = results["bytes_saved_for_backward"]
    assert saved["E shift"] < saved["A"]  # no LayerNorm keeps its result
    # Half as many angles as shifts; E has gains that A has not.
    assert results["parameters"]["E rotate"] < results["parameters"]["A"] < results["parameters"]["E shift"]
    # FLOPs of S/2 and its kin are those of its maps: 2 for each weight and token, 6 blocks of 12 D^2, and the rest.
    num_tokens, width = 2 * 2 * 2, 256
    assert results["inference"]["eager"]["flops_of_E"] > 2 * num_tokens * 6 * 12 * width**2
    table = (tmp_path / "speed.md").read_text()
    for row in ("inference, E / A", "training step, E / A", "share of a step", "images/s"):
        assert row in table
    assert results["date"] in table
    assert results["versions"] in table


def test_operations_prints_a_row_for_each_trick():
    rows = [line for line in run("operations.py", "--rounds", "3", "--size", "XS/8").splitlines() if line[:2] == "| "]
    operations, steps = rows[: 1 + 6 * 2 + 4], rows[1 + 6 * 2 + 4 :]
    assert all(line.count("|") == 5 for line in operations)
    assert [line.split(" | ")[0] for line in steps[1:]] == [
        "| whole",
        "| without: gradients of rows projected",
        "| without: rotation",
        "| without: queries and keys to RMS 1",
        "| without: SiLU's constant",
        "| without all four",
    ]
