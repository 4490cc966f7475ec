"""What an evaluation writes, with a mark in it, so that it replaces and deletes nothing but its own.

settings.json, results.json, cells/*.json     "made_by" in the mapping
heat_map.png, cells/*.png                     "made_by" among the texts of the image
best/                                         evaluated.json in it, with the SHA-256 of each file
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.settings import shortened
from ..files import sha256_of_file, whole_folder, write_json
from ..masking import masked
from ..publishing.hub import CARD_NAME, CURVE_NAME, GRID_NAME, HEAT_MAP_NAME


MARK = {"made_by": "examples/evaluate.py of diffusers-mp"}
RECORD_NAME = "evaluated.json"


def write_own(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with the mark and without secrets, whole or not at all."""
    write_json(path, MARK | masked(content))


def read_own(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file that has the mark, without it; None for any other file, and where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not MARK.items() <= content.items():
        return None
    return {name: value for name, value in content.items() if name not in MARK}


def read_cell(path: Path) -> dict[str, Any]:
    """What the file of a cell holds; nothing if there is none, or it is not of an evaluation.

    Raises:
        ValueError: if its measures are damaged, which could pass for the best.
    """
    cell = read_own(path) or {}
    metrics = cell.get("metrics", [{"frechet_distance": 0.0}])
    is_whole = isinstance(metrics, list) and metrics and all(isinstance(each, dict) for each in metrics)
    if not is_whole or not isinstance(metrics[0].get("frechet_distance"), float):
        raise ValueError(f"{path} is damaged, its `metrics` are none: remove it, and the cell is measured again.")
    return cell


def is_own(path: Path) -> bool:
    """Whether a file or folder was made by an evaluation, and by nobody changed since if it is a folder."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return not any(path.iterdir()) or changed_file(path) is None
    if path.suffix == ".json":
        return read_own(path) is not None
    try:
        with Image.open(path) as image:
            return MARK.items() <= image.info.items()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # whatever it is, it is not ours
        return False


def changed_file(folder: Path) -> Path | None:
    """The first file of a folder that its record does not have as it is; the record itself if there is none."""
    record = read_own(folder / RECORD_NAME) or {}
    files = record.get("files")
    if not isinstance(files, dict):
        return folder / RECORD_NAME
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or path.is_file() and name != RECORD_NAME and files.get(name) != sha256_of_file(path):
            return path
    return None


def check_own(paths: Iterable[Path]) -> None:
    """Refuse to replace what an evaluation has not made.

    Args:
        paths (iterable of Path): JSON and PNG files, and folders of pipelines, that are to be written.
    Raises:
        ValueError: naming the first that is there and has no mark, or was changed.
    """
    for path in paths:
        if os.path.lexists(path) and not is_own(path):
            what = "which evaluate.py has not written"
            if path.is_dir() and not path.is_symlink() and (path / RECORD_NAME).is_file():
                what = f"in which {changed_file(path).relative_to(path)} is not as evaluate.py has written it"
            raise ValueError(
                f"`output_dir` must be a folder in which nothing is lost, it has {path}, {what}: move that away, or "
                "give another folder."
            )


def check_outputs(folder: Path, cells: Iterable[Path], *, heat_map: bool, best: bool) -> None:
    """Refuse, before any work, an output folder in which something would be replaced that is not ours.

    Args:
        folder (Path): `output_dir`.
        cells (iterable of Path): the cells' JSON files.
        heat_map, best (bool): whether these will be written.
    Raises:
        ValueError: naming what is in the way.
    """
    for path in (folder, folder / "cells", folder / "reference"):
        if os.path.lexists(path) and not path.is_dir():
            raise ValueError(f"`output_dir` must be a folder, and cells and reference in it too, {path} is a file.")
    files = [folder / "settings.json", folder / "results.json"]
    files += [path.with_suffix(suffix) for path in cells for suffix in (".json", ".png")]
    check_own([*files, *([folder / "heat_map.png"] if heat_map else []), *([folder / "best"] if best else [])])


def check_card(folder: Path) -> None:
    """Refuse, before any work, a pipeline's folder whose card cannot be written without a loss.

    Args:
        folder (Path): of the pipeline.
    Raises:
        ValueError: if it is read-only, or an image of the card would replace one that is not ours.
    """
    card = folder / CARD_NAME
    for path in (folder, card):
        if path.exists() and not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise ValueError(f"`write_card` needs a model whose card can be written, {path} is read-only.")
    # A new card brings its images, which an old one has already.
    images = [folder / name for name in (() if card.exists() else (GRID_NAME, CURVE_NAME))]
    if os.path.lexists(folder / HEAT_MAP_NAME) and not is_own(folder / HEAT_MAP_NAME):
        images.append(folder / HEAT_MAP_NAME)
    for path in images:
        if os.path.lexists(path):
            raise ValueError(f"`write_card` must not replace {path}, which evaluate.py has not written: move it away.")


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of all cells of a folder; refuse to mix cells that cannot be compared.

    Args:
        path (Path): `settings.json` of the folder.
        settings (mapping): of JSON values, all that the numbers of a cell depend on beside the cell itself.
    Raises:
        ValueError: naming what differs from the settings that are there.
    """
    stored = read_own(path)
    if stored is not None:
        # The same model may have moved.
        names = settings.keys() - {"model", "commit"}
        different = sorted(name for name in names if stored.get(name) != settings[name])
        if different:
            other_step = "step" in different and stored.get("step") is not None
            raise ValueError(
                f"`output_dir` must be new or hold cells of the same settings; {path} differs in "
                + "; ".join(_difference(name, stored.get(name), settings[name]) for name in different)
                + (f". `--step {stored['step']}` goes on with its cells" if other_step else "")
            )
    write_own(path, settings)


def _difference(name: str, stored: Any, given: Any) -> str:
    if isinstance(stored, dict) and isinstance(given, dict):
        key = next(key for key in {**stored, **given} if stored.get(key) != given.get(key))
        name, stored, given = f"{name}.{key}", stored.get(key), given.get(key)
    return f"{name}: {shortened(stored)} and {shortened(given)}"


@contextlib.contextmanager
def whole_pipeline(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """Write the folder of a pipeline whole or not at all, in place of an earlier one that nobody has changed.

    Args:
        folder (Path): `best`.
        record (mapping): what is told of it in `evaluated.json`.
    Yields:
        Path: an empty folder to write to.
    Raises:
        ValueError: as in `check_own`.
    """
    check_own([folder])
    with whole_folder(folder) as unfinished:
        yield unfinished
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        hashes = {path.relative_to(unfinished).as_posix(): sha256_of_file(path) for path in files}
        write_own(unfinished / RECORD_NAME, {**record, "files": hashes})
