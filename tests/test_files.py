"""Names out of files that become paths, and the hashes that files on disk carry."""

import contextlib
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from helpers import full_disk
from PIL import Image
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from diffusers_mp.files import (
    MISSING_IS_AN_ERROR,
    NoSpaceError,
    component_names,
    in_units,
    plain_name,
    read_json,
    remove_unfinished,
    sha256_of_file,
    sha256_of_weights,
    space_for,
    whole_file,
    whole_folder,
    write_json,
)


# What would be a path elsewhere, here or on Windows, or none.
PATHS = (
    "/etc",
    "..",
    "../x",
    "a/b",
    "a/",
    "./a",
    "",
    ".",
    "...",
    " ",
    ".. ",
    "a\\b",
    "\\\\host",
    "C:x",
    "a:b",
    "a\0b",
    "a\nb",
)


@pytest.mark.parametrize("name", [*PATHS, None, 3, ["vae"]])
def test_a_name_out_of_a_file_is_one_plain_component(name):
    with pytest.raises(ValueError, match="index.json must name files and folders beside it by one plain name") as e:
        plain_name(name, "index.json")
    assert repr(name) in str(e.value)


@pytest.mark.parametrize("name", ["vae", "shard-00000.safetensors", ".hidden", "a b", "..a", "model.fp16"])
def test_a_plain_name_stays(name):
    assert plain_name(name, "index.json") == name


@pytest.mark.parametrize("name", PATHS)
def test_the_parts_of_a_pipeline_have_plain_names(name, tmp_path):
    index = {"_class_name": "A", "vae": ["diffusers", "B"], "scheduler": [None, None], "id2label": {"0": "/"}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert component_names(tmp_path) == ["vae"]
    (tmp_path / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "B"]}))
    with pytest.raises(ValueError, match="model_index.json must name files and folders beside it by one plain name"):
        component_names(tmp_path)


