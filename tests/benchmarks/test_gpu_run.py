"""`make gpu` where there is no GPU: it rehearses, keeps its time, and writes what it has; no figure is asserted."""

import importlib.metadata
import json
import math
import re
import signal
import subprocess
import sys
import time
import zipfile

import compared
import gpu
import model_parts
import page
import pytest
import torch
import wheels
from helpers import BENCHMARKS, ROOT
from imagenet_cost import count_flops


HEAD = {"command": "python benchmarks/gpu/gpu.py", "device": "a GPU"}


@pytest.fixture
def run(tmp_path):
    """One for a GPU, of which nothing is asked here, with five minutes."""
    arguments = gpu.parse_arguments(["--minutes", "5", "--output", str(tmp_path)])
    return gpu.Run(arguments, HEAD, time.monotonic())


@pytest.fixture
def here(monkeypatch):
    """What the run changes about this process ends with the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def rehearse(folder, *parts):
    """The record and the page of tiny models on the CPU."""
    gpu.main(["--device", "cpu", "--tiny", "--output", str(folder), "--part", *parts])
    record = json.loads((folder / "gpu.json").read_text())
    assert (folder / "gpu.md").read_text() == page.text(record)
    assert record["left_out"] == []
    return record, [(row["part"], row["table"].partition(":")[0], row["what"]) for row in record["rows"]]


def test_a_rehearsal_writes_its_rows(here, tmp_path):
    record, rows = rehearse(tmp_path, "b2", "fsdp2", "sampling")
    models = ["E", "F", "A", "diffusers' DiT", "E / A", "E / diffusers' DiT", "F / E"]
    table = "XS/2, 16 tokens, 2 images"
    assert [what for *where, what in rows if where == ["b2", table]] == 2 * models
    assert [what for part, _, what in rows if part == "fsdp2"] == 2 * ["E", "E, sharded"] + ["E, sharded / E"]
    assert [what for part, _, what in rows if part == "sampling"][0] == "guidance everywhere"
    plain, sharded = (row for row in record["rows"] if "loss_3" in row)
    assert all(float(plain[f"loss_{n}"]) == pytest.approx(float(sharded[f"loss_{n}"]), abs=2e-6) for n in (1, 2, 3))
    assert record["facts"]["command"] == "python benchmarks/gpu/gpu.py --part b2 fsdp2 sampling --minutes 8"
    assert page.REHEARSAL in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow  # compiles, and runs the trainer four times
# Dynamo asks each input of a block for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_rehearsal_of_the_other_parts(here, tmp_path):
    # XL/2 is what B/2 is, both ways.
    parts = [part for part in gpu.PARTS if part not in ("xl2", "b2", "fsdp2", "sampling")]
    _, rows = rehearse(tmp_path, *parts)
    assert {part for part, *_ in rows} == {*parts}
    assert {"the loader's share of an update", "samples read as the digit asked for"} <= {what for *_, what in rows}
    assert {path.name for path in tmp_path.glob("*.png")} == {"gpu_digits.png", "gpu_digits_loss.png"}


@pytest.mark.parametrize("name", model_parts.MODELS)
def test_flops_are_those_that_are_counted(name):
    config = compared.config_of(name, "S/2", 8, num_layers=3)
    model = compared.build_models("S/2", 8, torch.device("cpu"), (name,), num_layers=3)[name].to("meta").eval()
    inputs = compared.build_inputs(8, 2, torch.device("meta"), torch.float32)
    assert 2 * model_parts.forward_flops(config, 16) == count_flops(model, **inputs)


def test_what_fails_or_is_out_of_time_stops_nothing_before_it(run):
    written = []

    def part(happens):
        def of_run(run):
            run.row("table", run.part, value=1.0)
            written.append(json.loads(run.record_file.read_text())["rows"][-1]["what"])
            happens()

        return of_run

    def fail():
        raise ValueError("no good")

    happenings = [fail, lambda: None, lambda: signal.raise_signal(signal.SIGALRM), lambda: None, lambda: None]
    gpu.play(run, dict(zip(gpu.PARTS, map(part, happenings), strict=False)), ["correctness", "xl2", "b2", "fsdp2"])
    record = json.loads(run.record_file.read_text())
    assert written == ["correctness", "xl2", "b2"]
    assert [row["what"] for row in record["rows"]] == ["correctness", "correctness", "xl2", "b2"]
    assert record["rows"][1]["error"] == "ValueError: no good"
    assert run.has_failed
    assert record["left_out"] == ["the rest of b2: --minutes 5 were over", "fsdp2: --minutes 5 were over"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_part_begins_if_its_time_is_left(run):
    run.end = time.monotonic() + 1000
    assert run.has_time("short", 500)
    assert not run.has_time("long", 2000)
    (line,) = run.record["left_out"]
    assert re.fullmatch(r"long, which takes 2000 s: \d+ s were left", line)


def test_the_run_ends_with_its_time(run):
    run.end = time.monotonic() + 0.2
    start = time.monotonic()
    gpu.play(run, {"xl2": lambda run: signal.pause()}, ["xl2"])
    assert run.record["left_out"] == ["xl2, which takes 40 s: 0 s were left"]
    run.tiny = True  # begins all the same
    gpu.play(run, {"xl2": lambda run: signal.pause()}, ["xl2"])
    assert run.record["left_out"][1:] == ["the rest of xl2: --minutes 5 were over"]
    assert time.monotonic() - start >= 0.2


def test_one_out_of_memory_leaves_the_others(run):
    run.device, run.tiny = "cpu", True

    def make():
        raise torch.OutOfMemoryError("of the device")

    def fail():
        raise ValueError("no good")

    model_parts.measure(run, "table", {"a": make, "b": lambda: fail, "c": lambda: int}, [("c", "a"), ("c", "c")])
    rows = [(row["table"], row["what"], row.get("ms")) for row in run.record["rows"]]
    assert rows[:2] == [("table", "a", "out of memory"), ("table", "b", "failed")]
    assert rows[2][:2] == ("Failed", "table: b")
    assert [what for _, what, _ in rows[3:]] == ["c", "c / c"]


def test_numbers_of_a_page():
    rows = [
        {"part": "b2", "table": "t", "what": "E", "ms": {"median": 1234.5, "low": 0.12345, "high": 2.0}},
        {"part": "b2", "table": "t", "what": "A", "ms": "no | good", "peak_GiB": 3.14159},
    ]
    lines = page.table(rows).splitlines()
    assert lines[0] == "|  | ms | peak GiB |"
    assert lines[2] == "| E | 1,234 (0.123 – 2) |  |"
    assert lines[3] == "| A | no \\| good | 3.14 |"


def test_the_committed_page_is_that_of_the_committed_record():
    record = BENCHMARKS / "records" / "gpu.json"
    expected = page.text(json.loads(record.read_text()) if record.is_file() else None)
    assert (ROOT / "docs" / "results" / "gpu.md").read_text() == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cpu"], "--device cpu must go with --tiny"),
        (["--tiny"], "--tiny needs --output"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_no_gpu_is_refused(here, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device, got none"):
        gpu.main(["--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_wheels_are_those_that_a_machine_with_torch_lacks():
    needed = wheels.needed()
    # `importlib-metadata` is diffusers' requirement, not ours.
    assert {"diffusers", "accelerate", "datasets", "safetensors", "importlib-metadata", "pytest"} <= needed.keys()
    # `filelock` is one of diffusers too, and comes with torch.
    assert not {"torch", "numpy", "filelock", "pyarrow", "scikit-learn", "scipy"} & needed.keys()
    assert needed["diffusers"] == importlib.metadata.version("diffusers")


def test_wheels_are_installed_for_this_process_and_its_own(here, tmp_path):
    info = "brought_along-1.dist-info"
    with zipfile.ZipFile(tmp_path / "brought_along-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along.py", "answer = 42")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought_along\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    folder = wheels.install(tmp_path)
    command = [sys.executable, "-c", "import brought_along; print(brought_along.answer)"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "42\n"
    assert sys.path[0] == str(folder)
    with pytest.raises(SystemExit, match="must be a folder of wheels, got .* with none"):
        wheels.install(folder)


def test_a_torch_below_the_floor_is_refused(monkeypatch):
    assert wheels.check_torch() == torch.__version__
    monkeypatch.setattr(wheels, "TORCH_FLOOR", (math.inf, 0))
    with pytest.raises(SystemExit, match=r"torch must be at least inf.0, got 2\."):
        wheels.check_torch()
