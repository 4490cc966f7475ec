"""One reader of images and classes, from a folder or through `datasets`, without decoding an image.

A folder is walked by `folders.py`, its label files are read by `metadata.py`; tables and archives are opened by
`datasets`. Whatever the source, the data are rows of `datasets` with an undecoded image column.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from ..sources import check_dataset_reachable, naming
from ..start_block import class_warnings, class_words
from .columns import check_bytes, class_names, class_names_of_stream, image_column_of, label_column_of
from .folders import FolderListing, class_order, classes_of, list_folder, paths_in_split
from .metadata import read_metadata


SHUFFLE_BUFFER_SIZE = 1000


@dataclass
class SourceReport:
    """What a source of images holds, for people.

    Attributes:
        origin (str): folder or name of the data set.
        layout (str): how it is laid out, in words.
        num_images (int, optional): None for a stream.
        counts (dict[str, int], optional): images of each class, in the order of ids; None without classes, or if only
            the end of a stream will tell.
        left_out (dict[str, list[str]]): what was not taken, by the reason.
        warnings (list[str]): what is legal, and seldom meant.
    """

    origin: str
    layout: str
    num_images: int | None = None
    counts: dict[str, int] | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Images and classes, what is left out, warnings: a line each."""
        number = "a stream of images" if self.num_images is None else f"{self.num_images:,} images"
        lines = [f"{self.origin}: {number}, {self.layout}"]
        if self.counts is not None:
            lines.append(class_words(self.counts))
            lines += [f"warning: {warning}" for warning in class_warnings(self.counts)]
        return lines + self.notes()

    def notes(self) -> list[str]:
        """What is left out, a line for each reason, and the warnings: what a start block does not say."""
        notes = [f"left out: {len(names):,}, {reason}, such as {names[0]}" for reason, names in self.left_out.items()]
        return notes + [f"warning: {warning}" for warning in self.warnings]


class ImageSource(NamedTuple):
    """Data, the names of the classes, and what there is to say about them."""

    dataset: datasets.Dataset | datasets.IterableDataset
    id2label: dict[int, str] | None
    report: SourceReport


