"""Flags of the scripts: their ranges, and what becomes of them in calls of the package."""

import argparse
import inspect
import os
from dataclasses import fields

import pytest

from diffusers_mp.arguments import (
    add_encoding_arguments,
    add_hub_arguments,
    add_source_arguments,
    at_least,
    check_paths,
    color,
    ema_width,
    encoding_of,
    finite,
    pixels,
    positive,
    seed,
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
        (seed, ("0", "4294967295"), "4294967296", "must be in [0, 2**32), got 4294967296"),
        (seed, ("7",), "-1", "must be in [0, 2**32), got -1"),
        (pixels, ("1", "16384"), "16385", "must be below 16385 in size, got 16385"),
        # What int32 and float32 cannot hold.
        (at_least(1), ("2147483647",), "2147483648", "must be below 2147483648 in size, got 2147483648"),
        (positive, ("2.9e38",), "3e38", "must be below 3e+38 in size, got 3e38"),
        (finite, ("2.9e38",), "-3e38", "must be below 3e+38 in size, got -3e38"),
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


def test_a_token_is_no_licence(capsys):
    parser = argparse.ArgumentParser()
    add_hub_arguments(parser.add_argument)
    assert parser.parse_args(["--hub_license", "cc-by-nc-sa-4.0"]).hub_license == "cc-by-nc-sa-4.0"
    token = "hf_" + "a" * 34
    with pytest.raises(SystemExit):
        parser.parse_args(["--hub_license", token])
    said = capsys.readouterr().err
    assert "--hub_license: must be a licence as the Hub names it, such as apache-2.0, got a token" in said
    assert token not in said


@pytest.fixture
def at(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "train_data_dir",
            "nowhere",
            "`train_data_dir` must be a folder of images, got '.*nowhere', where there is noth",
        ),
        ("reference_dir", "file", "`reference_dir` must be a folder of images, got '.*file', where there is a file"),
        ("snapshots_dir", "nowhere", "`snapshots_dir` must be the ema_snapshots of a run, got"),
        ("checkpoint_path", "folder", "`checkpoint_path` must be a file, got '.*', where there is a folder"),
        ("id2label", "nowhere", "`id2label` must be a file, got '.*', where there is nothing"),
        ("vae", "nowhere", "`--vae` must be a path, or an id on the Hub as user/name, got '.*nowhere': there is no"),
        ("pretrained_model_name_or_path", "file", "must be a folder, or an id on the Hub as user/name, got the file"),
        ("output_dir", "file", "`output_dir` must be a folder or a new name, got '.*file': .*file is a file"),
        ("latents_dir", "file/x", "`latents_dir` must be a folder or a new name, got '.*file/x': .*file is a file"),
    ],
)
def test_paths_are_checked_by_name(at, name, value, message):
    with pytest.raises((OSError, ValueError), match=message):
        check_paths(argparse.Namespace(**{name: str(at / value)}))


def test_paths_that_are_there_or_may_be_made_pass(at):
    folder, file = str(at / "folder"), str(at / "file")
    right = {
        **{
            "train_data_dir": folder,
            "reference_dir": None,
            "checkpoint_path": file,
            "reference_statistics": [file, file],
        },
        **{"vae": "none", "pretrained_model_name_or_path": "user/name", "model_config_name_or_path": file},
        **{"output_dir": str(at / "new" / "er"), "latents_dir": folder, "dataset_name": "user/images"},
    }
    check_paths(argparse.Namespace(**right))
    with pytest.raises(ValueError, match="`reference_statistics` must be a file, got '.*none'"):
        check_paths(argparse.Namespace(**{**right, "reference_statistics": [file, str(at / "none")]}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(at):
    (at / "folder").chmod(0o500)
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written to"):
        check_paths(argparse.Namespace(output_dir=str(at / "folder" / "x")))
