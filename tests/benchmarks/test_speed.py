"""The benchmarks run and write what they say; what times come out is not asserted."""

import collections
import itertools
import json
import os

import data_start
import imagenet_cost
import pytest
import timing
from helpers import BENCHMARKS, ROOT
from processes import run_python
from timing import quiet_rounds, ratio, take_turns

from diffusers_mp import get_preset
from diffusers_mp.data.latents import LatentDataset


# argv: a script and its arguments.
RUN = """
import runpy, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# argv: arguments. Matrix products are made once, not until they have taken as long as the largest, and the import that
# is timed is that of this process, not of three new ones.
RUN_SPEED = f"""
import contextlib, io, sys, types
import torch
torch.set_num_threads(1)
sys.path.insert(0, {str(BENCHMARKS / "speed")!r})
import speed

def run(command, **options):
    assert command[:2] == [sys.executable, "-c"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(command[2], {{}})
    return types.SimpleNamespace(stdout=printed.getvalue())

speed.round = lambda number: 1
speed.subprocess = types.SimpleNamespace(run=run)
speed.main()
"""


def test_functions_take_turns():
    calls = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=40, warmup=1)
    assert all(sorted(calls[start : start + 3]) == ["a", "b", "c"] for start in range(0, 3 * 41, 3))
    # Each follows each other one about as often, within a round and from one to the next.
    pairs = collections.Counter(itertools.pairwise(calls))
    assert all(pairs[pair] > 8 for pair in itertools.permutations("abc", 2))
    assert {name: len(of_name) for name, of_name in times.items()} == {"a": 40, "b": 40, "c": 40}


def test_a_ratio_is_that_of_each_round():
    # A machine that slows down by the round changes no ratio.
    times = {"a": [1.0, 2.0, 30.0], "b": [2.0, 4.0, 60.0]}
    assert ratio(times, "a", "b") == {"median": 0.5, "low": 0.5, "high": 0.5}


def test_rounds_that_others_disturb_are_played_again(monkeypatch):
    clock, taken = [0.0], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "_seconds_taken", lambda: taken[0])
    monkeypatch.setattr(timing, "_shares_taken", [])

    def rounds_of(shares):
        shares, numbers = iter(shares), itertools.count()

        def play():
            clock[0] += 1
            taken[0] += next(shares) * os.cpu_count()
            return next(numbers)

        return play

    assert quiet_rounds(rounds_of([0, 0.5, 0.01, 0.3, 0, 0]), 3) == [0, 2, 4]
    assert timing.share_taken() == pytest.approx(0.01)
    # Never quiet: the quietest of three times as many.
    assert quiet_rounds(rounds_of([0.5, 0.4, 0.3, 0.6, 0.1, 0.2]), 2) == [4, 5]
    assert timing.share_taken() == pytest.approx(0.2)


def test_speed_writes_its_table(tmp_path):
    run_python(
        *(RUN_SPEED, "--size", "XS/8", "--sample_size", "16", "--batch_size", "2", "--rounds", "2"),
        *("--num_images", "64", "--num_inference_steps", "1", "--no_compile", "--keep_memory"),
        *("--output", str(tmp_path / "speed")),
    )
    results = json.loads((tmp_path / "speed.json").read_text())
    saved = results["bytes_saved_for_backward"]
    assert saved["E shift"] < saved["A"]  # no LayerNorm keeps its result
    # Half as many angles as shifts; E has gains that A has not.
    assert results["parameters"]["E rotate"] < results["parameters"]["A"] < results["parameters"]["E shift"]
    # Two for each weight and token, or weight and image in what makes modulations, and two products of attention.
    images, tokens, width, blocks = 2, 4, 256, 6
    of_tokens = blocks * 12 * width**2 + (8 * 8 * 4 + 1) * width + width * 8 * 8 * 8
    of_images = 256 * width + width**2 + (blocks * 2 * 2.5 + 1.5) * width**2
    attention = blocks * 2 * tokens**2 * width
    assert results["inference"]["eager"]["flops_of_E"] == 2 * images * (tokens * of_tokens + of_images + attention)
    table = (tmp_path / "speed.md").read_text()
    for row in ("inference, E / A", "training step, E / A", "share of a step", "images/s"):
        assert row in table
    assert results["date"] in table
    assert results["versions"] in table


@pytest.mark.slow  # compiles six models
def test_parts_prints_its_tables():
    arguments = ("--size", "XS/8", "--batch_size", "2", "--rounds", "3")
    printed = run_python(RUN, BENCHMARKS / "speed" / "parts.py", *arguments)
    common = ("products of tokens", "products of the conditioning", "attention")
    update = ("Adam", "forced normalisation", "two averages")
    compiled = ("compiled kernels", "copies, allocation, calls")
    expected = {
        "Inference, eager": (*common, "other operators"),
        "Training step, eager": (*common, "other operators", *update),
        "Inference, compiled": (*common, *compiled),
        "Training step, compiled": (*common, *compiled, *update),
    }
    sections = dict(section.split("\n", 1) for section in printed.split("\n## ")[1:])
    assert list(sections) == list(expected)
    for title, section in sections.items():
        rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row[:2] == "| "][1:]
        assert [row[0] for row in rows] == [*expected[title], "products and attention", "all"]
        times = [[float(cell.split()[0]) for cell in row[1:]] for row in rows]
        # Each row is a median of its own, and so they add up roughly.
        assert min(map(min, times)) > 0
        assert sum(map(sum, times[:-2])) == pytest.approx(sum(times[-1]), rel=0.3)


@pytest.mark.slow  # test_fused has each trick; this shows a table
def test_operations_prints_a_row_for_each_trick(monkeypatch, run_here):
    import operations

    # One image instead of 16, and the upkeep of the smallest model, at which the same is done.
    monkeypatch.setattr(operations, "B", 1)
    of_one_image = {
        name: (*functions, [(1, *shape[1:]) if len(shape) > 2 else shape for shape in shapes])
        for name, (*functions, shapes) in operations.OPERATIONS.items()
    }
    monkeypatch.setattr(operations, "OPERATIONS", of_one_image)
    monkeypatch.setattr(operations, "get_preset", lambda size, **more: get_preset("XS/8", **more))
    printed = run_here("speed/operations.py", "--rounds", "3", "--size", "XS/8")
    rows = [line for line in printed.splitlines() if line[:2] == "| "]
    assert all(line.count("|") == 5 for line in rows)
    assert [line.split(" | ")[0] for line in rows[1 + 5 * 3 + 4 + 1 :]] == [
        "| A",
        "| whole",
        "| without: gradients of rows projected",
        "| without: rotation",
        "| without: queries and keys to RMS 1",
        "| without: SiLU's constant",
        "| without all four",
    ]


def test_guidance_interval_prints_its_table(run_here):
    printed = run_here(
        *("speed/guidance_interval.py", "--preset", "XS/8", "--sample_size", "16", "--batch_size", "1"),
        *("--num_inference_steps", "4", "--rounds", "2", "--device", "cpu"),
    )
    rows = {row.split(" | ")[0]: row.split(" | ")[1:] for row in printed.splitlines() if row[:2] == "| "}
    # Time relative to itself; rows with guidance are twice those without.
    assert rows["| everywhere"][1:] == ["1.000 (1.000 to 1.000)", "1.000 |"]
    assert rows["| nowhere"][-1] == "0.500 |"
    assert 0.5 < float(rows["| interval"][-1].rstrip(" |")) < 1
    assert "4 steps of DDIM, float32" in printed


def test_recorder_cost_prints_its_table(run_here):
    printed = run_here("speed/recorder_cost.py", "--size", "XS/8", "--batch_size", "1", "--rounds", "2")
    rows = [line for line in printed.splitlines() if line[:2] == "| "][1:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| with a recorder that rests",
        "| that is recorded, everything by default",
        "| the same divided by the default stride 100",
        "| NormWatch",
        "| an update without",
        "| more at a look",
        "| the same divided by the default stride 50",
    ]
    assert all(row.count("%") == 3 for row in rows[:3])
    assert rows[-1].count("%") == 2
    # Of each of the 38 matrices a copy, two norms and a difference.
    operators = [int(row.split(" | ")[1]) for row in rows[4:6]]
    assert 38 * 4 < operators[1] < operators[0]


def test_costs_of_imagenet_are_those_of_the_page():
    tables = imagenet_cost.tables()
    assert tables.count("\n") > 12
    assert tables in (ROOT / "docs" / "imagenet.md").read_text()


def test_starts_on_a_folder_are_measured(tmp_path, capsys):
    data_start.make_images(tmp_path / "images", 30)
    results = {}
    for step in data_start.STEPS:
        data_start.measure(step, tmp_path)
        results[step] = json.loads(capsys.readouterr().out)
    assert LatentDataset(tmp_path / "encoded").index["num_samples_per_class"] == {str(k): 3 for k in range(10)}
    for result in results.values():
        assert 0 < result["opening"] <= result["seconds"]
        assert 0 < result["imported"] <= result["peak"]
    # Opened only; with the encoding, or what is left of it, beside.
    assert results["open"]["seconds"] - results["open"]["opening"] < 1e-3
