"""Pictures from a folder or a data set, without torchvision: names of the classes, decoding, cropping."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset


def load_image_dataset(
    train_data_dir: str | os.PathLike | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    max_train_samples: int | None = None,
    seed: int = 0,
) -> tuple[datasets.Dataset, dict[int, str] | None]:
    """Opens a folder of pictures, or a data set known to `datasets`, without decoding a picture.

    Args:
        train_data_dir (str): folder of pictures, all that lie under it. Sub-folders are classes, ids in the order of
            their names; without sub-folders, or with a single one, the data are unlabelled.
        dataset_name, dataset_config_name, split (str): what `datasets.load_dataset` is asked for instead.
        cache_dir (str): where `datasets` keeps its tables.
        image_column, label_column (str): names of the columns. The default `label` may be missing: unlabelled data.
        max_train_samples (int): keep only so many, drawn with `seed`, because sources are often sorted by class.
    Returns:
        tuple[datasets.Dataset, dict[int, str] | None]: the data, and the names of the classes, None if unlabelled.
    Raises:
        ValueError: if not exactly one source is given, or a column is missing or holds something else.
    """
    if (train_data_dir is None) == (dataset_name is None):
        sources = f"received {train_data_dir!r} and {dataset_name!r}"
        raise ValueError(f"Exactly one of `train_data_dir` and `dataset_name` must be given, {sources}.")
    if train_data_dir is None:
        dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
    elif not Path(train_data_dir).is_dir():
        raise ValueError(f"`train_data_dir` must be a folder of pictures, received {str(train_data_dir)!r}.")
    else:
        # The explicit pattern keeps `datasets` from taking a class called "test" for a split of its own.
        source = {"data_dir": str(train_data_dir), "data_files": {"train": "**"}}
        dataset = datasets.load_dataset("imagefolder", **source, split="train", cache_dir=cache_dir)
        if "label" not in dataset.column_names:
            _check_one_folder(dataset, train_data_dir)

    columns = dataset.column_names
    if image_column not in columns:
        raise ValueError(f"`image_column` must be one of {columns}, received {image_column!r}.")
    if label_column not in columns and label_column != "label":
        raise ValueError(f"`label_column` must be one of {columns}, received {label_column!r}.")
    kind = dataset.features[image_column]
    if not isinstance(kind, datasets.Image) and kind != datasets.Value("string"):
        raise ValueError(f"`image_column` must hold pictures or their paths, {image_column!r} holds {kind}.")
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))  # decoded here, to name damaged files

    id2label = None
    if label_column in columns:
        if dataset.features[label_column] == datasets.Value("string"):
            dataset = dataset.class_encode_column(label_column)
        id2label = _class_names(dataset, label_column)
    if max_train_samples is not None and max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_train_samples))
    return dataset, id2label


def _check_one_folder(dataset: datasets.Dataset, train_data_dir: str | os.PathLike) -> None:
    # `datasets` takes no labels from folders of unequal depth, and says nothing: one stray picture beside the class
    # folders would train an unconditional model.
    folders = {Path(row["image"]["path"]).parent for row in dataset.cast_column("image", datasets.Image(decode=False))}
    if len(folders) > 1:
        shallow, deep = min(folders, key=lambda path: len(path.parts)), max(folders, key=lambda path: len(path.parts))
        raise ValueError(
            "`train_data_dir` must hold pictures in class folders of one depth, or, unlabelled, in a single folder; "
            f"{str(train_data_dir)!r} has pictures in {str(shallow)!r} and in {str(deep)!r}."
        )


def _class_names(dataset: datasets.Dataset, label_column: str) -> dict[int, str]:
    kind, ids = dataset.features[label_column], dataset.unique(label_column)
    wrong = [id_ for id_ in ids if not isinstance(id_, int) or id_ < 0]
    if wrong:
        raise ValueError(f"`label_column` must hold names or ids from 0 up, {label_column!r} holds {wrong[0]!r}.")
    if isinstance(kind, datasets.ClassLabel):
        return dict(enumerate(kind.names))
    missing = sorted(set(range(max(ids))) - set(ids))
    if missing:
        raise ValueError(f"Ids must run from 0 without a gap, {label_column!r} has {max(ids)} but not {missing[0]}.")
    return {id_: str(id_) for id_ in sorted(ids)}


def prepare_image(image: Image.Image, resolution: int, num_channels: int) -> torch.Tensor:
    """A square picture as bytes: upright, shorter side resized to `resolution`, centre cropped.

    Halved by box averages while at least twice too large, then bicubic.

    Args:
        image (PIL.Image.Image): any mode with a known range; transparency is dropped.
        resolution (int): side of the result.
        num_channels (int): 1 for grey, 3 for RGB.
    Returns:
        torch.Tensor: uint8, shape (num_channels, resolution, resolution); `/ 127.5 - 1` is what a VAE takes.
    Raises:
        ValueError: if the mode has no fixed range (32-bit pictures).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"a picture must have 8 or 16 bits per channel, received mode {image.mode!r}")
    if image.mode.startswith("I;16"):  # PIL's own conversion clips everything above 255 to white
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert({1: "L", 3: "RGB"}[num_channels])
    while min(image.size) >= 2 * resolution:
        image = image.reduce(2)
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    pixels = np.array(image.crop((left, top, left + resolution, top + resolution)))
    return torch.from_numpy(pixels).reshape(resolution, resolution, num_channels).permute(2, 0, 1).contiguous()


class ImageRows(Dataset):
    """Row → (name, pixels, label, error): workers report what they cannot read, the caller decides.

    Args:
        dataset (datasets.Dataset): from `load_image_dataset`.
        image_column (str): column of the pictures.
        label_column (str, optional): column of the class ids.
        resolution, num_channels (int): as in `prepare_image`.
    """

    def __init__(self, dataset, image_column, label_column, resolution, num_channels):
        self.dataset = dataset.select_columns([image_column] + ([label_column] if label_column else []))
        self.image_column, self.label_column = image_column, label_column
        self.resolution, self.num_channels = resolution, num_channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[str, torch.Tensor | None, int | None, str | None]:
        sample = self.dataset[row]
        picture = sample[self.image_column] or {"path": None, "bytes": b""}
        name, label = picture["path"] or f"row {row}", sample.get(self.label_column)
        source = picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"])
        try:
            with Image.open(source) as image:
                return name, prepare_image(image, self.resolution, self.num_channels), label, None
        except MemoryError:
            raise
        except Exception as error:  # a damaged file raises whatever the parser of its format stumbles over
            return name, None, label, f"{type(error).__name__}: {error}"
