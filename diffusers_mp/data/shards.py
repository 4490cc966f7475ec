"""One shard of encoded images and its sidecar: rows prepared by threads, encoded, summed up for the statistics."""

import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .. import autoencoders
from ..files import check_keys, plain_name, read_json, sha256_of_file, whole_file
from .changes import DIGEST_LENGTH, row_digest
from .feeding import can_pin
from .latents import to_unit_range
from .pixels import read_bytes, read_image
from .settings import EncodingSettings, shortened


logger = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float32).max
# Mean square of latents, 1 on the data that an autoencoder has its statistics of.
MOST_POWER = 2


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

    def of_standardised(self) -> tuple[list[float], list[float]]:
        """0 and 1: what an autoencoder standardises itself is left so, if its magnitude is 1 on these data too."""
        self.result()
        power = (self.sum_of_squares.sum() / self.count / len(self.sum)).item()
        if not 1 / MOST_POWER < power < MOST_POWER:
            raise ValueError(
                "`vae` must make latents of magnitude 1, which the model is built for: those that it standardises by "
                f"its own statistics must have a power between {1 / MOST_POWER:g} and {MOST_POWER:g}, that of these "
                f"images is {power:.3g}. Without its own statistics (of FLUX.2 after "
                "`vae.bn.reset_running_stats()`, of an RAE without `latents_mean` and `latents_std` in its config) "
                "those of the data are taken."
            )
        return [0.0] * len(self.sum), [1.0] * len(self.sum)


class ShardRows:
    """The rows of one shard, taken up in order by threads."""

    def __init__(self, rows, first_row: int, columns: Mapping[str, str], settings: EncodingSettings, progress_bar):
        self.rows, self.first_row, self.columns = rows, first_row, columns
        self.settings, self.progress_bar = settings, progress_bar

    def _named(self) -> Iterator[tuple[str, dict | None, dict[str, Any]]]:
        for number, row in enumerate(self.rows, start=self.first_row):
            conditions = {role: row[column] for role, column in self.columns.items()}
            cell = conditions.pop("cell")
            self.progress_bar.update()
            yield (cell or {}).get("path") or f"row {number}", cell, conditions

    def _digest(self, name, cell, conditions):
        return name, row_digest((cell or {}).get("path"), conditions, read_bytes(cell))

    def _prepare(self, name, cell, conditions):
        settings, path = self.settings, (cell or {}).get("path")
        content = read_bytes(cell)  # once: what is encoded is what the digest is of
        digest = row_digest(path, conditions, content)
        cell = {"bytes": content, "path": path}
        image = read_image(cell, settings.resolution, settings.num_channels, settings.background)
        return name, digest, *image, conditions

    def digests(self, pool: ThreadPoolExecutor | None) -> Iterator[tuple[str, str]]:
        """(name, digest), without decoding an image."""
        return self._in_order(self._digest, pool)

    def prepared(self, pool: ThreadPoolExecutor | None) -> Iterator[tuple]:
        """(name, digest, pixels, error, conditions)."""
        return self._in_order(self._prepare, pool)

    def _in_order(self, function: Callable[..., tuple], pool: ThreadPoolExecutor | None) -> Iterator[tuple]:
        # At most two batches of images wait to be taken.
        if pool is None:
            yield from itertools.starmap(function, self._named())
            return
        pending = deque()
        for row in self._named():
            pending.append(pool.submit(function, *row))
            if len(pending) > 2 * self.settings.batch_size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def make_shard(
    folder: Path,
    number: int,
    images: ShardRows,
    state: str | None,
    pool: ThreadPoolExecutor | None,
    vae,
    id2label,
) -> None:
    """Makes a shard and its sidecar; of a finished one compares the rows, if the state of their source is another."""
    path, sidecar = folder / _sidecar_name(number), finished_sidecar(folder, number)
    if sidecar is None:
        path.unlink(missing_ok=True)
        sidecar = _encode_shard(folder / shard_name(number), images.prepared(pool), images.settings, vae, id2label)
        write_json(path, sidecar | {"source_state": state})
    elif state is not None and state == sidecar["source_state"]:
        images.progress_bar.update(sidecar["num_rows"])
    else:
        _compare(folder / shard_name(number), images.digests(pool), sidecar["row_digests"])
        if state is not None:
            try:
                write_json(path, sidecar | {"source_state": state})
            except OSError as error:  # of a folder that may only be read
                logger.warning("%s; the images of %s are read again at the next start", error, path)


def _compare(path: Path, digests: Iterator[tuple[str, str]], stored: str) -> None:
    """Refuses rows that are not those a shard was made from, and names the first."""
    number = 0
    for name, digest in digests:
        if digest != stored[number * DIGEST_LENGTH : (number + 1) * DIGEST_LENGTH]:
            raise ValueError(
                f"`folder` must have been encoded from the same data: {name} is not what {path} was made from. It or "
                "its label was edited, added or removed since, or other samples were drawn. Take another folder, or "
                "delete this one to encode anew."
            )
        number += 1
    if number * DIGEST_LENGTH != len(stored):
        raise ValueError(f"`folder` must have been encoded from the same data: these end within {path}.")


