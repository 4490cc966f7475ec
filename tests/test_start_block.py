"""What a script says before its work."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import reset_accelerate

from diffusers_mp.start_block import (
    class_warnings,
    class_words,
    device_warnings,
    device_words,
    gibibytes,
    start_block,
)


def test_rows_are_two_columns_with_warnings_below():
    assert start_block({"data": "photos", "objective": "noise"}, ["mind the gap"]).splitlines() == [
        "data       photos",
        "objective  noise",
        "warning: mind the gap",
    ]


def test_device_precision_and_processes(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    reset_accelerate()
    accelerator, threads = Accelerator(cpu=True, mixed_precision="bf16"), torch.get_num_threads()
    words = f"CPU ({threads} thread{'s' if threads > 1 else ''}), bfloat16 autocast, 1 process"
    assert device_words(accelerator) == words
    (warning,) = device_warnings(accelerator)
    assert warning.startswith("no accelerator was found: this runs on the CPU")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert device_warnings(accelerator) == []
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    other = SimpleNamespace(
        device=torch.device("mps"), mixed_precision="no", num_processes=8, is_fsdp2=True
    )  # a machine that is not at hand
    assert device_words(other) == "mps, float32, 8 processes (FSDP2)"
    assert device_warnings(other) == []
    reset_accelerate()


def test_the_first_classes_are_named_with_their_images():
    assert class_words(None) == "no classes"
    assert class_words({"cat": 1200}) == "1 class: cat (1,200)"
    assert class_words({"cat": 2, "dog": 3}) == "2 classes: cat (2), dog (3)"
    words = class_words({f"class {number}": 7 for number in range(1000)})
    assert words.startswith("1,000 classes: class 0 (7), class 1 (7), ")
    assert words.endswith("), …")
    assert len(words) < 120


@pytest.mark.parametrize(
    "counts, messages",
    [
        ({"a": 1, "b": 2}, []),
        (None, ["no classes were found, so the model is unconditional"]),
        ({"a": 9}, ["there is one class only"]),
        ({"a": 1, "b": 0, "c": 0}, ["2 of 3 classes have no image to train on: b, c"]),
    ],
)
def test_classes_of_which_a_user_should_know(counts, messages):
    warnings = class_warnings(counts)
    assert len(warnings) == len(messages)
    assert all(warning.startswith(message) for warning, message in zip(warnings, messages, strict=True))


def test_sizes():
    assert gibibytes(24 * 30_951_243) == "0.69 GiB"  # S/2 in docs/scale_out.md
    assert gibibytes(3 * 2**20) == "3.0 MiB"
