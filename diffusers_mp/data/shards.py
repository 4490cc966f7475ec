"""One shard of encoded images and its sidecar: rows prepared by threads, encoded, summed up for the statistics."""

import hashlib
import itertools
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..files import check_keys, read_json, sha256_of_file, whole_file
from .latents import to_unit_range
from .pixels import read_image
from .settings import EncodingSettings, shortened


logger = logging.getLogger(__name__)

_FLOAT32_MAX = torch.finfo(torch.float32).max


class ChannelStatistics:
    """Mean and std per channel of what training draws, std² = Var[mean] + E[std²], summed in float64.

    Summed by NumPy, in one thread: PyTorch's order of summation depends on the number of threads.
    """

    def __init__(self):
        self.count, self.sum, self.sum_of_squares = 0, 0.0, 0.0

    def update(self, mean: torch.Tensor, std: torch.Tensor | None = None) -> None:
        mean = mean.double().numpy()
        self.count += mean[:, 0].size
        self.sum += mean.sum((0, 2, 3))
        self.sum_of_squares += (mean**2).sum((0, 2, 3))
        if std is not None:
            self.sum_of_squares += (std.double().numpy() ** 2).sum((0, 2, 3))

    def state(self) -> dict[str, Any]:
        """The sums as JSON has them, which loses no bit of a float64."""
        return {"count": self.count, "sum": self.sum.tolist(), "sum_of_squares": self.sum_of_squares.tolist()}

    def add(self, state: Mapping[str, Any]) -> None:
        self.count += state["count"]
        self.sum += torch.tensor(state["sum"], dtype=torch.float64)
        self.sum_of_squares += torch.tensor(state["sum_of_squares"], dtype=torch.float64)

    def result(self) -> tuple[list[float], list[float]]:
        mean = self.sum / self.count
        std = (self.sum_of_squares / self.count - mean.square()).clamp(min=0).sqrt()
        # A constant leaves a rounding error of about 1e-8 of its value, not an exact 0; NaN fails here as well.
        wrong = (~(std > 1e-6 * mean.abs().clamp(min=1))).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"Every channel must vary over the data, channels {wrong} have std {std[wrong].tolist()}."
            )
        return mean.tolist(), std.tolist()


class ShardRows:
    """The rows of one shard: prepared in order by threads, and summed up in a digest that tells other data apart.

    The digest is over names without their folders, sizes and labels, which cost no decoding and survive a move.
    """

    def __init__(self, rows, first_row: int, columns: Mapping[str, str], settings: EncodingSettings, progress_bar):
        self.rows, self.first_row, self.columns = rows, first_row, columns
        self.settings, self.progress_bar = settings, progress_bar
        self.num_rows, self.digest = 0, hashlib.sha256()

    def _counted(self) -> Iterator[tuple[str, dict | None, Any]]:
        for row in self.rows:
            conditions = {role: row[column] for role, column in self.columns.items()}
            cell = conditions.pop("cell")
            path, content = (cell or {}).get("path"), (cell or {}).get("bytes")
            num_bytes = None if content is None else len(content)
            if content is None and path is not None and os.path.isfile(path):
                num_bytes = os.path.getsize(path)
            self.digest.update(json.dumps([path and os.path.basename(path), num_bytes, *conditions.values()]).encode())
            name = path or f"row {self.first_row + self.num_rows}"
            self.num_rows += 1
            self.progress_bar.update()
            yield name, cell, conditions

    def digest_of_all(self) -> str:
        deque(self._counted(), maxlen=0)
        return self.digest.hexdigest()

    def _prepare(self, name, cell, conditions):
        return name, *read_image(cell, self.settings.resolution, self.settings.num_channels), conditions

    def prepared(self, pool: ThreadPoolExecutor | None) -> Iterator[tuple]:
        """(name, pixels, error, conditions), with at most two batches of images waiting to be taken."""
        if pool is None:
            yield from itertools.starmap(self._prepare, self._counted())
            return
        pending = deque()
        for row in self._counted():
            pending.append(pool.submit(self._prepare, *row))
            if len(pending) > 2 * self.settings.batch_size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def make_shard(folder: Path, number: int, images: ShardRows, pool: ThreadPoolExecutor | None, vae, id2label) -> None:
    """Makes a shard and its sidecar; of a shard that is finished, compares the rows it was made from."""
    sidecar = finished_sidecar(folder, number)
    if sidecar is not None:
        if images.digest_of_all() != sidecar["rows_sha256"]:
            raise ValueError(
                f"`folder` must have been begun with the same data: other names, sizes or labels of images "
                f"were encoded in {folder / shard_name(number)}. Take another folder."
            )
        return
    (folder / _sidecar_name(number)).unlink(missing_ok=True)
    sidecar = _encode_shard(folder / shard_name(number), images.prepared(pool), images.settings, vae, id2label)
    sidecar |= {"num_rows": images.num_rows, "rows_sha256": images.digest.hexdigest()}
    write_json(folder / _sidecar_name(number), sidecar)


