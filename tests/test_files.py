"""Names out of files that become paths, and the hashes that files on disk carry."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from diffusers_mp.files import (
    MISSING_IS_AN_ERROR,
    component_names,
    plain_name,
    read_json,
    sha256_of_file,
    sha256_of_weights,
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


def test_json_that_is_there_or_not(tmp_path):
    (tmp_path / "index.json").write_text('{"b": [1, null]}')
    assert read_json(tmp_path / "index.json", keys=["b"]) == {"b": [1, None]}
    assert read_json(tmp_path / "none.json", {"a": 1}, keys=["b"]) == {"a": 1}
    with pytest.raises(FileNotFoundError, match=r"none.json is missing: restore it, or remove it."):
        read_json(tmp_path / "none.json", MISSING_IS_AN_ERROR)
