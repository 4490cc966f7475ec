"""From pictures to a data set of VAE posteriors: encoded once, read memory-mapped, drawn anew at every epoch.

    folder/index.json                written last: what was encoded, with what, and the statistics of the data
    folder/shard-00000.safetensors   mean, std, flipped_mean, flipped_std (float32), label; or pixels (uint8), label

A folder without `index.json` is unfinished. Shard k holds the rows [k·shard_size, (k+1)·shard_size) of the source that
could be read, so it depends on nothing but these rows.
"""

import bisect
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from .images import ImageRows


if TYPE_CHECKING:
    import datasets
    from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
INDEX_NAME = "index.json"


def vae_fingerprint(vae: "AutoencoderKL") -> dict[str, str]:
    """SHA-256 of a VAE's configuration and of its weights: what decides whether encoded latents are its own.

    Raises:
        ValueError: if the VAE is not in float32, where the same weights would have another fingerprint.
    """
    if vae.dtype != torch.float32:
        raise ValueError(f"`vae` must be in float32 to encode, received {vae.dtype}: load it with torch.float32.")
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    config_hash = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    weights_hash = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        weights_hash.update(name.encode() + tensor.cpu().numpy().tobytes())
    return {"config_hash": config_hash.hexdigest(), "weights_hash": weights_hash.hexdigest()}


class _ChannelStatistics:
    """Mean and std per channel of what training draws, std² = Var[mean] + E[std²], summed in float64."""

    def __init__(self):
        self.count, self.sum, self.sum_of_squares = 0, 0.0, 0.0

    def update(self, mean: torch.Tensor, std: torch.Tensor | None = None) -> None:
        mean = mean.double()
        self.count += mean[:, 0].numel()
        self.sum += mean.sum((0, 2, 3))
        self.sum_of_squares += mean.square().sum((0, 2, 3))
        if std is not None:
            self.sum_of_squares += std.double().square().sum((0, 2, 3))

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


def _to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def _encode_batch(pixels, vae, random_flip, statistics) -> dict[str, torch.Tensor]:
    if vae is None:
        statistics.update(_to_unit_range(pixels))
        return {"pixels": pixels}
    tensors = {}
    for prefix, variant in [("", pixels), ("flipped_", pixels.flip(-1))][: 1 + random_flip]:
        posterior = vae.encode(_to_unit_range(variant.to(vae.device))).latent_dist
        mean, std = posterior.mean.cpu(), posterior.std.cpu()
        statistics.update(mean, std)
        tensors |= {prefix + "mean": mean, prefix + "std": std}
    return tensors