def load_image_dataset(
    train_data_dir: str | os.PathLike | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    class_level: str | None = None,
    cache_dir: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    max_train_samples: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    skip_corrupt: bool = False,
) -> ImageSource:
    """Opens a folder of images, or a data set known to `datasets`, without decoding an image.

    Args:
        train_data_dir (str): folder of images with a sub-folder for each class, of images alone, or of images and a
            label file (`metadata.csv`, `.jsonl` or `.parquet` with a column `file_name`, or the `dataset.json` of
            EDM); or of parquet files, WebDataset archives, or what `Dataset.save_to_disk` wrote.
        dataset_name, dataset_config_name (str): what `datasets.load_dataset` is asked for instead. The name of a
            folder is taken as `train_data_dir`.
        split (str): of a data set [train], or the name of the folders that images are taken from.
        class_level (str): "first" or "last", the folder of a path that names the class, where there are several.
        cache_dir (str): where `datasets` keeps its tables.
        image_column, label_column (str): names of the columns. The default `label` may be missing: unlabelled data.
            With None, labels are neither looked for nor checked, and a folder may have any layout.
        max_train_samples (int): keep only so many, drawn with `seed`, because sources are often sorted by class. A
            stream is drawn from `SHUFFLE_BUFFER_SIZE` images at a time.
        seed (int): of that choice.
        streaming (bool): read a data set as it comes instead of keeping a copy of it in `cache_dir`.
        skip_corrupt (bool): leave out images that cannot be read here, instead of raising.
    Returns:
        ImageSource: the data; the names of the classes, None if unlabelled, empty if only the end of a stream will
        tell how many ids there are; and a report.
    Raises:
        ValueError: if not exactly one source is given, its layout could mean two things, a class has no image, or a
            column is missing or holds something else.
        OSError: for what cannot be opened.
    """
    if (train_data_dir is None) == (dataset_name is None):
        sources = f"got {train_data_dir!r} and {dataset_name!r}"
        raise ValueError(f"Exactly one of `train_data_dir` and `dataset_name` must be given, {sources}.")
    for name, value in {"train_data_dir": train_data_dir, "dataset_name": dataset_name}.items():
        if value is not None and not str(value).strip():
            raise ValueError(f"`{name}` must not be empty, got {value!r}.")
    if dataset_name is not None and Path(dataset_name).is_dir():
        train_data_dir = dataset_name
    if class_level not in (None, "first", "last"):
        raise ValueError(f"`class_level` must be 'first' or 'last', got {class_level!r}.")

    # What there is
    options = {"name": dataset_config_name, "cache_dir": cache_dir, "streaming": streaming}
    if train_data_dir is None:
        if class_level is not None:
            raise ValueError("`class_level` is for a folder of images, `dataset_name` has columns.")
        check_dataset_reachable(dataset_name, cache_dir)
        with naming("dataset_name", dataset_name):
            dataset = datasets.load_dataset(dataset_name, split=split or "train", **options)
        report = SourceReport(str(dataset_name), f"split {split or 'train'}")
        names_own_files = dataset.info.builder_name == "imagefolder"
    elif not Path(train_data_dir).is_dir():
        raise ValueError(f"`train_data_dir` must be a folder of images, got {str(train_data_dir)!r}.")
    else:
        listing = list_folder(train_data_dir)
        report = SourceReport(str(train_data_dir), "", left_out=listing.left_out)
        if listing.images or not (listing.tables or listing.containers or listing.metadata):
            if streaming:
                raise ValueError("`streaming` is for data sets: of a folder of images no copy is made.")
            names_own_files = True
            if dataset_config_name is not None:
                raise ValueError(f"`dataset_config_name` is for data sets, {str(train_data_dir)!r} holds images.")
            dataset = _rows_of_folder(listing, report, split, class_level, label_column, skip_corrupt)
        else:
            if class_level is not None:
                raise ValueError(f"`class_level` is for images in folders, {str(train_data_dir)!r} holds a table.")
            names_own_files = False
            with naming("train_data_dir", train_data_dir):
                dataset = _rows_of_tables(listing, report, split, options)

    # What of it are images and classes
    dataset = image_column_of(dataset, image_column)
    if not names_own_files:
        dataset = check_bytes(dataset, image_column)
    label_column = label_column_of(dataset, label_column)
    id2label = None
    if label_column is not None and streaming:
        id2label = class_names_of_stream(dataset, label_column)
    elif label_column is not None:
        dataset, id2label = class_names(dataset, label_column, image_column)
    if max_train_samples is not None and streaming:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_SIZE).take(max_train_samples)
    elif max_train_samples is not None and max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_train_samples))
    if not streaming:
        _count(dataset, label_column, id2label, report)
    if id2label is None:
        report.layout += ", no classes"
    return ImageSource(dataset, id2label, report)


def _count(
    dataset: datasets.Dataset, label_column: str | None, id2label: dict[int, str] | None, report: SourceReport
) -> None:
    report.num_images = len(dataset)
    if id2label is None:
        return
    counts = np.bincount(dataset[label_column][:], minlength=len(id2label))
    report.counts = {name: int(counts[id_]) for id_, name in id2label.items()}


