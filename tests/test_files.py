"""Hashes that files on disk carry."""

import hashlib

import numpy as np
import torch

from diffusers_mp.files import sha256_of_file, sha256_of_weights


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
