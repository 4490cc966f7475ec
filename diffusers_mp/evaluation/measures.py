"""How far generated images are from real ones: Fréchet distance, precision and recall.

    FD = ‖μ - μ_r‖² + tr(Σ + Σ_r - 2 (Σ Σ_r)^½)

between Gaussians fitted to the features of both (arXiv 1706.08500, equation 6; with the Inception network it is called
FID, with DINOv2 see arXiv 2306.04675). All of it in float64. Nothing here knows processes: each takes its share, and
`gather` puts the parts together.
"""

import functools
import hashlib
import inspect
import io
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
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..data.images import read_picture
from ..training.samples import _generator
from .features import FeatureExtractor


if TYPE_CHECKING:
    import datasets
    from diffusers import SchedulerMixin

    from ..pipeline_mpdit import MPDiTPipeline

# Features kept for precision and recall: as many as arXiv 1904.06991 compares.
MAX_FEATURES = 50_000
_FORMAT_VERSION = 1
# Elements of a block of the distance matrix; half a gigabyte of float64.
_BLOCK_SIZE = 2**26


# Moments.


class RunningStatistics:
    """Mean and covariance of rows that come in batches, in float64; parts from several processes can be merged.

        m = m_a + δ n_b / n,    S = S_a + S_b + δ δᵀ n_a n_b / n,    δ = m_b - m_a
    for the mean m and the scatter S = Σ (x - m)(x - m)ᵀ of n = n_a + n_b rows (Chan et al. 1983). Unlike sums of
    squares it loses nothing when the mean is large.

    Attributes:
        count (int): rows seen.
        mean (torch.Tensor): float64, shape (D,); None before the first rows.
        scatter (torch.Tensor): float64, shape (D, D); None before the first rows.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None

    def update(self, features: torch.Tensor) -> "RunningStatistics":
        """Add rows.

        Args:
            features (torch.Tensor): shape (B, D), the same D each time.
        Returns:
            RunningStatistics: itself.
        Raises:
            ValueError: if the shape is another, or a value is not finite.
        """
        if features.ndim != 2 or (self.mean is not None and features.shape[1] != len(self.mean)):
            wanted = "D" if self.mean is None else len(self.mean)
            raise ValueError(f"`features` must have shape (B, {wanted}), received {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError("`features` must be finite, received NaN or infinity.")
        part = RunningStatistics()
        if len(features):
            rows = features.detach().cpu().double()
            part.count, part.mean = len(rows), rows.mean(dim=0)
            rows = rows - part.mean
            part.scatter = rows.T @ rows
        return self.merge(part)

    def merge(self, other: "RunningStatistics") -> "RunningStatistics":
        """Add the rows that another has seen.

        Args:
            other (RunningStatistics): of the same D, left as it is.
        Returns:
            RunningStatistics: itself.
        """
        if self.count == 0 or other.count == 0:
            if self.count == 0:
                self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return self
        count, difference = self.count + other.count, other.mean - self.mean
        self.mean = self.mean + difference * (other.count / count)
        weight = self.count * other.count / count
        self.scatter = self.scatter + other.scatter + torch.outer(difference, difference) * weight
        self.count = count
        return self

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, float64, shape (D, D).

        Raises:
            ValueError: for fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, received {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, what FID is of Inception features.

        ‖μ - μ'‖² + tr Σ + tr Σ' - 2 ‖Σ^½ Σ'^½‖_*          (Dowson and Landau 1982)
    The nuclear norm, a sum of singular values, equals tr (Σ Σ')^½. Unlike the square root of the product, which is not
    symmetric, it is exact for covariances without full rank and never complex.

    Args:
        mean, other_mean (torch.Tensor or array): shape (D,).
        covariance, other_covariance (torch.Tensor or array): symmetric and positive semi-definite, shape (D, D).
    Returns:
        float: computed in float64, not negative.
    Raises:
        ValueError: if shapes differ, a value is not finite, or a matrix is no covariance.
    """
    tensors = {"mean": mean, "covariance": covariance, "other_mean": other_mean, "other_covariance": other_covariance}
    tensors = {name: torch.as_tensor(values) for name, values in tensors.items()}
    size = len(tensors["mean"]) if tensors["mean"].ndim == 1 else "D"
    for name, tensor in tensors.items():
        shape = (size,) * (1 + name.endswith("covariance"))
        if tensor.shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, received {tuple(tensor.shape)}.")
        if not tensor.isfinite().all():
            raise ValueError(f"`{name}` must be finite, received NaN or infinity.")
    mean, covariance, other_mean, other_covariance = (tensor.cpu().double() for tensor in tensors.values())
    roots = _matrix_root(covariance, "covariance") @ _matrix_root(other_covariance, "other_covariance")
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace()
    return max((distance - 2 * torch.linalg.svdvals(roots).sum()).item(), 0.0)


