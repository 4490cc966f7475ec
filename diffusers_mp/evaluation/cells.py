"""A cell of an evaluation: a width, a guidance scale and a number of steps; its images, measured by all processes."""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import make_image_grid
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from .features import FeatureExtractor
from .frechet import RunningStatistics
from .generation import NonFiniteImageError, generate_images
from .outputs import MARK
from .precision_recall import MAX_FEATURES
from .reference import ReferenceStatistics, image_metrics


if TYPE_CHECKING:
    from ..pipeline_mpdit import MPDiTPipeline

NUM_SHOWN = 16


def name_of(cell: Mapping[str, Any]) -> str:
    """What the files of a cell are called; equal for cells of equal values."""
    width = "" if cell["ema_std"] is None else f"std-{cell['ema_std']!r}_"
    return f"{width}guidance-{cell['guidance_scale']!r}_steps-{cell['num_inference_steps']}"


def line_of(cell: Mapping[str, Any]) -> str:
    """A cell and its measures, or why it has none, on one line."""
    if "error" in cell:
        return f"{name_of(cell)}: failed: {cell['error']}"
    texts = []
    for metrics in cell["metrics"]:
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        texts.append(", ".join(f"{key} {value:.5g}" for key, value in numbers.items()) + f" ({metrics['extractor']})")
    return f"{name_of(cell)}: {'; '.join(texts)}"


@dataclass
class _Share:
    """What a process keeps of the images that it has generated, mostly by image number."""

    statistics: list[RunningStatistics]
    features: list[dict[int, np.ndarray]]
    logits: list[dict[int, np.ndarray]]
    digests: dict[int, bytes] = field(default_factory=dict)
    shown: dict[int, np.ndarray] = field(default_factory=dict)
    error: str | None = None

    def add(self, indices: Sequence[int], images: torch.Tensor, extractors: Sequence[FeatureExtractor]) -> None:
        # NumPy's rows, here and below: a row of a tensor would travel with the whole batch.
        for index, image in zip(indices, images.cpu().numpy(), strict=True):
            self.digests[index] = hashlib.sha256(image.tobytes()).digest()
            if index < NUM_SHOWN:
                self.shown[index] = image
        for i, extractor in enumerate(extractors):
            rows, scores = extractor(images)
            self.statistics[i].update(rows)
            self.features[i] |= {k: row for k, row in zip(indices, rows.numpy(), strict=True) if k < MAX_FEATURES}
            self.logits[i] |= {} if scores is None else dict(zip(indices, scores.numpy(), strict=True))


def evaluate_cell(
    cell: Mapping[str, Any],
    pipe: "MPDiTPipeline",
    settings: Mapping[str, Any],
    class_ids: Sequence[int] | None,
    measures: Sequence[tuple[FeatureExtractor, ReferenceStatistics]],
    accelerator: Accelerator,
    *,
    batch_size: int,
    sample_grid: Path,
) -> dict[str, Any]:
    """Generates a cell's images, this process's share, and measures all of them; to be called on every process.

    Args:
        cell (mapping): `ema_std`, `guidance_scale` and `num_inference_steps`.
        pipe (MPDiTPipeline): with the average of that width.
        settings (mapping): `num_samples`, `seed` and `nearest_k`.
        class_ids (sequence of int, optional): class of each image; None for a pipeline without classes.
        measures (sequence of tuple): extractors, each with the statistics of real images.
        accelerator (Accelerator): of this process.
        batch_size (int): images that a process generates at once.
        sample_grid (Path): where the first images are drawn.
    Returns:
        dict: the cell, on the main process with its `metrics` and circumstances; with an `error` on every process if
        an image is not finite.
    """
    start, extractors = time.perf_counter(), [extractor for extractor, _ in measures]
    call = {
        "seed": settings["seed"],
        "class_ids": class_ids,
        "num_inference_steps": cell["num_inference_steps"],
        "guidance_scale": cell["guidance_scale"],
    }
    own = range(accelerator.process_index, settings["num_samples"], accelerator.num_processes)
    share = _Share([RunningStatistics() for _ in extractors], [{} for _ in extractors], [{} for _ in extractors])
    is_main = accelerator.is_main_process
    try:
        for first in tqdm(range(0, len(own), batch_size), desc=name_of(cell), disable=not is_main, leave=False):
            indices = own[first : first + batch_size]
            share.add(indices, generate_images(pipe, indices, **call), extractors)
    except NonFiniteImageError as error:
        share.error = str(error)

    shares = gather_object([share])
    errors = [part.error for part in shares if part.error is not None]
    if errors:
        return {**cell, "error": errors[0]}
    if not is_main:
        return {**cell}
    metrics = []
    for i, (extractor, reference) in enumerate(measures):
        merged = RunningStatistics()
        for part in shares:
            merged.merge(part.statistics[i])
        rows, scores = _in_order(part.features[i] for part in shares), _in_order(part.logits[i] for part in shares)
        rows = torch.from_numpy(np.stack(rows))
        measured = image_metrics(reference, merged, rows, k=settings["nearest_k"], device=accelerator.device)
        if scores:
            measured |= _inception_score(torch.from_numpy(np.stack(scores)))
        metrics.append({"extractor": extractor.description["id"], **measured})
    _draw_grid(_in_order(part.shown for part in shares), sample_grid)
    return {
        **cell,
        "metrics": metrics,
        "images_sha256": hashlib.sha256(b"".join(_in_order(part.digests for part in shares))).hexdigest(),
        "seconds": time.perf_counter() - start,
        "num_processes": accelerator.num_processes,
        "batch_size": batch_size,
        "device": _name_of_device(accelerator.device),
    }


def _name_of_device(device: torch.device) -> str:
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _in_order(parts: Iterable[dict[int, Any]]) -> list[Any]:
    """Values of several mappings by image number, in the order of the numbers."""
    together = {}
    for part in parts:
        together |= part
    return [together[index] for index in sorted(together)]


def _inception_score(logits: torch.Tensor) -> dict[str, float]:
    from torch_fidelity.metric_isc import isc_features_to_metric

    score = isc_features_to_metric(logits)
    return {"inception_score": score["inception_score_mean"], "inception_score_std": score["inception_score_std"]}


def _draw_grid(images: Sequence[np.ndarray], path: Path) -> None:
    images = [Image.fromarray(image.squeeze(0) if len(image) == 1 else image.transpose(1, 2, 0)) for image in images]
    columns = min(8, len(images))
    images = images[: len(images) // columns * columns]
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = PngInfo()
    for name, text in MARK.items():
        notes.add_text(name, text)
    make_image_grid(images, rows=len(images) // columns, cols=columns).save(path, pnginfo=notes)