def _rows_of_folder(
    listing: FolderListing,
    report: SourceReport,
    split: str | None,
    class_level: str | None,
    label_column: str | None,
    skip_corrupt: bool,
) -> datasets.Dataset:
    """One row for each image, with its class, or with what label files say of it."""
    root = f"`train_data_dir` ({str(listing.root)!r})"
    if not listing.images:
        found = {**listing.unreadable, **listing.left_out}
        words = ", ".join(f"{len(names)} files: {reason}" for reason, names in found.items()) or "nothing"
        raise ValueError(f"{root} must be a folder of images, it holds {words}.")
    paths = paths_in_split(listing, split, class_level)
    others = listing.tables + listing.containers
    if class_level is not None or label_column is None and not listing.metadata:
        # The folders were said to be the classes, or nobody asked for any.
        others, listing.metadata = [], [] if class_level is not None else listing.metadata
        for name in sorted({*listing.tables, *listing.containers}):
            listing.left_out["label files and archives, not read"].append(name)
    if others:
        raise ValueError(
            f"{root} holds images and also {others[0]!r}"
            + (f" and {len(others) - 1} more such files" if len(others) > 1 else "")
            + ", which would be ignored. Make it `metadata.csv` with the columns file_name and label, or unpack it, "
            "or move it elsewhere; `class_level` first or last takes the folders' names as classes and leaves it out."
        )
    for reason, names in listing.unreadable.items():
        if not skip_corrupt:
            raise ValueError(
                f"{root} holds {len(names)} images that cannot be read, {names[0]!r}: {reason}. Move them "
                "elsewhere, or leave them out by `skip_corrupt`."
            )
        listing.left_out[reason] = names

    # Classes of folders, or columns of label files
    features = datasets.Features({"image": datasets.Image(decode=False)})
    columns: dict[str, Any] = {"image": [{"path": str(listing.root / name), "bytes": None} for name in listing.images]}
    if listing.metadata:
        rows = read_metadata(listing)
        names = sorted({name for row in rows for name in row})
        if label_column is not None and label_column not in names and any("/" in path for path in paths.values()):
            raise ValueError(
                f"{', '.join(listing.metadata)} in {root} must have a column {label_column!r}, beside which folders "
                f"name no classes, got {names}; `class_level` first or last takes the folders' names."
            )
        columns |= {name: [row.get(name) for row in rows] for name in names}
        report.layout = f"labels of {', '.join(listing.metadata)}"
        try:
            return datasets.Dataset.from_dict(columns).cast_column("image", features["image"])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(
                f"{', '.join(listing.metadata)} in {root} must hold values of one kind in each column: {error}."
            ) from error
    classes = None
    report.layout = "in one place"
    if label_column is not None:
        classes, report.warnings = classes_of(listing, paths, class_level)
    if classes is not None:
        names = class_order(classes.values(), root)
        ids = {name: id_ for id_, name in enumerate(names)}
        columns["label"] = [ids[classes[name]] for name in listing.images]
        features["label"] = datasets.ClassLabel(names=names)
        report.layout = f"classes are the {class_level or 'only'} level of folders"
    elif any("/" in path for path in paths.values()):
        report.layout = "in several folders, whose names are not looked at"
    if split is not None:
        report.layout += f", under {split!r}"
    return datasets.Dataset.from_dict(columns, features=features)


def _rows_of_tables(
    listing: FolderListing, report: SourceReport, split: str | None, options: dict[str, Any]
) -> datasets.Dataset | datasets.IterableDataset:
    """What `datasets` makes of a folder of parquet files, of archives, or of what it has saved itself."""
    root, names = str(listing.root), sorted(listing.tables + listing.containers + listing.metadata)
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    if {"dataset_dict.json", "dataset_info.json", "state.json"} & set(names):
        dataset = datasets.load_from_disk(root)
        if options["streaming"]:
            raise ValueError("`streaming` is for data sets that are read elsewhere, `train_data_dir` is one on disk.")
        parts = dict(dataset) if isinstance(dataset, datasets.DatasetDict) else None
        report.layout = "written by save_to_disk"
    elif suffixes <= {".parquet"} or suffixes <= {".tar"}:
        builder = datasets.load_dataset_builder(root, options["name"], cache_dir=options["cache_dir"])
        parts = {str(name): None for name in builder.config.data_files}
        report.layout = f"{len(names)} {suffixes.pop()[1:]} files"
    else:
        raise ValueError(
            f"`train_data_dir` ({root!r}) holds no image, and {names[0]!r}"
            + (f" with {len(names) - 1} more such files" if len(names) > 1 else "")
            + ". Read are images, parquet files, WebDataset archives (.tar) and what `Dataset.save_to_disk` wrote: "
            "unpack other archives; a table goes beside its images, as metadata.csv with a column file_name."
        )
    if parts is None:
        if split is not None:
            raise ValueError(f"`split` needs a data set with splits, {root!r} is one without, got {split!r}.")
        return dataset
    if split is None and len(parts) > 1:
        raise ValueError(f"`split` must say which of {sorted(parts)} of {root!r} is meant.")
    split = split or next(iter(parts))
    if split not in parts:
        raise ValueError(f"`split` must be one of {sorted(parts)} in {root!r}, got {split!r}.")
    report.layout += f", split {split}"
    return parts[split] if parts[split] is not None else datasets.load_dataset(root, split=split, **options)