def _matrix_root(covariance: torch.Tensor, name: str) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    largest = values.abs().max()
    # What rounding leaves of a zero eigenvalue; its root would be 1e-8 of the largest one.
    rounding = len(values) * torch.finfo(torch.float64).eps * largest
    asymmetry = (covariance - covariance.T).abs().max()
    if values[0] < -1e-6 * largest or asymmetry > 1e-6 * largest:
        raise ValueError(
            f"`{name}` must be symmetric and positive semi-definite, received an asymmetry of {asymmetry:.2g} and "
            f"eigenvalues from {values[0]:.2g} to {values[-1]:.2g}."
        )
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


def rank_warning(num_images: int, num_features: int, what: str) -> str | None:
    """What to say of a covariance from too few images, if there is something to say.

    Args:
        num_images (int): images it was estimated from.
        num_features (int): its side D.
        what (str): which images, for the text.
    Returns:
        str or None: a warning where the covariance cannot have full rank, D images or fewer.
    """
    if num_images > num_features:
        return None
    return (
        f"{num_images} {what} for {num_features} features: their covariance has rank {num_images - 1} at most, so "
        f"that the Fréchet distance is far too large and not comparable. Take more than {num_features}, better ten "
        "times as many."
    )


# Precision and recall.


def precision_recall(
    reference: torch.Tensor, features: torch.Tensor, k: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall, arXiv 1904.06991, equations 1 and 2.

    A set of features covers the balls around each of its points that reach to the point's k-th nearest neighbour in
    the set. Precision is the share of `features` that `reference` covers (quality), recall the share of `reference`
    that `features` cover (variety). Both depend on the numbers of points: the paper compares sets of one size, 50,000.

    Args:
        reference (torch.Tensor): features of real images, shape (N, D).
        features (torch.Tensor): features of generated images, shape (M, D).
        k (int): which neighbour; 3 in the paper.
        device (str or torch.device): where distances are computed, in float64 (on the CPU for MPS, which has none).
    Returns:
        tuple of float: precision and recall.
    Raises:
        ValueError: if a set has `k` points or fewer, or the shapes do not fit.
    """
    if reference.ndim != 2 or features.ndim != 2 or reference.shape[1] != features.shape[1]:
        raise ValueError(
            "`reference` and `features` must have shapes (N, D) and (M, D), received "
            f"{tuple(reference.shape)} and {tuple(features.shape)}."
        )
    if k < 1 or min(len(reference), len(features)) <= k:
        raise ValueError(
            f"`k` must be at least 1 and less than the number of images, received {k} for {len(reference)} real and "
            f"{len(features)} generated ones."
        )
    device = "cpu" if torch.device(device).type == "mps" else device
    reference, features = reference.to(device, torch.float64), features.to(device, torch.float64)
    return _coverage(reference, features, k), _coverage(features, reference, k)


def _coverage(points: torch.Tensor, queries: torch.Tensor, k: int) -> float:
    # k + 1: each point is its own nearest neighbour.
    radii = torch.cat([block.kthvalue(k + 1).values for block in _squared_distances(points, points)])
    covered = [(block <= radii).any(dim=1) for block in _squared_distances(queries, points)]
    return torch.cat(covered).double().mean().item()


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor):
    """Blocks of rows of the matrix of squared distances."""
    norms = columns.square().sum(dim=1)
    for block in rows.split(max(1, _BLOCK_SIZE // len(columns))):
        sums = block.square().sum(dim=1, keepdim=True) + norms
        distances = sums - 2 * block @ columns.T
        # Points that are equal must be at distance 0, not at what rounding leaves.
        yield distances.where(distances > 1e-13 * sums, 0)


# Generated images.


class NonFiniteImageError(FloatingPointError):
    """A pipeline has made an image with NaN or infinity in it."""


def image_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of one generated image, unrelated to that of any other and to all of training's.

    Args:
        seed (int): of the evaluation, not negative.
        index (int): of the image.
    Returns:
        torch.Generator: freshly seeded.
    """
    # Training's keys have up to two numbers.
    return _generator(seed, 0, 0, index)


def sampler_for(scheduler: "SchedulerMixin", name: str) -> "SchedulerMixin":
    """Another sampler for the same model.

    Args:
        scheduler (SchedulerMixin): one that suits the model, as a pipeline has it.
        name (str): class of diffusers.
    Returns:
        SchedulerMixin: made from the config; a solver that can follow a flow does so if `scheduler` does.
    """
    import diffusers

    from ..pipeline_mpdit import FLOW_SCHEDULERS

    scheduler_class, options = getattr(diffusers, name), {}
    if isinstance(scheduler, FLOW_SCHEDULERS) and "use_flow_sigmas" in inspect.signature(scheduler_class).parameters:
        shift = scheduler.config.shift
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return scheduler_class.from_config(scheduler.config, **options)


def generate_images(
    pipe: "MPDiTPipeline",
    indices: Sequence[int],
    *,
    seed: int,
    class_ids: Sequence[int] | None,
    num_inference_steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Images by their numbers: each has its own seed and class, whatever it is generated together with.

    On one device in one precision, batches of other sizes change an image by no more than the rounding of the model.

    Args:
        pipe (MPDiTPipeline): class-conditional or unconditional.
        indices (sequence of int): numbers of the images.
        seed (int): of the evaluation; image i draws from `image_generator(seed, i)`.
        class_ids (sequence of int, optional): classes, which image i takes in turn, `class_ids[i % len(class_ids)]`:
            as many images of each, from the first on. None for a transformer without classes.
        num_inference_steps, guidance_scale: as in the pipeline's call.
    Returns:
        torch.Tensor: uint8, shape (B, channels, H, W), rounded as the pipeline rounds for PIL.
    Raises:
        NonFiniteImageError: naming the first image with NaN or infinity in it.
    """
    call: dict[str, Any] = {"num_images_per_class": len(indices)}
    if class_ids is not None:
        call = {"class_labels": [class_ids[index % len(class_ids)] for index in indices]}
    latents = pipe(
        **call,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[image_generator(seed, index) for index in indices],
        output_type="latent",
    ).images
    with torch.no_grad():
        images = pipe.decode_latents(latents).float()
    # Before the range is cut, which would make white of infinity.
    wrong = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        index = indices[wrong[0]]
        label = "" if class_ids is None else f", class {class_ids[index % len(class_ids)]}"
        raise NonFiniteImageError(
            f"image {index} (seed {seed}{label}) is not finite with guidance scale {guidance_scale:g} and "
            f"{num_inference_steps} steps in {pipe.transformer.dtype}; {len(wrong)} of its batch of {len(indices)} "
            "are so. Weights that are not finite, half precision, or a guidance scale too large are the usual causes."
        )
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


# Reference.


@dataclass
class ReferenceStatistics:
    """Features of real images, as far as they are needed: moments of all, and single ones for precision and recall.

    Attributes:
        description (dict): extractor, resolution, channels, number and content hash of the images, warnings.
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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in ("mean", "covariance", "features")}
        metadata = {"description": json.dumps(self.description), "sha256": _sha256_of(tensors)}
        # A name of its own: another job may be writing the same statistics.
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)

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
                    f"the reference statistics must be of {name} {value}, which the pipeline generates, received "
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


