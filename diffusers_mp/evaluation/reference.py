"""Statistics of real images, kept by the content of the images, and the measures against them."""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..data.formats import open_image
from ..data.pixels import read_image
from ..files import whole_file
from .features import FeatureExtractor
from .frechet import RunningStatistics, frechet_distance, rank_warning
from .precision_recall import MAX_FEATURES, precision_recall


if TYPE_CHECKING:
    import datasets

_FORMAT_VERSION = 2  # since images are in sRGB, on white: their statistics are others


@dataclass
class ReferenceStatistics:
    """Features of real images, as far as they are needed: moments of all, and single ones for precision and recall.

    Attributes:
        description (dict): extractor, resolution, channels, number, classes and content hash of the images, warnings.
        mean (torch.Tensor): float64, shape (D,).
        covariance (torch.Tensor): float64, shape (D, D).
        features (torch.Tensor): float32, shape (N, D), N at most `MAX_FEATURES`, drawn from all images.
    """

    description: dict[str, Any]
    mean: torch.Tensor
    covariance: torch.Tensor
    features: torch.Tensor = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the description as JSON in its header; whole or not at all.

        Args:
            path (str or Path): the file; its folder is made if missing.
        """
        tensors = {name: getattr(self, name).contiguous() for name in ("mean", "covariance", "features")}
        metadata = {"description": json.dumps(self.description), "sha256": _sha256_of(tensors)}
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "ReferenceStatistics":
        """Read a file of statistics.

        Args:
            path (str or Path): what `save` wrote.
        Returns:
            ReferenceStatistics: checked against the hash that was written with it.
        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, remove it: {error}") from error
        if "description" not in metadata:
            raise ValueError(f"{path} must hold reference statistics that `evaluate.py` wrote, it has no description.")
        if _sha256_of(tensors) != metadata["sha256"]:
            raise ValueError(f"{path} is damaged, remove it: its tensors are not those that were written.")
        return cls(json.loads(metadata["description"]), **tensors)

    def check(self, extractor: FeatureExtractor, resolution: int, num_channels: int) -> None:
        """Refuse to compare what cannot be compared.

        Args:
            extractor (FeatureExtractor): of the generated images.
            resolution (int): their side in pixels.
            num_channels (int): 1 for grey, 3 for RGB.
        Raises:
            ValueError: if these statistics are of another extractor, preprocessing, size or colour.
        """
        stored, given = self.description["extractor"], extractor.description
        if self.description["fingerprint"] != extractor.fingerprint:
            names = [name for name in stored.keys() | given.keys() if stored.get(name) != given.get(name)]
            differences = "; ".join(f"{name}: {stored.get(name)} and {given.get(name)}" for name in sorted(names))
            raise ValueError(
                f"the reference statistics must be of the extractor in use, they differ in {differences}."
            )
        for name, value in (("resolution", resolution), ("num_channels", num_channels)):
            if self.description[name] != value:
                raise ValueError(
                    f"the reference statistics must be of {name} {value}, which the pipeline generates, got "
                    f"{self.description[name]}."
                )


