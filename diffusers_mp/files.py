"""Files that are there whole or not at all, full disks, JSON, and SHA-256 of files and of weights."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

# What a killed process leaves has this suffix, and may be deleted once no process writes there.
UNFINISHED = ".unfinished"
MISSING_IS_AN_ERROR = object()
_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
# PyTorch's writer forgets why it could write no more.
_PYTORCH_WRITES_NO_MORE = "[enforce fail at inline_container.cc"


class NoSpaceError(OSError):
    """A file that could not be written because a disk, a quota or a limit is used up."""


@contextlib.contextmanager
def space_for(path: str | Path, num_bytes: int | None = None) -> Iterator[None]:
    """Say what could not be written and how much is free, where the disk turns out to be full inside of the block.

    Args:
        path (str or Path): the file or folder that is written.
        num_bytes (int, optional): how much it takes.
    Raises:
        NoSpaceError: for an error of Python, safetensors or PyTorch that says so in its words.
    """
    try:
        yield
    except NoSpaceError:
        raise
    except BaseException as error:  # `torch.distributed.checkpoint` has one that is no Exception
        # By its text: safetensors' and PyTorch's errors have no number, and those of many processes come as one.
        text = f"{error} {error.__cause__} {error.__context__}"
        reasons = [reason for reason in _FULL if reason in text]
        if not reasons and _PYTORCH_WRITES_NO_MORE not in text:
            raise
        folder = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
        free = f"{in_units(shutil.disk_usage(folder).free)} are free there"
        needed = "" if num_bytes is None else f"it takes more than {in_units(num_bytes)}, and "
        raise NoSpaceError(
            f"{path} could not be written ({reasons[0] if reasons else 'the disk takes no more'}): {needed}{free}. "
            "Make room; what was there before is untouched."
        ) from error


def in_units(num_bytes: int) -> str:
    """A number of bytes as a person reads it, in MB or GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file that is there whole or not at all, whenever a kill comes, and then outlasts the machine.

        with whole_file(path) as unfinished:
            save_file(tensors, unfinished)

    Several processes may write the same file. An error leaves the former file, or none.

    Args:
        path (str or Path): the file; its folder is made if missing.
    Yields:
        Path: where to write it.
    Raises:
        NoSpaceError: if the disk is full.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    with space_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            sync(unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder that is there whole or not at all. One that is there already is replaced, or kept after an error.

    Args:
        path (str or Path): the folder.
    Yields:
        Path: an empty folder to write to, beside it.
    Raises:
        NoSpaceError: if the disk is full.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with space_for(path):
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            if path.exists():
                discard_folder(path)
            unfinished.rename(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def remove_unfinished(folder: str | Path) -> None:
    """Delete what killed processes have left in a folder, which may be missing, once no process writes there."""
    for path in Path(folder).glob(f"*{UNFINISHED}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def discard_folder(path: str | Path) -> None:
    """Delete a folder that must never be there in part: it loses its name first."""
    path = Path(path)
    discarded = path.with_name(f"{path.name}.discarded{UNFINISHED}")
    shutil.rmtree(discarded, ignore_errors=True)
    path.rename(discarded)
    shutil.rmtree(discarded)


def sync(path: str | Path) -> None:
    """Put a file, or the names in a folder, on the disk, where they outlast the machine and not only the process."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(
    path: str | Path,
    default: Any = None,
    *,
    keys: Iterable[str] | Mapping[str, type] = (),
    way_out: str = "restore it, or remove it",
) -> Any:
    """Content of a JSON file that holds an object, or `default` if there is no such file.

    Args:
        path (str or Path): the file.
        default: what is returned without it; `MISSING_IS_AN_ERROR` raises.
        keys (iterable of str, or mapping): what the object must have; a mapping has the type of each value.
        way_out (str): what to do about a damaged file, for the message.
    Raises:
        FileNotFoundError: if there is none and must be one.
        ValueError: if it is damaged, or holds something else; names the file.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        if default is MISSING_IS_AN_ERROR:
            raise FileNotFoundError(f"{path} is missing: {way_out}.") from None
        return default
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, it is no text ({error.reason}): {way_out}.") from error
    return parse_json(content, path, keys=keys, way_out=way_out)


def parse_json(
    text: str, source: str | Path, *, keys: Iterable[str] | Mapping[str, type] = (), way_out: str
) -> dict[str, Any]:
    """What a JSON text holds, which must be an object with these keys; a `ValueError` names `source`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = str(error) if text.strip() else "it is empty"
        raise ValueError(f"{source} is damaged, it is no JSON ({said}): {way_out}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} must hold a JSON object, it holds a {type(content).__name__}: {way_out}.")
    check_keys(content, source, keys, way_out)
    return content


def check_keys(
    content: dict[str, Any], source: str | Path, keys: Iterable[str] | Mapping[str, type], way_out: str
) -> None:
    """Refuse what a JSON object lacks, or has of another type, with a `ValueError` that names `source`."""
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{source} is damaged, it lacks {', '.join(missing)}: {way_out}.")
    for key, kind in keys.items() if isinstance(keys, Mapping) else ():
        if not isinstance(content[key], kind):
            raise ValueError(f"{source} is damaged, its {key} is {content[key]!r}: {way_out}.")


def write_json(path: str | Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def plain_name(name: Any, source: str | Path) -> str:
    """A name out of a file, if it can become a path: one component of it, on every system, and no way up.

    Args:
        name (Any): what the file has.
        source (str or Path): the file, for the error.
    Returns:
        str: the name.
    Raises:
        ValueError: if it is empty, dots alone, has a separator, a drive or a control character, or is no text.
    """
    # Windows ends a name before dots and spaces, and knows both separators and "drive:" or "file:stream".
    if not isinstance(name, str) or not name.strip(". ") or any(c in "/\\:" or ord(c) < 32 for c in name):
        raise ValueError(f"{source} must name files and folders beside it by one plain name each, got {name!r}.")
    return name


def component_names(folder: str | Path) -> list[str]:
    """Names of the parts that the pipeline in a folder has, which are their folders' names.

    Args:
        folder (str or Path): with a `model_index.json`.
    Returns:
        list of str: in the order of the index.
    Raises:
        ValueError: if one is a path instead of a name.
    """
    # Of a part: its library and its class, both null if it was left out. What begins with "_" is about the index.
    path, way_out = Path(folder) / "model_index.json", "save the pipeline again, or take an intact copy"
    return [
        plain_name(name, path)
        for name, value in read_json(path, MISSING_IS_AN_ERROR, way_out=way_out).items()
        if not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, str) for v in value)
    ]


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's content.

    Args:
        path (path): the file.
    Returns:
        str: 64 hexadecimal digits.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """SHA-256 of names and values, whatever device they are on. What it gives is stored with latents and statistics.

    Args:
        tensors (mapping): name to tensor, such as a `state_dict`, in any order.
    Returns:
        str: 64 hexadecimal digits.
    """
    import torch  # here, so that what reads JSON alone starts at once

    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        # As bytes, since NumPy has no bfloat16.
        content.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return content.hexdigest()