def _encode_shard(
    path: Path, images: Iterator[tuple], settings: EncodingSettings, vae, id2label: Mapping[int, str] | None
) -> dict[str, Any]:
    """Writes one shard, unless none of its images can be read, and returns what its sidecar says of it."""
    statistics, parts, skipped, digests = ChannelStatistics(), [], [], []
    batches = _readable_batches(images, settings, id2label, skipped, digests)
    for moments, names, conditions in _encoded(batches, vae, settings.random_flip):
        finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in moments.values()]).all(0)
        if not finite.all():
            name = names[finite.tolist().index(False)]
            raise ValueError(f"`vae` must make finite latents, in {vae.dtype} those of {name} are not.")
        if vae is None:
            statistics.update(to_unit_range(moments["pixels"]))
        else:
            for prefix in ("", "flipped_")[: 1 + settings.random_flip]:
                statistics.update(moments[f"{prefix}mean"], moments.get(f"{prefix}std"))
        parts.append(moments | {role: torch.tensor([each[role] for each in conditions]) for role in conditions[0]})
    of_rows = {"num_rows": len(digests), "row_digests": "".join(digests), "skipped": skipped}
    if not parts:
        return {"num_samples": 0, **of_rows}
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
        "pooled_projection_dim": tensors["pooled_projections"].shape[1] if "pooled_projections" in tensors else None,
        "statistics": statistics.state(),
        "num_samples_per_class": {str(id_): count for id_, count in sorted(Counter(labels).items())},
        **of_rows,
    }


def _readable_batches(
    images: Iterator[tuple],
    settings: EncodingSettings,
    id2label: Mapping[int, str] | None,
    skipped: list[str],
    digests: list[str],
) -> Iterator[tuple[torch.Tensor, list[str], list[dict]]]:
    """(pixels, names, conditions) of those that can be read; notes the others, and the digests of all."""
    pooled_dim = None
    while rows := list(itertools.islice(images, settings.batch_size)):
        batch, names, all_conditions = [], [], []
        for name, digest, pixels, error, conditions in rows:
            digests.append(digest)
            if error is not None and not settings.skip_corrupt:
                raise ValueError(f"Cannot read {name}: {error}. `--skip_corrupt` leaves such images out.")
            if error is not None:
                logger.warning("Left out %s, which cannot be read: %s", name, error)
                skipped.append(name)
                continue
            if id2label is not None:
                _check_label(conditions["label"], id2label, name, settings.label_column)
            if "pooled_projections" in conditions:
                vector = _vector(conditions["pooled_projections"], pooled_dim, name)
                conditions["pooled_projections"], pooled_dim = vector, len(vector)
            batch.append(pixels)
            names.append(name)
            all_conditions.append(conditions)
        if batch:
            yield torch.stack(batch), names, all_conditions


def _encoded(batches: Iterator[tuple], vae, random_flip: bool) -> Iterator[tuple]:
    """Batches with what a shard holds of them in place of their pixels.

    A device is at work on a batch while the next one is read and copied to it, and while what it made of the one
    before is looked at.
    """
    pins, at_work = vae is not None and can_pin(vae.device), None
    for pixels, *of_rows in batches:
        if vae is None:
            yield {"pixels": pixels}, *of_rows
            continue
        # Both copies before the next batch is begun, behind which they would wait.
        pixels = (pixels.pin_memory() if pins else pixels).to(vae.device, non_blocking=True)
        done = at_work and _fetched(*at_work)
        at_work = _begun(pixels, vae, random_flip), *of_rows
        if done:
            yield done
    if at_work:
        yield _fetched(*at_work)


def _begun(pixels: torch.Tensor, vae, random_flip: bool) -> dict[str, torch.Tensor]:
    tensors = {}
    for prefix, variant in [("", pixels), ("flipped_", pixels.flip(-1))][: 1 + random_flip]:
        latents = autoencoders.encode(vae, to_unit_range(variant))
        tensors |= {f"{prefix}{name}": values for name, values in latents.items()}
    return tensors


def _fetched(tensors: dict[str, torch.Tensor], *of_rows) -> tuple:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, *of_rows


def _check_label(label: Any, id2label: Mapping[int, str], name: str, column: str) -> None:
    if label is None or label == "" or label != label:  # NaN is what an empty cell between numbers is read as
        raise ValueError(f"`label_column` must hold a class for each image, {column!r} of {name} is empty.")
    if not isinstance(label, int) or label < 0 or id2label and label not in id2label:
        raise ValueError(f"`label_column` must hold ids of `id2label`, {column!r} of {name} is {label!r}.")


def _vector(values: Any, dim: int | None, name: str) -> list[float]:
    is_vector = isinstance(values, (list, tuple)) and len(values) and all(isinstance(v, (int, float)) for v in values)
    # In float32, as they are stored; NaN fails here as well.
    if not is_vector or not all(abs(value) <= LARGEST for value in values) or len(values) != (dim or len(values)):
        raise ValueError(
            "`pooled_column` must hold lists of numbers that are finite in float32, all of one length, that of "
            f"{name} is {shortened(values)}."
        )
    return [float(value) for value in values]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _sidecar_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def finished_sidecar(folder: Path, number: int) -> dict[str, Any] | None:
    """The sidecar of a shard, None if the shard has to be made (again)."""
    way_out = "remove it, and the shard is made again"
    path = folder / _sidecar_name(number)
    keys = {"num_samples": int, "num_rows": int, "row_digests": str, "skipped": list, "source_state": object}
    sidecar = read_json(path, keys=keys, way_out=way_out)
    if sidecar is not None and sidecar["num_samples"]:
        of_shard = {"name": str, "num_bytes": int, "sha256": str, "latent_shape": list, "statistics": dict}
        of_shard["pooled_projection_dim"] = (int, NoneType)
        check_keys(sidecar, path, of_shard | {"num_samples_per_class": dict}, way_out)
    return sidecar if sidecar is not None and (not sidecar["num_samples"] or is_whole(folder, sidecar)) else None


def is_whole(folder: Path, shard: dict[str, Any]) -> bool:
    path = folder / plain_name(shard["name"], f"the JSON files of {folder}")
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