@torch.no_grad()
def encode_dataset(
    dataset: "datasets.Dataset",
    folder: str | os.PathLike,
    *,
    vae: "AutoencoderKL | None",
    resolution: int,
    id2label: Mapping[int, str] | None = None,
    vae_id: str | None = None,
    random_flip: bool = False,
    num_channels: int = 3,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 32,
    shard_size: int = 2048,
    num_workers: int = 0,
    skip_corrupt: bool = False,
) -> "LatentDataset":
    """Encodes every picture once, on the VAE's device, and opens the result.

    Args:
        dataset (datasets.Dataset), id2label (dict): what `load_image_dataset` returned; no names, no labels.
        folder (str): where to write; it must not hold an encoded data set.
        vae (AutoencoderKL): in float32. `None` stores the pixels themselves, as bytes.
        resolution (int): side of the pictures, a multiple of the VAE's downsampling factor.
        vae_id (str): name kept for people; by default where the VAE was loaded from.
        random_flip (bool): store the posterior of the mirrored picture too. Pixels are mirrored on reading instead.
        num_channels (int): of the pictures when `vae` is None (1 or 3); a VAE brings its own.
        image_column, label_column (str): names of the columns.
        batch_size, shard_size (int): pictures per forward pass and per file.
        num_workers (int): processes that decode pictures.
        skip_corrupt (bool): leave unreadable pictures out, with a warning, instead of raising.
    Returns:
        LatentDataset: the encoded data.
    Raises:
        FileExistsError: if `folder` already holds an encoded data set.
        ValueError: for a picture that cannot be read, a constant channel, or a VAE that cannot encode these pictures.
    """
    folder, fingerprint = Path(folder), None
    if (folder / INDEX_NAME).exists():
        raise FileExistsError(f"`folder` already holds an encoded data set, delete it or take another: {folder}")
    if vae is not None:
        num_channels, factor = vae.config.in_channels, 2 ** (len(vae.config.block_out_channels) - 1)
        if resolution % factor:
            raise ValueError(f"`resolution` must be a multiple of the VAE's factor {factor}, received {resolution}.")
        fingerprint = {"id": vae_id or vae.config.get("_name_or_path"), **vae_fingerprint(vae)}
    if num_channels not in (1, 3):
        raise ValueError(f"Pictures have 1 (grey) or 3 (RGB) channels, `vae` or `num_channels` wants {num_channels}.")

    folder.mkdir(parents=True, exist_ok=True)
    label_column = None if id2label is None else label_column
    pictures = ImageRows(dataset, image_column, label_column, resolution, num_channels)
    statistics, shards, skipped = _ChannelStatistics(), [], []
    with tqdm(total=len(dataset), desc="Encoding pictures", unit="img") as progress_bar:
        for start in range(0, len(dataset), shard_size):
            rows = Subset(pictures, range(start, min(start + shard_size, len(dataset))))
            parts = []
            for batch in DataLoader(rows, batch_size, num_workers=num_workers, collate_fn=list):
                progress_bar.update(len(batch))
                for name, _, _, error in batch:
                    if error is not None and not skip_corrupt:
                        raise ValueError(f"Cannot read {name}: {error}. `--skip_corrupt` leaves such pictures out.")
                    if error is not None:
                        logger.warning("Left out %s, which cannot be read: %s", name, error)
                        skipped.append(name)
                batch = [(pixels, label) for _, pixels, label, error in batch if error is None]
                if batch:
                    parts.append(
                        _encode_batch(torch.stack([pixels for pixels, _ in batch]), vae, random_flip, statistics)
                    )
                    if id2label is not None:
                        parts[-1]["label"] = torch.tensor([label for _, label in batch])
            if parts:
                tensors = {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}
                shards.append(_write_shard(folder / f"shard-{start // shard_size:05d}.safetensors", tensors))
    if not shards:
        raise ValueError(f"None of the {len(dataset)} pictures could be read.")

    latents_mean, latents_std = statistics.result()
    index = {
        "format_version": FORMAT_VERSION,
        "vae": fingerprint,
        "resolution": resolution,
        "latent_shape": list(next(iter(tensors.values())).shape[1:]),
        "random_flip": random_flip,
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "latents_mean": latents_mean,
        "latents_std": latents_std,
        "id2label": None if id2label is None else dict(id2label),
        "shards": shards,
        "skipped": skipped,
    }
    _replace(folder / INDEX_NAME, lambda path: path.write_text(json.dumps(index, indent=1)))
    return LatentDataset(folder)


