"""SHA-256 of files and of weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's content.

    Args:
        path (path): the file.
    Returns:
        str: 64 hexadecimal digits.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and values, whatever device they are on. What it gives is stored with latents and statistics.

    Args:
        tensors (mapping): name to tensor, such as a `state_dict`, in any order.
    Returns:
        str: 64 hexadecimal digits.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        # As bytes, since NumPy has no bfloat16.
        content.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return content.hexdigest()