TENSORS = {"weight": torch.zeros(10_000)}
WRITERS = {
    "text": lambda path: path.write_text("x" * 10_000),
    "safetensors": lambda path: save_file(TENSORS, path),
    "torch": lambda path: torch.save(TENSORS, path),
    "image": lambda path: Image.effect_noise((99, 99), 50).save(path, format="PNG"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_with_the_file_and_leaves_the_former_one(name, tmp_path):
    path = tmp_path / "new" / "file"
    write_json(path, "former")
    reason = "the disk takes no more" if name == "torch" else "File too large"
    message = rf"^{re.escape(str(path))} could not be written \({reason}\): [\d.]+ [MG]B are free there\. Make room; "
    with pytest.raises(NoSpaceError, match=message) as caught, full_disk(1000), whole_file(path) as unfinished:
        WRITERS[name](unfinished)
    assert caught.value.__cause__ is not None
    assert path.read_text() == '"former"\n'
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_full_disk_is_told_from_the_errors_of_all_processes_and_with_what_it_takes(tmp_path):
    path = tmp_path / "checkpoint"
    message = rf"^{re.escape(str(path))} could not .* no more\): it takes more than 2.50 GB, and .* are free there"
    with pytest.raises(NoSpaceError, match=message), space_for(path, 2_500_000_000), full_disk(1000):
        dcp.save(TENSORS, checkpoint_id=path)


def test_no_space_left_on_the_device(tmp_path):
    with (
        pytest.raises(NoSpaceError, match=r"curve could not be written \(No space left on device\)"),
        space_for(tmp_path / "curve"),
        open("/dev/full", "w") as file,
    ):
        file.write("1")


def test_one_error_is_named_once_and_others_stay_what_they_are(tmp_path):
    with pytest.raises(NoSpaceError, match="^inner could not"):
        with space_for("outer"), space_for("inner"), full_disk():
            (tmp_path / "file").write_text("1")
    for error in (PermissionError(13, "Permission denied"), KeyboardInterrupt(), ValueError("7")):
        with pytest.raises(type(error)) as caught, space_for("outer"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("ends", ["full", "error", "well"])
def test_a_folder_is_there_whole_or_as_it_was(ends, tmp_path):
    path = tmp_path / "folder"
    write_json(path / "former", 1)
    errors = {"full": NoSpaceError, "error": KeyError}
    expected = pytest.raises(errors[ends]) if ends in errors else contextlib.nullcontext()
    with expected, whole_folder(path) as unfinished:
        with full_disk(100):
            (unfinished / "new").write_text("x" * (1000 if ends == "full" else 10))
        if ends == "error":
            raise KeyError
    assert [file.name for file in path.iterdir()] == ["new" if ends == "well" else "former"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_left_unfinished_is_removed(tmp_path):
    (tmp_path / "a.unfinished" / "b").mkdir(parents=True)
    for name in ("c.7.unfinished", "d", "unfinished"):
        (tmp_path / name).write_text("")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "unfinished"]
    remove_unfinished(tmp_path / "missing")


def test_sizes_in_units():
    assert [in_units(size) for size in (0, 999_949_999, 1_000_000_000, 2_345_000_000)] == [
        *("0.0 MB", "999.9 MB", "1.00 GB", "2.35 GB"),
    ]


def test_weights_are_hashed_by_name_and_value():
    weights = {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.tensor(2, dtype=torch.int64)}
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    # In the order of the names, each tensor row by row.
    content = b"a" + np.int64(2).tobytes() + b"b" + values.tobytes()
    assert sha256_of_weights(weights) == hashlib.sha256(content).hexdigest()
    assert sha256_of_weights(dict(sorted(weights.items()))) == sha256_of_weights(weights)
    weights["b"][0, 0] += 1
    assert sha256_of_weights(weights) != hashlib.sha256(content).hexdigest()


def test_weights_of_every_dtype_and_parameters_are_hashed():
    values = torch.tensor([1.0, -2.5])
    parameter = torch.nn.Parameter(values.bfloat16())
    digest = hashlib.sha256(b"w" + values.bfloat16().view(torch.int16).numpy().tobytes()).hexdigest()
    assert sha256_of_weights({"w": parameter}) == digest


def test_a_file_is_hashed_by_its_content(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is damaged, it is no JSON (it is empty): make it anew."),
        (b'{"a": 1', "is damaged, it is no JSON (Expecting ',' delimiter: line 1 column 8 (char 7)): make it anew."),
        (b"\xff\xfe", "is damaged, it is no text (invalid start byte): make it anew."),
        (b"[" * 100_000, "is damaged, it is no JSON (maximum recursion depth exceeded"),
        (b"[1]", "must hold a JSON object, it holds a list: make it anew."),
        (b'{"a": 1}', "is damaged, it lacks b: make it anew."),
    ],
)
def test_damaged_json_is_named_with_a_way_out(tmp_path, content, said):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'index.json'} {said}")):
        read_json(tmp_path / "index.json", keys=["b"], way_out="make it anew")


def test_a_value_of_another_type_is_named(tmp_path):
    (tmp_path / "index.json").write_text('{"a": 1, "b": "x"}')
    assert read_json(tmp_path / "index.json", keys={"a": int, "b": str}) == {"a": 1, "b": "x"}
    with pytest.raises(ValueError, match="index.json is damaged, its b is 'x': restore it, or remove it."):
        read_json(tmp_path / "index.json", keys={"a": int, "b": list})


def test_json_that_is_there_or_not(tmp_path):
    (tmp_path / "index.json").write_text('{"b": [1, null]}')
    assert read_json(tmp_path / "index.json", keys=["b"]) == {"b": [1, None]}
    assert read_json(tmp_path / "none.json", {"a": 1}, keys=["b"]) == {"a": 1}
    with pytest.raises(FileNotFoundError, match=r"none.json is missing: restore it, or remove it."):
        read_json(tmp_path / "none.json", MISSING_IS_AN_ERROR)