def _replace(path: Path, write) -> None:
    """Writes beside `path` and renames, so that a kill leaves the old file or none, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    _replace(path, lambda temporary: save_file(tensors, temporary))
    num_samples = len(next(iter(tensors.values())))
    return {"name": path.name, "num_samples": num_samples, "num_bytes": path.stat().st_size}


class LatentDataset(Dataset):
    """Encoded pictures, read from memory-mapped shards: memory does not grow with the data, and it can be pickled.

    Args:
        folder (str): what `encode_dataset` wrote.
    Attributes:
        latents_mean, latents_std (list[float]): per channel, of all drawn latents.
        id2label (dict[int, str]): names of the classes, None if unlabelled.
        latent_shape (tuple[int, int, int]): of one sample, (C, H, W).
        index (dict): the whole `index.json`.
    Raises:
        FileNotFoundError: if `folder` holds no finished data set.
        ValueError: if the format is another one or a shard has not the size that was written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / INDEX_NAME).is_file():
            raise FileNotFoundError(
                f"`folder` must hold a finished encoded data set, {INDEX_NAME} is not in {folder}."
            )
        self.index = json.loads((self.folder / INDEX_NAME).read_text())
        if self.index["format_version"] != FORMAT_VERSION:
            version = self.index["format_version"]
            raise ValueError(f"`folder` must have format version {FORMAT_VERSION}, {folder} has {version}.")
        for shard in self.index["shards"]:
            path = self.folder / shard["name"]
            num_bytes = path.stat().st_size if path.is_file() else 0
            if num_bytes != shard["num_bytes"]:
                raise ValueError(f"{path} must have {shard['num_bytes']} bytes, found {num_bytes}: encode again.")
        names = self.index["id2label"]
        self.id2label = None if names is None else {int(id_): name for id_, name in names.items()}
        self.latents_mean, self.latents_std = self.index["latents_mean"], self.index["latents_std"]
        self.latent_shape = tuple(self.index["latent_shape"])
        self._ends = list(itertools.accumulate(shard["num_samples"] for shard in self.index["shards"]))
        self._files = {}

    def __len__(self) -> int:
        return self.index["num_samples"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # every process maps the files itself

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def read(self, index: int, flip: bool = False) -> dict[str, Any]:
        """The posterior of one picture, or of its mirror image.

        Returns:
            dict: `mean` and `std` (torch.Tensor, float32, (C, H, W)) and `label` (int). Pixels have no `std`,
            unlabelled data no `label`.
        Raises:
            ValueError: if `flip` is asked of latents encoded without.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), received {index}.")
        if flip and not self.can_flip:
            raise ValueError(f"`flip=True` needs data encoded with `random_flip=True`, {self.folder} was not.")
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        if shard not in self._files:
            self._files[shard] = safe_open(self.folder / self.index["shards"][shard]["name"], framework="pt")
        file = self._files[shard]
        if self.index["vae"] is None:
            pixels = _to_unit_range(file.get_slice("pixels")[row])
            sample = {"mean": pixels.flip(-1) if flip else pixels}
        else:
            prefix = "flipped_" if flip else ""
            # Copies: a slice is a view of the mapping, and writing to it would change what is read next time.
            sample = {key: file.get_slice(prefix + key)[row].clone() for key in ("mean", "std")}
        if self.id2label is not None:
            sample["label"] = int(file.get_slice("label")[row])
        return sample

    @property
    def can_flip(self) -> bool:
        """Whether mirror images can be read."""
        return self.index["vae"] is None or self.index["random_flip"]

    def validate(self, *, vae: "AutoencoderKL | None", resolution: int, random_flip: bool = False) -> None:
        """Refuses data that were not encoded with what training asks for.

        Args:
            vae (AutoencoderKL): in float32; compared by configuration and weights, not by name. None for pixels.
            resolution (int): side of the pictures.
            random_flip (bool): whether training mirrors pictures.
        Raises:
            ValueError: naming each difference.
        """
        stored, differences = self.index["vae"], []
        if (stored is None) != (vae is None):
            differences.append(f"they hold {'pixels' if stored is None else 'latents'}")
        elif vae is not None:
            for key, wanted in vae_fingerprint(vae).items():
                if stored[key] != wanted:
                    differences.append(f"the VAE's {key} differs (they were encoded with {stored['id']!r})")
        if self.index["resolution"] != resolution:
            differences.append(f"their resolution is {self.index['resolution']}, not {resolution}")
        if random_flip and not self.can_flip:
            differences.append("they were encoded without `random_flip`")
        if differences:
            raise ValueError(f"The encoded data in {self.folder} do not fit: {'; '.join(differences)}. Encode again.")