def _encode_shard(
    path: Path, images: Iterator[tuple], settings: EncodingSettings, vae, id2label: Mapping[int, str] | None
) -> dict[str, Any]:
    """Writes one shard, unless none of its images can be read, and returns what its sidecar says of it."""
    statistics, parts, skipped, pooled_dim = ChannelStatistics(), [], [], None
    while rows := list(itertools.islice(images, settings.batch_size)):
        batch, names = [], []
        for name, pixels, error, conditions in rows:
            if error is not None and not settings.skip_corrupt:
                raise ValueError(f"Cannot read {name}: {error}. `--skip_corrupt` leaves such images out.")
            if error is not None:
                logger.warning("Left out %s, which cannot be read: %s", name, error)
                skipped.append(name)
                continue
            label = conditions.get("label")
            if id2label is not None and (
                not isinstance(label, int) or label < 0 or id2label and label not in id2label
            ):
                raise ValueError(f"Labels must be ids of `id2label`, {name} has {label!r}.")
            if "pooled_projections" in conditions:
                vector = _vector(name, conditions["pooled_projections"], pooled_dim)
                conditions["pooled_projections"], pooled_dim = vector, len(vector)
            batch.append((pixels, conditions))
            names.append(name)
        if batch:
            pixels = torch.stack([pixels for pixels, _ in batch])
            parts.append(_encode_batch(pixels, vae, settings.random_flip, statistics))
            finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in parts[-1].values()]).all(0)
            if not finite.all():
                name = names[finite.tolist().index(False)]
                raise ValueError(f"`vae` must make finite latents, in {vae.dtype} those of {name} are not.")
            for role in batch[0][1]:
                parts[-1][role] = torch.tensor([conditions[role] for _, conditions in batch])
    if not parts:
        return {"num_samples": 0, "skipped": skipped}
    tensors = {key: torch.cat([part.pop(key) for part in parts]) for key in list(parts[0])}
    sha256 = _replace(path, lambda temporary: save_file(tensors, temporary))
    labels = tensors["label"].tolist() if id2label is not None else []
    first = next(iter(tensors.values()))
    return {
        "name": path.name,
        "num_samples": len(first),
        "num_bytes": path.stat().st_size,
        "sha256": sha256,
        "latent_shape": list(first.shape[1:]),
        "pooled_projection_dim": pooled_dim,
        "statistics": statistics.state(),
        "num_samples_per_class": {str(id_): count for id_, count in sorted(Counter(labels).items())},
        "skipped": skipped,
    }


def _encode_batch(pixels, vae, random_flip, statistics) -> dict[str, torch.Tensor]:
    if vae is None:
        statistics.update(to_unit_range(pixels))
        return {"pixels": pixels}
    tensors = {}
    for prefix, variant in [("", pixels), ("flipped_", pixels.flip(-1))][: 1 + random_flip]:
        posterior = vae.encode(to_unit_range(variant.to(vae.device))).latent_dist
        mean, std = posterior.mean.cpu().contiguous(), posterior.std.cpu().contiguous()
        statistics.update(mean, std)
        tensors |= {prefix + "mean": mean, prefix + "std": std}
    return tensors


def _vector(name: str, values: Any, dim: int | None) -> list[float]:
    is_vector = isinstance(values, (list, tuple)) and len(values) and all(isinstance(v, (int, float)) for v in values)
    # As they are stored: beyond float32 they would be infinite.
    if not is_vector or not all(abs(v) <= _FLOAT32_MAX for v in values) or len(values) != (dim or len(values)):
        raise ValueError(
            f"Condition vectors must be lists of finite numbers, all of one length, {name} has {shortened(values)}."
        )
    return [float(value) for value in values]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _sidecar_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def finished_sidecar(folder: Path, number: int) -> dict[str, Any] | None:
    """The sidecar of a shard, None if the shard has to be made (again)."""
    way_out = "remove it, and the shard is made again"
    path, keys = (
        folder / _sidecar_name(number),
        {"num_samples": int, "num_rows": int, "rows_sha256": str, "skipped": list},
    )
    sidecar = read_json(path, keys=keys, way_out=way_out)
    if sidecar is not None and sidecar["num_samples"]:
        of_shard = {"name": str, "num_bytes": int, "sha256": str, "latent_shape": list, "statistics": dict}
        of_shard["pooled_projection_dim"] = (int, NoneType)
        check_keys(sidecar, path, of_shard | {"num_samples_per_class": dict}, way_out)
    return sidecar if sidecar is not None and (not sidecar["num_samples"] or is_whole(folder, sidecar)) else None


def is_whole(folder: Path, shard: dict[str, Any]) -> bool:
    path = folder / shard["name"]
    return path.is_file() and path.stat().st_size == shard["num_bytes"]


def write_json(path: Path, content: Any) -> None:
    _replace(path, lambda unfinished: unfinished.write_text(json.dumps(content, indent=1)))


def _replace(path: Path, write: Callable[[Path], Any]) -> str:
    """Writes beside `path` and renames, so that a kill leaves the old file or none, never half of one; its SHA-256."""
    try:
        with whole_file(path) as unfinished:
            write(unfinished)
            sha256 = sha256_of_file(unfinished)
    except (FileNotFoundError, SafetensorError):
        # A second encoder in this folder had all files before, this one among them, and has swept.
        return sha256_of_file(path)
    return sha256
