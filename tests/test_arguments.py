"""Flags of the scripts: their ranges, and what becomes of them in calls of the package."""

import argparse
import inspect
from dataclasses import fields

import pytest

from diffusers_mp.arguments import (
    add_encoding_arguments,
    add_source_arguments,
    at_least,
    color,
    ema_width,
    encoding_of,
    finite,
    positive,
    share,
    source_of,
)
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.settings import EncodingSettings


@pytest.mark.parametrize(
    "type, right, wrong, message",
    [
        (at_least(1), ("1", "30"), "0", "must be at least 1, got 0"),
        (at_least(0), ("0",), "-1", "must be at least 0, got -1"),
        (at_least(0, float), ("0", "1e-3"), "nan", "must be at least 0, got nan"),
        (at_least(1), ("1",), "1.5", "invalid int value: '1.5'"),
        (positive, ("1e-8",), "0", "must be positive, got 0"),
        (positive, ("3",), "inf", "must be positive, got inf"),
        (finite, ("-2.5", "0"), "nan", "must be finite, got nan"),
        (share, ("0", "0.999"), "1", "must be in [0, 1), got 1"),
        (ema_width, ("0.05", "0.2886"), "0.2887", "must be in (0, 1/sqrt(12)), that is below 0.2887, got 0.2887"),
    ],
)
def test_a_flag_has_its_range(type, right, wrong, message, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", type=type)
    for text in right:
        assert parser.parse_args(["--x", text]).x == float(text)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--x={wrong}"])
    assert f"error: argument --x: {message}\n" in capsys.readouterr().err


def test_a_colour_is_one_that_pillow_knows(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", type=color)
    for text in ("white", "Gray", "#f80", "rgb(1,2,3)"):
        assert parser.parse_args(["--x", text]).x == text
    for text in ("whiter", "", "#ff880080"):  # the last one is transparent itself
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([f"--x={text}"])
        assert f"must be a colour such as white, gray or #ff8800, got {text}" in capsys.readouterr().err


def test_flags_of_data_are_arguments_of_the_package():
    parser = argparse.ArgumentParser()
    add_source_arguments(parser.add_argument)
    parser.add_argument("--seed", type=at_least(0), default=0)
    few = parser.parse_args(["--train_data_dir", "photos", "--split", "test", "--skip_corrupt"])
    add_encoding_arguments(parser.add_argument)
    for name, value in (("resolution", 64), ("encode_batch_size", 8), ("dataloader_num_workers", 2), ("vae", "none")):
        parser.add_argument(f"--{name}", default=value)
    all_flags = parser.parse_args(["--dataset_name", "user/name", "--streaming"])

    signature = inspect.signature(load_image_dataset).parameters
    assert source_of(all_flags).keys() == signature.keys()
    # A script without the flag leaves the default.
    assert source_of(few).keys() == signature.keys() - {"streaming"}
    assert (source_of(few)["train_data_dir"], source_of(few)["split"]) == ("photos", "test")
    assert encoding_of(few) == {
        "image_column": "image",
        "label_column": "label",
        "background": "white",
        "skip_corrupt": True,
    }
    settings = EncodingSettings(**encoding_of(all_flags))
    assert (settings.resolution, settings.batch_size, settings.num_workers, settings.vae_id) == (64, 8, 2, "none")
    assert {field.name for field in fields(settings)} - encoding_of(all_flags).keys() == {"random_flip", "shard_size"}
