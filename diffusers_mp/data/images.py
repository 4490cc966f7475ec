"""Images from a folder or a data set, and the names of their classes."""

import glob
import os
from pathlib import Path

import datasets
from PIL import Image

from ..sources import check_dataset_reachable


SHUFFLE_BUFFER_SIZE = 1000
# What a column of text is, made by different libraries.
STRINGS = (datasets.Value("string"), datasets.Value("large_string"))


def load_image_dataset(
    train_data_dir: str | os.PathLike | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    max_train_samples: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> tuple[datasets.Dataset | datasets.IterableDataset, dict[int, str] | None]:
    """Opens a folder of images, or a data set known to `datasets`, without decoding an image.

    Args:
        train_data_dir (str): folder of images, all that lie under it, but for names that begin with "." or "__",
            which `datasets` passes over. Sub-folders are classes, ids in the order of their names; without
            sub-folders, or with a single one, the data are unlabelled.
        dataset_name, dataset_config_name, split (str): what `datasets.load_dataset` is asked for instead.
        cache_dir (str): where `datasets` keeps its tables.
        image_column, label_column (str): names of the columns. The default `label` may be missing: unlabelled data.
            With None, labels are neither looked for nor checked.
        max_train_samples (int): keep only so many, drawn with `seed`, because sources are often sorted by class. A
            stream is drawn from `SHUFFLE_BUFFER_SIZE` images at a time.
        seed (int): of that choice.
        streaming (bool): read the source as it comes instead of keeping a copy of it in `cache_dir`.
    Returns:
        tuple[datasets.Dataset | datasets.IterableDataset, dict[int, str] | None]: the data, and the names of the
        classes: None if unlabelled, empty if only the end of a stream will tell how many ids there are.
    Raises:
        ValueError: if not exactly one source is given, a column is missing or holds something else, or a folder is a
            link.
    """
    options = {"split": split, "cache_dir": cache_dir, "streaming": streaming}
    if (train_data_dir is None) == (dataset_name is None):
        sources = f"got {train_data_dir!r} and {dataset_name!r}"
        raise ValueError(f"Exactly one of `train_data_dir` and `dataset_name` must be given, {sources}.")
    if train_data_dir is None:
        check_dataset_reachable(dataset_name, cache_dir)
        dataset = datasets.load_dataset(dataset_name, dataset_config_name, **options)
    elif not Path(train_data_dir).is_dir():
        raise ValueError(f"`train_data_dir` must be a folder of images, got {str(train_data_dir)!r}.")
    else:
        _check_links(train_data_dir)
        dataset = _load_image_folder(train_data_dir, options)
        if label_column is not None and "label" not in dataset.column_names:
            _check_one_folder(dataset, train_data_dir)

    columns = dataset.column_names
    if columns is None:
        raise ValueError(
            "`streaming=True` needs a source that tells its columns beforehand, as images in folders, parquet and "
            f"JSON lines do; {dataset_name} does not."
        )
    if image_column not in columns:
        raise ValueError(f"`image_column` must be one of {columns}, got {image_column!r}.")
    if label_column not in (None, "label", *columns):
        raise ValueError(f"`label_column` must be one of {columns}, got {label_column!r}.")
    kind = dataset.features[image_column]
    if not isinstance(kind, datasets.Image) and kind not in STRINGS:
        raise ValueError(f"`image_column` must hold images or their paths, {image_column!r} holds {kind}.")
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))  # decoded here, to name damaged files

    id2label = None
    if label_column in columns:
        if streaming:
            id2label = _class_names_of_stream(dataset, label_column)
        else:
            if dataset.features[label_column] in STRINGS:
                dataset = dataset.class_encode_column(label_column)
            id2label = _class_names(dataset, label_column)
    if max_train_samples is not None and streaming:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_SIZE).take(max_train_samples)
    elif max_train_samples is not None and max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_train_samples))
    return dataset, id2label


def _load_image_folder(
    train_data_dir: str | os.PathLike, options: dict
) -> datasets.Dataset | datasets.IterableDataset:
    # The explicit pattern keeps `datasets` from taking a class called "test" for a split of its own. It is joined to
    # the folder's name, in which nothing is a pattern.
    source = {"data_dir": glob.escape(str(train_data_dir)), "data_files": {"train": "**"}}
    try:
        return datasets.load_dataset("imagefolder", **source, **options | {"split": "train"})
    except (ValueError, FileNotFoundError) as error:
        if any(path.suffix.lower() in Image.registered_extensions() for path in Path(train_data_dir).rglob("*")):
            raise
        raise ValueError(
            f"`train_data_dir` must be a folder of images, {str(train_data_dir)!r} holds none."
        ) from error


def _check_links(train_data_dir: str | os.PathLike) -> None:
    # `datasets` does not follow links to folders, and says nothing: a class would be missing.
    for folder, names, _ in os.walk(train_data_dir):
        for name in names:
            if os.path.islink(os.path.join(folder, name)):
                raise ValueError(
                    f"`train_data_dir` must hold its folders itself, {os.path.join(folder, name)!r} is a link, which "
                    "`datasets` does not follow."
                )


def _check_one_folder(dataset: datasets.Dataset, train_data_dir: str | os.PathLike) -> None:
    # `datasets` takes no labels from folders of unequal depth, and says nothing: one stray image beside the class
    # folders would train an unconditional model.
    folders = {Path(row["image"]["path"]).parent for row in dataset.cast_column("image", datasets.Image(decode=False))}
    if len(folders) > 1 and len({len(path.parts) for path in folders}) == 1:
        raise ValueError(
            "`train_data_dir` must have a column `label` in its metadata file, beside which `datasets` takes no "
            f"labels from folders; {str(train_data_dir)!r} has images in {len(folders)} folders."
        )
    if len(folders) > 1:
        shallow, deep = min(folders, key=lambda path: len(path.parts)), max(folders, key=lambda path: len(path.parts))
        raise ValueError(
            "`train_data_dir` must hold images in class folders of one depth, or, unlabelled, in a single folder; "
            f"{str(train_data_dir)!r} has images in {str(shallow)!r} and in {str(deep)!r}."
        )


def _class_names(dataset: datasets.Dataset, label_column: str) -> dict[int, str]:
    kind, ids = dataset.features[label_column], dataset.unique(label_column)
    wrong = [id_ for id_ in ids if not isinstance(id_, int) or isinstance(id_, bool) or id_ < 0]
    if wrong:
        raise ValueError(f"`label_column` must hold names or ids from 0 up, {label_column!r} holds {wrong[0]!r}.")
    if isinstance(kind, datasets.ClassLabel):
        return dict(enumerate(kind.names))
    if max(ids) >= len(ids):
        missing = next(id_ for id_, found in enumerate(sorted(ids)) if id_ != found)
        raise ValueError(f"Ids must run from 0 without a gap, {label_column!r} has {max(ids)} but not {missing}.")
    return {id_: str(id_) for id_ in sorted(ids)}


def _class_names_of_stream(dataset: datasets.IterableDataset, label_column: str) -> dict[int, str]:
    kind = dataset.features[label_column]
    if isinstance(kind, datasets.ClassLabel):
        return dict(enumerate(kind.names))
    if not isinstance(kind, datasets.Value) or not kind.dtype.startswith(("int", "uint")):
        raise ValueError(
            f"`streaming=True` needs ids or classes with names in `label_column`, {label_column!r} holds {kind}: "
            "the ids of other labels are known only when all are read."
        )
    return {}
