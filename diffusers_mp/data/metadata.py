"""Label files beside images: `metadata.csv`, `.jsonl`, `.parquet` of `datasets`, and EDM's `dataset.json`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet

from .folders import FolderListing


FILE_COLUMN = "file_name"


def read_metadata(listing: FolderListing) -> list[dict[str, Any]]:
    """What label files say of each image.

    Args:
        listing (FolderListing): with `metadata`, whose rows name images relative to the file's own folder.
    Returns:
        list of dict: for each of `listing.images` its columns, without the name. Cells of a CSV are text; an empty one
        is None.
    Raises:
        ValueError: naming file and line, if a file is damaged, names an image that is not there or twice, or an image
            is in none.
    """
    images, elsewhere, rows = set(listing.images), set(listing.elsewhere), {}
    for name in listing.metadata:
        folder = PurePosixPath(name).parent
        for number, row in _rows_of(listing.root / name):
            where = f"{listing.root / name}, row {number}"
            if not isinstance(row, dict) or not isinstance(row.get(FILE_COLUMN), str):
                raise ValueError(
                    f"{where}, must have a column `{FILE_COLUMN}` with the name of an image, got {row!r}."
                )
            image = str(folder / row.pop(FILE_COLUMN))
            if image in elsewhere:
                continue
            if image not in images:
                # Also what lies outside of the folder: a name is looked up, and never opened.
                raise ValueError(f"{where}, must name an image that can be read in this folder, got {image!r}.")
            if image in rows:
                raise ValueError(f"{where}, names {image!r} again: each image takes one row.")
            rows[image] = row
    if not rows and all(name.endswith(".json") for name in listing.metadata):
        return [
            {} for _ in listing.images
        ]  # `"labels": null`, as the tools of EDM write it for images without classes
    if missing := [image for image in listing.images if image not in rows]:
        raise ValueError(
            f"{', '.join(listing.metadata)} in {listing.root} must have a row for each image, {len(missing)} of "
            f"{len(images)} have none, such as {missing[0]!r}: add them, or move the images out."
        )
    return [rows[image] for image in listing.images]


def _rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows and their numbers, as an editor shows them."""
    number = 0
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                for row in (reader := csv.DictReader(file, strict=True)):
                    number = reader.line_num
                    if None in row or None in row.values():
                        raise ValueError("it has not as many cells as the first line has names")
                    yield number, {name: cell or None for name, cell in row.items()}
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, json.loads(line)
        elif path.suffix == ".parquet":
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist())
        else:
            labels = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
            for number, (name, label) in enumerate(labels or []):
                yield number, {FILE_COLUMN: name, "label": label}
    except (ValueError, csv.Error, KeyError, TypeError, pyarrow.ArrowInvalid) as error:
        raise ValueError(
            f"{path} must be a table of images, row {number} or the next cannot be read: "
            f"{type(error).__name__}: {error}."
        ) from error
