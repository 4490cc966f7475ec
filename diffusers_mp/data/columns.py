"""Columns of images and of classes: what they must hold, and the ids and names that come of it."""

from typing import Any

import datasets
import pyarrow as pa

from .folders import class_order


# What a column of text is, made by different libraries.
STRINGS = (datasets.Value("string"), datasets.Value("large_string"))
# What a column of classes may be called, in a table without `label`.
LABEL_WORDS = ("label", "class", "cls", "category", "target")


def image_column_of(
    dataset: datasets.Dataset | datasets.IterableDataset, image_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """The data with undecoded images, so that a damaged one can be named.

    Raises:
        ValueError: if the column is missing or holds no images.
    """
    columns = dataset.column_names
    if columns is None:
        raise ValueError(
            "`streaming` needs a source that tells its columns beforehand, as parquet and JSON lines do; "
            "`dataset_name` does not."
        )
    if image_column not in columns:
        images = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
        hint = f"; images are in {', '.join(map(repr, images))}" if images else ""
        raise ValueError(f"`image_column` must be one of {columns}, got {image_column!r}{hint}.")
    kind = dataset.features[image_column]
    if kind in STRINGS:
        # A data set could name any file of this machine.
        raise ValueError(
            f"`image_column` must hold images, {image_column!r} holds text. Files that a data set names are not "
            "opened: put them in a folder, with a metadata.csv that has a column file_name."
        )
    try:
        return dataset.cast_column(image_column, datasets.Image(decode=False))
    except (ValueError, TypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"`image_column` must hold images, {image_column!r} holds {kind}.") from error


def check_bytes(
    dataset: datasets.Dataset | datasets.IterableDataset, image_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """The data, whose images have to be in it: a data set could name any file of this machine.

    Raises:
        ValueError: naming a row that has a path and no bytes; of a stream when it is read.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(_with_bytes, fn_kwargs={"image_column": image_column}, features=dataset.features)
    first = 0
    for chunk in dataset.data.column(image_column).chunks:
        content, path = chunk.field("bytes"), chunk.field("path")
        outside = pa.compute.and_(content.is_null(), path.is_valid())
        if pa.compute.any(outside).as_py():
            row = outside.index(True).as_py()
            _refuse_path(image_column, f"row {first + row}", path[row].as_py())
        first += len(chunk)
    return dataset


def _with_bytes(row: dict[str, Any], image_column: str) -> dict[str, Any]:
    cell = row[image_column] or {}
    if cell.get("bytes") is None and cell.get("path") is not None:
        _refuse_path(image_column, "a row", cell["path"])
    return row


def _refuse_path(image_column: str, where: str, path: str) -> None:
    raise ValueError(
        f"`image_column` must hold the images themselves, {image_column!r} names a file in {where} ({path!r}). Files "
        "that a data set names are not opened: put them in a folder, with a metadata.csv that has a column file_name."
    )


def label_column_of(dataset: datasets.Dataset | datasets.IterableDataset, label_column: str | None) -> str | None:
    """The column of the classes, None without classes.

    Raises:
        ValueError: if it is missing, or the default is and another may be meant.
    """
    columns = dataset.column_names
    if label_column is None or label_column in columns:
        return label_column
    if label_column != "label":
        raise ValueError(f"`label_column` must be one of {columns}, or none, got {label_column!r}.")
    meant = [
        name
        for name, kind in dataset.features.items()
        if isinstance(kind, datasets.ClassLabel) or any(word in name.lower() for word in LABEL_WORDS)
    ]
    if meant:
        raise ValueError(
            f"`label_column` must say whether {', '.join(map(repr, meant))} holds the classes: name it, or none "
            "trains without classes."
        )
    return None


def class_names(
    dataset: datasets.Dataset, label_column: str, image_column: str
) -> tuple[datasets.Dataset, dict[int, str]]:
    """The data with ids for labels, and the names of the ids.

    Raises:
        ValueError: if a label is missing, or they are neither names nor ids from 0 without a gap.
    """
    kind, labels = dataset.features[label_column], dataset[label_column][:]
    empty = next((row for row, label in enumerate(labels) if label is None or label == "" or label != label), None)
    if empty is not None:
        cell = dataset[empty][image_column]
        where = f"row {empty}" + (f" ({cell['path']})" if isinstance(cell, dict) and cell.get("path") else "")
        raise ValueError(f"`label_column` must have a label in each row, {label_column!r} has none in {where}.")
    if kind in STRINGS:
        names = class_order(labels, f"column {label_column!r}")
        ids = {name: id_ for id_, name in enumerate(names)}
        dataset = dataset.remove_columns(label_column).add_column(label_column, [ids[label] for label in labels])
        return dataset.cast_column(label_column, datasets.ClassLabel(names=names)), dict(enumerate(names))
    ids = labels if isinstance(labels[0], (dict, list)) else sorted(set(labels))
    wrong = [id_ for id_ in ids if not isinstance(id_, int) or isinstance(id_, bool) or id_ < 0]
    if wrong:
        raise ValueError(f"`label_column` must hold names or ids from 0 up, {label_column!r} holds {wrong[0]!r}.")
    if isinstance(kind, datasets.ClassLabel):
        return dataset, dict(enumerate(kind.names))
    if max(ids) >= len(ids):
        missing = next(id_ for id_, found in enumerate(ids) if id_ != found)
        raise ValueError(f"Ids must run from 0 without a gap, {label_column!r} has {max(ids)} but not {missing}.")
    return dataset, {id_: str(id_) for id_ in ids}


def class_names_of_stream(dataset: datasets.IterableDataset, label_column: str) -> dict[int, str]:
    """Names of the ids, as far as they can be told before a stream is read; empty for bare ids.

    Raises:
        ValueError: if the column holds neither classes with names nor ids.
    """
    kind = dataset.features[label_column]
    if isinstance(kind, datasets.ClassLabel):
        return dict(enumerate(kind.names))
    if not isinstance(kind, datasets.Value) or not kind.dtype.startswith(("int", "uint")):
        raise ValueError(
            f"`streaming` needs ids or classes with names in `label_column`, {label_column!r} holds {kind}: the ids "
            "of other labels are known only when all are read."
        )
    return {}
