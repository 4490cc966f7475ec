"""Hashes that files on disk carry."""

import hashlib
import re

import numpy as np
import pytest
import torch

from diffusers_mp.files import MISSING_IS_AN_ERROR, read_json, sha256_of_file, sha256_of_weights


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
