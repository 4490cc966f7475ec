"""Images as latents, read memory-mapped; posteriors are drawn anew at every epoch. `encoding.py` writes them.

    folder/shard-00000.safetensors   mean, std, flipped_mean, flipped_std (float32), without std where an autoencoder
                                     returns points and no posteriors; or pixels (uint8)
                                     label, pooled_projections (float32), if there are any
    folder/index.json                settings, shards and the statistics of the data

A folder without `index.json` is unfinished.
"""

import ctypes
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from ..files import plain_name, read_json, sha256_of_file
from .settings import FORMAT_VERSION, refuse_differences, vae_fingerprint


if TYPE_CHECKING:
    from diffusers import ModelMixin

INDEX_NAME = "index.json"
REPAIR = "delete the file and encode again into the same folder, which makes what is missing"


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes as a VAE takes them.

    Args:
        pixels (torch.Tensor): uint8, any shape.
    Returns:
        torch.Tensor: float32 in [-1, 1], same shape.
    """
    return pixels.float() / 127.5 - 1


def content_hash(index: dict[str, Any]) -> str:
    """SHA-256 of what an index says of the data, but for names: of rows, of files left out, and of the VAE."""
    content = {key: value for key, value in index.items() if key not in ("content_hash", "rows_sha256", "skipped")}
    if isinstance(content.get("vae"), dict):
        content["vae"] = {key: value for key, value in content["vae"].items() if key != "id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _expect_random_access(tensors: Iterable[torch.Tensor]) -> None:
    """Has mapped rows read alone. Around each the system would read as much as its disk is set to, up to megabytes."""
    for tensor in tensors:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        # Through C, as a `mmap.mmap` keeps a file open for each shard. Advice that is refused is no error.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_RANDOM)


def _stacked(rows: Sequence[np.ndarray]) -> torch.Tensor:
    # A copy: writing to the mapping would change what is read next time. `np.stack` takes half as long again.
    return torch.from_numpy(np.concatenate(rows).reshape(len(rows), *rows[0].shape))


class LatentDataset(Dataset):
    """Encoded images, read from memory-mapped shards: memory does not grow with the data, and it can be pickled.

    Args:
        folder (str): what `encode_dataset` wrote.
    Attributes:
        latents_mean, latents_std (list[float]): per channel, of all drawn latents; 0 and 1 of those that come
            standardised by the autoencoder.
        id2label (dict[int, str]): names of the classes, None if unlabelled.
        latent_shape (tuple[int, int, int]): of one sample, (C, H, W).
        pooled_projection_dim (int): length of the condition vectors, None if there are none.
        index (dict): the whole `index.json`.
    Raises:
        FileNotFoundError: if `folder` holds no finished data set.
        ValueError: if the format is another one, the index was altered, or a shard has not the size that was written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        keys = dict.fromkeys(("format_version", "vae", "id2label", "latents_mean", "latents_std"), object)
        keys |= {"content_hash": str, "shards": list, "skipped": list}
        self.index = read_json(self.folder / INDEX_NAME, keys=keys, way_out=REPAIR)
        if self.index is None:
            raise FileNotFoundError(
                f"`folder` must hold a finished encoded data set, {INDEX_NAME} is not in {folder}."
            )
        version = self.index["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"`folder` must have format version {FORMAT_VERSION}, {folder} has {version}: encode into another one."
            )
        if self.index["content_hash"] != content_hash(self.index):
            raise ValueError(f"{self.folder / INDEX_NAME} must be as it was written, it was altered: {REPAIR}.")
        for shard in self.index["shards"]:
            path = self.folder / plain_name(shard["name"], self.folder / INDEX_NAME)
            num_bytes = path.stat().st_size if path.is_file() else 0
            if num_bytes != shard["num_bytes"]:
                raise ValueError(f"{path} must have {shard['num_bytes']} bytes, found {num_bytes}: {REPAIR}.")
        names = self.index["id2label"]
        self.id2label = None if names is None else {int(id_): name for id_, name in names.items()}
        self.latents_mean, self.latents_std = self.index["latents_mean"], self.index["latents_std"]
        self.latent_shape = tuple(self.index["latent_shape"])
        from ..configuration import check_latent_statistics  # brings diffusers, which encoding need not

        check_latent_statistics(self.latents_mean, self.latents_std, self.latent_shape[0])
        self.pooled_projection_dim = self.index["pooled_projection_dim"]
        self._ends = np.cumsum([shard["num_samples"] for shard in self.index["shards"]])
        self._mapped = {}

    def __len__(self) -> int:
        return self.index["num_samples"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # every process maps the files itself

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def read(self, index: int, flip: bool = False) -> dict[str, Any]:
        """The latents of one image, or of its mirror image.

        Args:
            index (int): in [0, number of samples).
            flip (bool): of the mirror image.
        Returns:
            dict: `mean` and `std` (torch.Tensor, float32, (C, H, W)), `label` (int) and `pooled_projections`
            (torch.Tensor, float32, (P,)). Pixels, and points of an autoencoder without posteriors, have no `std`;
            labels and vectors only if the data have them.
        Raises:
            IndexError: if `index` is out of range.
            ValueError: if `flip` is asked of latents encoded without.
        """
        sample = {name: values[0] for name, values in self.read_batch([index], [flip]).items()}
        if "label" in sample:
            sample["label"] = int(sample["label"])
        return sample

    def read_batch(self, indices: Sequence[int], flips: Sequence[bool]) -> dict[str, torch.Tensor]:
        """The latents of several images, in one go.

        Args:
            indices (sequence of int): each in [0, number of samples), (B,).
            flips (sequence of bool): which of them are to be of the mirror image, (B,).
        Returns:
            dict: what `read` returns of each, stacked: (B, C, H, W), `label` (int64, (B,)), (B, P).
        Raises:
            IndexError, ValueError: as `read` does.
        """
        indices, flips = np.asarray(indices, np.int64), np.asarray(flips, bool)
        if wrong := [*indices[(indices < 0) | (indices >= len(self))]]:
            raise IndexError(f"`index` must be in [0, {len(self)}), got {wrong[0]}.")
        if flips.any() and not self.can_flip:
            raise ValueError(f"`flip=True` needs data encoded with `random_flip=True`, {self.folder} was not.")
        shards = np.searchsorted(self._ends, indices, side="right")
        rows = indices - self._ends[shards]  # from the end of each shard
        places = [(self._arrays(shard), row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        if self.index["vae"] is None:
            pixels, mirrored = _stacked([arrays["pixels"][row] for arrays, row in places]), torch.from_numpy(flips)
            pixels[mirrored] = pixels[mirrored].flip(-1)
            batch = {"mean": to_unit_range(pixels)}
        else:
            prefixes = ["flipped_" if flip else "" for flip in flips]
            batch = {}
            for key in ("mean", "std") if self.index["vae"]["latents"] == "posterior" else ("mean",):
                found = zip(places, prefixes, strict=True)
                batch[key] = _stacked([arrays[prefix + key][row] for (arrays, row), prefix in found])
        if self.id2label is not None:
            batch["label"] = torch.tensor([int(arrays["label"][row]) for arrays, row in places])
        if self.pooled_projection_dim is not None:
            batch["pooled_projections"] = _stacked([arrays["pooled_projections"][row] for arrays, row in places])
        return batch

    def _arrays(self, shard: int) -> dict[str, np.ndarray]:
        """The mapped tensors of a shard, of which NumPy takes a row in a fraction of torch's time."""
        if shard not in self._mapped:
            with safe_open(self.folder / self.index["shards"][shard]["name"], framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            _expect_random_access(tensors.values())
            self._mapped[shard] = {key: tensor.numpy() for key, tensor in tensors.items()}
        return self._mapped[shard]

    def labels(self) -> torch.Tensor | None:
        """Class ids of all images, int64, (N,); None if unlabelled."""
        if self.id2label is None:
            return None
        labels = []
        for shard in self.index["shards"]:
            with safe_open(self.folder / shard["name"], framework="pt") as file:
                labels.append(file.get_tensor("label"))
        return torch.cat(labels)

    def verify(self, *, num_processes: int = 1, process_index: int = 0) -> None:
        """Reads every shard, or this process's share of them, and compares it with its SHA-256.

        Opening compares sizes only. This costs one reading of the data, less than the first epoch does.

        Args:
            num_processes, process_index (int): how many share the shards, and which one this is.
        Raises:
            ValueError: naming each altered shard.
        """

        def is_altered(shard: dict[str, Any]) -> bool:
            return sha256_of_file(self.folder / shard["name"]) != shard["sha256"]

        shards = self.index["shards"][process_index::num_processes]
        with ThreadPoolExecutor(4) as pool:  # hashing and reading release Python's lock
            altered = [
                shard["name"] for shard, wrong in zip(shards, pool.map(is_altered, shards), strict=True) if wrong
            ]
        if altered:
            raise ValueError(f"Shards of {self.folder} differ from what was written: {', '.join(altered)}: {REPAIR}.")

    @property
    def can_flip(self) -> bool:
        """Whether mirror images can be read."""
        return self.index["vae"] is None or self.index["random_flip"]

    def validate(self, *, vae: "ModelMixin | None", resolution: int, random_flip: bool = False) -> None:
        """Refuses data that were not encoded with what training asks for.

        Args:
            vae (ModelMixin): in float32; compared by configuration and weights, not by name. None for pixels.
            resolution (int): side of the images.
            random_flip (bool): whether training mirrors images.
        Raises:
            ValueError: naming each difference.
        """
        wanted = {"vae": None if vae is None else vae_fingerprint(vae), "resolution": resolution}
        if random_flip and vae is not None:  # mirror images that are there need not be asked for
            wanted["random_flip"] = True
        refuse_differences(self.folder, self.index, wanted)