def reference_statistics(
    dataset: "datasets.Dataset",
    extractor: FeatureExtractor,
    *,
    resolution: int,
    num_channels: int,
    cache_dir: str | Path,
    image_column: str = "image",
    batch_size: int = 32,
    num_processes: int = 1,
    process_index: int = 0,
    gather: Callable[[Any], list[Any]] = lambda part: [part],
) -> ReferenceStatistics:
    """Statistics of real images, from the cache if there are any of the same images by content.

    Images are brought to the size of generated ones by `prepare_image`: upright, shorter side resized, centre crop, as
    training does. To be called on every process.

    Args:
        dataset (datasets.Dataset): with an undecoded image column, as `load_image_dataset` opens it.
        extractor (FeatureExtractor): of the features.
        resolution (int): side in pixels of the generated images.
        num_channels (int): 1 for grey, 3 for RGB.
        cache_dir (str or Path): folder of the statistics, shared by all processes. The name of a file is the SHA-256
            of all that its content depends on: the bytes of the pictures in order, extractor, size and colour.
        image_column (str): name of the column.
        batch_size (int): images that the extractor is given at once.
        num_processes, process_index (int): how many share the work, and which one this is.
        gather (callable): what all processes gave it, in their order, on each of them.
    Returns:
        ReferenceStatistics: the same on every process.
    Raises:
        ValueError: if there are fewer than two images, one cannot be read, or the file in the cache is damaged.
    """
    if len(dataset) < 2:
        raise ValueError(f"the reference must hold at least 2 images, received {len(dataset)}.")
    own = range(process_index, len(dataset), num_processes)
    pictures = {index: _picture_facts(dataset[index][image_column]) for index in own}
    pictures = functools.reduce(dict.__or__, gather(pictures))
    digests = [pictures[index][0] for index in range(len(dataset))]
    identity = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": extractor.fingerprint,
        "resolution": resolution,
        "num_channels": num_channels,
        "num_images": len(dataset),
        "content_hash": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }
    path = Path(cache_dir) / f"{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}.safetensors"
    if all(gather(path.is_file())):
        return ReferenceStatistics.load(path)

    statistics, kept = RunningStatistics(), set(drawn(len(dataset), MAX_FEATURES))
    features = {}
    starts = range(0, len(own), batch_size)
    for start in tqdm(starts, desc="Reference", unit="batch", disable=process_index != 0):
        indices, images = own[start : start + batch_size], []
        for index in indices:
            cell = dataset[index][image_column]
            pixels, reason = read_picture(cell, resolution, num_channels)
            if pixels is None:
                raise ValueError(f"every reference image must be readable, {_name_of(cell, index)} is not: {reason}")
            images.append(pixels)
        rows, _ = extractor(torch.stack(images))
        statistics.update(rows)
        # NumPy's rows: a row of a tensor would travel to other processes with the whole batch.
        features |= {index: row for index, row in zip(indices, rows.numpy(), strict=True) if index in kept}
    parts = gather((statistics, features))
    statistics = functools.reduce(RunningStatistics.merge, (part for part, _ in parts), RunningStatistics())
    features = functools.reduce(dict.__or__, (part for _, part in parts))

    warnings = [rank_warning(len(dataset), len(statistics.mean), "reference images")]
    warnings += _preparation_warnings([facts[1:] for facts in pictures.values()], resolution, num_channels)
    description = {
        **identity,
        "extractor": extractor.description,
        "preparation": "upright, halved by box averages while twice too large, bicubic, centre crop",
        "num_features_kept": len(kept),
        "warnings": [warning for warning in warnings if warning is not None],
    }
    rows = torch.from_numpy(np.stack([features[index] for index in sorted(kept)]))
    reference = ReferenceStatistics(description, statistics.mean, statistics.covariance, rows)
    if process_index == 0:
        reference.save(path)
    return reference


def _picture_facts(cell: dict[str, Any] | None) -> tuple[str, tuple[int, int] | None, str | None]:
    """SHA-256 of a picture's file, its size and its mode; what cannot be read is for `read_picture` to tell."""
    cell = cell or {"bytes": b""}
    content = cell["bytes"]
    if content is None:
        with fsspec.open(cell["path"], "rb") as file:
            content = file.read()
    digest = hashlib.sha256(content).hexdigest()
    try:
        with Image.open(io.BytesIO(content)) as image:
            return digest, image.size, image.mode
    except Exception:  # any, of whichever parser; the picture is read again, and refused, where its pixels are needed
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


# Results.


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