def _sha256_of(tensors: dict[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def drawn(num_images: int, num_kept: int) -> list[int]:
    """Numbers of `num_kept` images drawn with a fixed seed, or of all if there are no more.

    Sources are often sorted by class, and as often have classes in turn: evenly spaced numbers can be all of one.

    Args:
        num_images, num_kept (int): at least 1.
    Returns:
        list of int: ascending, without repetition.
    """
    # The older generator's numbers are the same in every version of NumPy.
    return sorted(np.random.RandomState(0).permutation(num_images)[:num_kept].tolist())


@dataclass(frozen=True)
class Processes:
    """Those that share a work.

    Attributes:
        count (int): how many there are.
        index (int): which one this is.
        gather (callable): what all of them gave it, in their order, on each of them.
    """

    count: int = 1
    index: int = 0
    gather: Callable[[Any], list[Any]] = lambda part: [part]


ALONE = Processes()


@dataclass(frozen=True)
class RealImages:
    """What generated images are compared with.

    Attributes:
        dataset (datasets.Dataset): with an undecoded image column, as `load_image_dataset` opens it.
        image_column (str): name of the column.
        class_counts (dict of str to int): number of images of each class, None if unlabelled.
        left_out (dict of str to int): number of files that are not among them, by the reason.
    """

    dataset: "datasets.Dataset"
    image_column: str = "image"
    class_counts: dict[str, int] | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def reference_statistics(
    images: RealImages,
    extractor: FeatureExtractor,
    *,
    resolution: int,
    num_channels: int,
    cache_dir: str | Path,
    batch_size: int = 32,
    processes: Processes = ALONE,
) -> ReferenceStatistics:
    """Statistics of real images, from the cache if there are any of the same images by content.

    Images are brought to the size of generated ones by `prepare_image`, as training does, on a white ground.
    To be called on every process.

    Args:
        images (RealImages): at least two.
        extractor (FeatureExtractor): of the features.
        resolution (int): side in pixels of the generated images.
        num_channels (int): 1 for grey, 3 for RGB.
        cache_dir (str or Path): folder of the statistics, shared by all processes. The name of a file is the SHA-256
            of all that its content depends on: the bytes of the images in order, their classes, extractor, size and
            colour.
        batch_size (int): images that the extractor is given at once.
        processes (Processes): how many share the work, and which one this is.
    Returns:
        ReferenceStatistics: the same on every process.
    Raises:
        ValueError: if there are fewer than two images, one cannot be read, or the file in the cache is damaged.
    """
    dataset, image_column = images.dataset, images.image_column
    if len(dataset) < 2:
        raise ValueError(f"the reference must hold at least 2 images, got {len(dataset)}.")
    own, gather = range(processes.index, len(dataset), processes.count), processes.gather
    facts = {index: _facts_of(dataset[index][image_column]) for index in own}
    facts = functools.reduce(dict.__or__, gather(facts))
    digests = [facts[index][0] for index in range(len(dataset))]
    identity = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": extractor.fingerprint,
        "resolution": resolution,
        "num_channels": num_channels,
        "num_images": len(dataset),
        "class_counts": images.class_counts,
        "left_out": images.left_out,
        "content_hash": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }
    path = Path(cache_dir) / f"{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}.safetensors"
    if all(gather(path.is_file())):
        return ReferenceStatistics.load(path)

    statistics, kept = RunningStatistics(), set(drawn(len(dataset), MAX_FEATURES))
    features = {}
    starts = range(0, len(own), batch_size)
    for start in tqdm(starts, desc="Reference", unit="batch", disable=processes.index != 0):
        indices, batch = own[start : start + batch_size], []
        for index in indices:
            cell = dataset[index][image_column]
            pixels, reason = read_image(cell, resolution, num_channels)
            if pixels is None:
                raise ValueError(f"every reference image must be readable, {_name_of(cell, index)} is not: {reason}")
            batch.append(pixels)
        rows, _ = extractor(torch.stack(batch))
        statistics.update(rows)
        # NumPy's rows: a row of a tensor would travel to other processes with the whole batch.
        features |= {index: row for index, row in zip(indices, rows.numpy(), strict=True) if index in kept}
    parts = gather((statistics, features))
    statistics = functools.reduce(RunningStatistics.merge, (part for part, _ in parts), RunningStatistics())
    features = functools.reduce(dict.__or__, (part for _, part in parts))

    warnings = [rank_warning(len(dataset), len(statistics.mean), "reference images")]
    warnings += _preparation_warnings([of_one[1:] for of_one in facts.values()], resolution, num_channels)
    description = {
        **identity,
        "extractor": extractor.description,
        "preparation": "upright, sRGB, on white, halved by box averages while twice too large, bicubic, centre crop",
        "num_features_kept": len(kept),
        "warnings": [warning for warning in warnings if warning is not None],
    }
    rows = torch.from_numpy(np.stack([features[index] for index in sorted(kept)]))
    reference = ReferenceStatistics(description, statistics.mean, statistics.covariance, rows)
    if processes.index == 0:
        reference.save(path)
    return reference


def _facts_of(cell: dict[str, Any] | None) -> tuple[str, tuple[int, int] | None, str | None]:
    """SHA-256 of an image's file, its size and its mode; what cannot be read is for `read_image` to tell."""
    cell = cell or {"bytes": b""}
    content = cell["bytes"]
    if content is None:
        with fsspec.open(cell["path"], "rb") as file:
            content = file.read()
    digest = hashlib.sha256(content).hexdigest()
    try:
        with open_image(content, cell.get("path") or "") as image:
            return digest, image.size, image.mode
    except Exception:  # any, of whichever parser; the image is read again, and refused, where its pixels are needed
        return digest, None, None


def _name_of(cell: dict[str, Any] | None, index: int) -> str:
    path = (cell or {}).get("path")
    return f"number {index}" + (f" ({os.path.basename(path)})" if path else "")


def _preparation_warnings(facts: Sequence[tuple], resolution: int, num_channels: int) -> list[str]:
    """What happens to real images, but not to generated ones, before both are compared."""
    warnings = []
    sizes = Counter(size for size, _ in facts if size is not None)
    num_enlarged = sum(count for size, count in sizes.items() if min(size) < resolution)
    if num_enlarged:
        warnings.append(
            f"{num_enlarged} of {len(facts)} reference images are smaller than {resolution} pixels and were enlarged: "
            "the distance rewards blur."
        )
    if len(sizes) > 1:
        smallest, largest = min(sizes, key=min), max(sizes, key=max)
        warnings.append(
            f"reference images are of {len(sizes)} sizes, from {smallest[0]}x{smallest[1]} to "
            f"{largest[0]}x{largest[1]}: each was resized and cropped to {resolution}x{resolution}."
        )
    num_coloured = sum(mode not in (None, "1", "L", "LA", "I;16", "I;16B") for _, mode in facts)
    if num_channels == 1 and num_coloured:
        warnings.append(f"{num_coloured} of {len(facts)} reference images have colours, the pipeline's are grey.")
    if num_channels == 3 and num_coloured == 0:
        warnings.append("the reference images are grey, the pipeline's have colours.")
    return warnings


def image_metrics(
    reference: ReferenceStatistics,
    statistics: RunningStatistics,
    features: torch.Tensor,
    *,
    k: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """All measures of one set of generated images against the reference.

    Args:
        reference (ReferenceStatistics): of real images.
        statistics (RunningStatistics): of all generated images.
        features (torch.Tensor): of the first generated images, up to `MAX_FEATURES`, for precision and recall: as many
            as the reference has kept, or that many drawn from the reference.
        k (int): neighbour of precision and recall; 0 leaves them out.
        device (str or torch.device): as in `precision_recall`.
    Returns:
        dict: `frechet_distance`, `warnings`, and with `k` `precision`, `recall` and `num_images_compared`, the size of
        both sets.
    Raises:
        ValueError: as in `frechet_distance` and `precision_recall`.
    """
    distance = frechet_distance(statistics.mean, statistics.covariance, reference.mean, reference.covariance)
    warning = rank_warning(statistics.count, len(statistics.mean), "generated images")
    metrics = {"frechet_distance": distance, "warnings": [] if warning is None else [warning]}
    if k:
        num_compared = min(len(reference.features), len(features))
        real = reference.features[drawn(len(reference.features), num_compared)]
        precision, recall = precision_recall(real, features[:num_compared], k, device)
        metrics |= {"precision": precision, "recall": recall, "num_images_compared": num_compared}
    return metrics
