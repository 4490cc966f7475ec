"""What a script says before its work: rows of the same names in every script, and what is easily overlooked."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
# Of the list of classes, which may have a thousand.
MAX_CLASS_LETTERS = 60


def start_block(rows: Mapping[str, str], warnings: Sequence[str] = ()) -> str:
    """Rows as "name  value" in two columns, and below them "warning: …", a line each."""
    width = max(map(len, rows))
    return "\n".join(
        [*(f"{name:<{width}}  {value}" for name, value in rows.items()), *(f"warning: {text}" for text in warnings)]
    )


def device_words(accelerator: "Accelerator") -> str:
    """Device, precision and processes, as in "CPU (2 threads), float32, 1 process"."""
    device, num_threads = accelerator.device, torch.get_num_threads()
    name = device.type
    if device.type == "cpu":
        name = f"CPU ({num_threads} thread{'s' if num_threads > 1 else ''})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    processes = "1 process"
    if accelerator.num_processes > 1:
        engine = "FSDP2" if accelerator.is_fsdp2 else "DDP"
        processes = f"{accelerator.num_processes} processes ({engine})"
    return f"{name}, {PRECISIONS.get(accelerator.mixed_precision, accelerator.mixed_precision)}, {processes}"


def device_warnings(accelerator: "Accelerator") -> list[str]:
    """That there is no accelerator, unless the CPU was asked for."""
    asked_for = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if accelerator.device.type != "cpu" or asked_for:
        return []
    return ["no accelerator was found: this runs on the CPU (ACCELERATE_USE_CPU=1 says that it is meant to)"]


def class_words(counts: Mapping[str, int] | None) -> str:
    """How many classes there are, and the first of them with their images.

    Args:
        counts (mapping, optional): names to numbers of images, in the order of the ids; None without classes.
    """
    if counts is None:
        return "no classes"
    shown, length = [], 0
    for name, count in counts.items():
        shown.append(f"{name} ({count:,})")
        length += len(shown[-1])
        if length > MAX_CLASS_LETTERS:
            break
    more = ", …" if len(shown) < len(counts) else ""
    return f"{len(counts):,} class{'es' if len(counts) != 1 else ''}: {', '.join(shown)}{more}"


def class_warnings(counts: Mapping[str, int] | None) -> list[str]:
    """That classes are none, one, or without images; `counts` as in `class_words`."""
    if counts is None:
        return ["no classes were found, so the model is unconditional: a class is a folder, or a column of labels"]
    warnings, empty = [], [name for name, count in counts.items() if not count]
    if len(counts) == 1:
        warnings.append(
            "there is one class only, and nothing to tell it from: --label_column none trains without classes"
        )
    if empty:
        listed = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        warnings.append(f"{len(empty):,} of {len(counts):,} classes have no image to train on: {listed}")
    return warnings


def gibibytes(num_bytes: float) -> str:
    """A size in GiB, or in MiB if it is small."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.1f} MiB"
