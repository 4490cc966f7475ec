"""SHA-256 of files and of weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and values, wherever they lie. Latents and reference statistics store it: it must not change."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        # As bytes, since NumPy has no bfloat16.
        content.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return content.hexdigest()
