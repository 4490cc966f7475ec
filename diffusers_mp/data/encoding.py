"""From images to a data set of latents: encoded once, in a folder that `latents.py` reads.

    folder/settings.json             written first: what is encoded, and how
    folder/shard-00000.safetensors   mean, std, flipped_mean, flipped_std (float32), without std where an autoencoder
                                     returns points and no posteriors; or pixels (uint8)
                                     label, pooled_projections (float32), if there are any
    folder/shard-00000.json          written after its shard: counts, sums for the statistics, SHA-256, rows left out,
                                     digests of the rows, and the state of their source
    folder/index.json                written last: settings, shards and the statistics of the data

Shard k holds the rows [k·shard_size, (k+1)·shard_size) of the source that could be read, so it depends on nothing but
these rows, and belongs to process k mod num_processes. A shard with its sidecar is finished and never made again; one
without is made again as a whole. The rows of a finished shard are compared with their digests where the state of their
source has changed, and not read where it has not (`changes.py`). The index is put together from the sidecars, in the
order of the shards: the same whoever made them, and however often the work was interrupted. A folder without
`index.json` is unfinished.

Processes wait for each other by looking for these files. Nothing is waited for through a process group, whose barriers
give up after minutes, while encoding takes hours.
"""

import hashlib
import itertools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .. import autoencoders
from ..files import UNFINISHED, read_json
from ..sources import check_reachable, naming
from .changes import SourceState
from .formats import register_formats
from .latents import INDEX_NAME, REPAIR, LatentDataset, content_hash
from .settings import EncodingSettings, refuse_differences
from .shards import (
    ChannelStatistics,
    ShardRows,
    finished_sidecar,
    is_whole,
    make_shard,
    shard_name,
    write_json,
)


if TYPE_CHECKING:
    import datasets
    from diffusers import ModelMixin

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
POLL_SECONDS = 0.5


def load_vae(name_or_path: str, cache_dir: str | None = None) -> "ModelMixin | None":
    """The autoencoder that a script was given as `--vae`, of any class that `autoencoders.py` knows.

    Args:
        name_or_path (str): an autoencoder or a pipeline that has one, by folder or id on the Hub, or "none" for images
            as they are.
        cache_dir (str, optional): where the Hub client keeps its files.
    Returns:
        ModelMixin or None: in evaluation mode.
    Raises:
        OSError: if there is none, or none within reach.
        ValueError: if its class is not supported or cannot be made, or weights are missing.
    """
    if name_or_path == "none":
        return None
    import diffusers

    files = ("config.json", "vae/config.json")
    instead = "the path of a VAE, or 'none' for images as they are"
    check_reachable("vae", name_or_path, files, cache_dir=cache_dir, instead=instead)
    failures = []
    for subfolder in (None, "vae"):
        source = {"subfolder": subfolder, "cache_dir": cache_dir}
        try:
            config = diffusers.AutoencoderKL.load_config(name_or_path, **source)  # of any class
            with naming("vae", name_or_path):
                autoencoders.check_config(config)
                vae_class = getattr(diffusers, config["_class_name"])
                vae, info = vae_class.from_pretrained(name_or_path, **source, output_loading_info=True)
            # A count of updates, which only training reads.
            missing = [key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")]
            if missing:
                raise ValueError(
                    f"`vae` must hold the weights that its config.json describes, {name_or_path} lacks "
                    f"{len(missing)}, such as {min(missing)}."
                )
            return vae.eval()
        except OSError as error:
            failures.append(error)
    raise OSError(
        "`--vae` must be an image autoencoder of diffusers, or a pipeline that has one, by folder or by its id on the "
        f"Hub, within reach or downloaded before, or 'none' for images as they are, got {name_or_path!r}: "
        f"{failures[0]}"
    ) from failures[0]


@torch.no_grad()
def encode_dataset(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    folder: str | os.PathLike,
    settings: EncodingSettings,
    *,
    vae: "ModelMixin | None",
    id2label: Mapping[int, str] | None = None,
    num_processes: int = 1,
    process_index: int = 0,
) -> LatentDataset:
    """Encodes every image once, on the VAE's device, and opens the result; goes on where an earlier call stopped.

    Called by all processes with the same arguments and a folder that all see, it shares the shards among them, and
    returns in each when all are done. On one kind of device the result has the same bits for any number of processes
    and of interruptions, if `batch_size` stays. Memory holds one shard per process, however many there are.

    Args:
        dataset (datasets.Dataset or datasets.IterableDataset), id2label (dict): what `load_image_dataset` returned; no
            names, no labels. Of a stream every process reads all, and decodes its own shards.
        folder (str): where to write. It may hold an encoding with the same settings and data, which goes on where it
            is unfinished and is opened where it is not. Rows that were edited since are refused, but for those of a
            stream of which all is encoded. Without `skip_corrupt` it is said if images were left out.
        settings (EncodingSettings): what images are encoded to, and how.
        vae (ModelMixin): an image autoencoder, in float32. `None` stores the pixels themselves, as bytes.
        num_processes, process_index (int): how many share the work, and which one this is.
    Returns:
        LatentDataset: the encoded data.
    Raises:
        OSError: for a file that is missing or cannot be read.
        ValueError: for an image that is damaged, a wrong label, a constant channel, a VAE that cannot encode these
            images or whose own statistics are not those of these data, or a folder encoded with other settings or
            from other data.
    """
    folder, settings = Path(folder), settings.for_vae(vae)
    if not 0 <= process_index < num_processes:
        raise ValueError(f"`process_index` must be in [0, {num_processes}), got {process_index}.")
    num_rows = len(dataset) if hasattr(dataset, "__len__") else None
    record = _claim(folder, settings.record(vae, id2label), process_index)
    index = _finished_index(folder)
    if index is not None and num_rows is None:
        # A stream would have to be read to its end to be compared.
        return _open(folder, settings.skip_corrupt, process_index)
    if index is not None:
        refuse_differences(folder, index, {"num_rows": num_rows})
    elif process_index == 0:
        (folder / INDEX_NAME).unlink(missing_ok=True)

    # The rows, without columns that nobody needs, and how many of them are this process's
    columns = {"cell": settings.image_column}
    if id2label is not None:
        columns["label"] = settings.label_column
    if settings.pooled_column is not None:
        columns["pooled_projections"] = settings.pooled_column
    if settings.pooled_column not in (None, *(there := dataset.column_names or [settings.pooled_column])):
        raise ValueError(f"`pooled_column` must be one of {there}, got {settings.pooled_column!r}.")
    source, dataset = SourceState(dataset, columns), dataset.select_columns(list(columns.values()))
    shard_size, own_rows = settings.shard_size, None
    if num_rows is not None:
        starts = range(process_index * shard_size, num_rows, num_processes * shard_size)
        own_rows = sum(min(shard_size, num_rows - start) for start in starts)

    # Its shards, then the index of all
    register_formats()  # threads that meet an unusual format at the same moment would race for its plugin
    num_shards, num_workers = 0, settings.num_workers
    with (
        ThreadPoolExecutor(num_workers) if num_workers else nullcontext() as pool,
        tqdm(total=own_rows, desc="Encoding images", unit="img", disable=process_index > 0) as progress_bar,
    ):
        for number, rows in enumerate(_cut(dataset, shard_size)):
            num_shards = number + 1
            if number % num_processes == process_index:
                shard = ShardRows(rows, number * shard_size, columns, settings, progress_bar)
                state = source.of(number * shard_size, (number + 1) * shard_size)
                make_shard(folder, number, shard, state, pool, vae, id2label)
    _complete(folder, record, num_shards, process_index)
    return _open(folder, settings.skip_corrupt, process_index)


def _claim(folder: Path, record: dict[str, Any], process_index: int) -> dict[str, Any]:
    """Leaves the settings in the folder, or refuses to go on with others; returns those there."""
    path = folder / SETTINGS_NAME
    if not path.is_file():
        if process_index > 0:
            _wait_until(path.is_file, path)
        elif folder.is_dir() and any(folder.glob("shard-*")):
            raise ValueError(f"`folder` must be new or hold {SETTINGS_NAME} beside its shards, got {folder}.")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
    stored = read_json(path, way_out="take another folder, or remove this one")
    refuse_differences(folder, stored, record)
    return stored


def _finished_index(folder: Path) -> dict[str, Any] | None:
    """The index, if it is as it was written and has all its shards; an altered one is put together again."""
    index = read_json(folder / INDEX_NAME, way_out=REPAIR)
    if index is None or index.get("content_hash") != content_hash(index):
        return None
    return index if all(is_whole(folder, shard) for shard in index["shards"]) else None


def _open(folder: Path, skip_corrupt: bool, process_index: int) -> LatentDataset:
    dataset = LatentDataset(folder)
    skipped = dataset.index["skipped"]
    if skipped and not skip_corrupt and process_index == 0:
        logger.warning(
            "%s lacks images that could not be read when it was encoded: %d of them, such as %s",
            folder,
            len(skipped),
            skipped[0],
        )
    return dataset


def _cut(dataset: "datasets.Dataset | datasets.IterableDataset", shard_size: int) -> Iterator[Iterator[dict]]:
    """The rows of one shard after another; rows of shards that are not asked for are passed over."""
    if hasattr(dataset, "__len__"):
        for start in range(0, len(dataset), shard_size):
            yield (dataset[row] for row in range(start, min(start + shard_size, len(dataset))))
        return
    stream = iter(dataset)
    for first in stream:
        rows = itertools.chain([first], itertools.islice(stream, shard_size - 1))
        yield rows
        deque(rows, maxlen=0)


def _complete(folder: Path, record: dict[str, Any], num_shards: int, process_index: int) -> None:
    """Waits for the shards of all processes, and then for the index, which the first one writes."""
    surplus = [path for path in folder.glob("shard-*.json") if int(path.stem.removeprefix("shard-")) >= num_shards]
    if surplus:
        raise ValueError(f"`folder` must have been encoded from the same data: these end before {min(surplus)}.")
    for number in range(num_shards):
        _wait_until(lambda number=number: finished_sidecar(folder, number) is not None, folder / shard_name(number))
    index = _assemble(record, [finished_sidecar(folder, number) for number in range(num_shards)])
    if process_index == 0:
        # What killed processes left; safetensors has temporary files too.
        for path in (*folder.glob(f"*{UNFINISHED}"), *folder.glob(".tmp*")):
            path.unlink(missing_ok=True)
        if read_json(folder / INDEX_NAME) != index:
            write_json(folder / INDEX_NAME, index)
    # Its content, not its presence: it could be the one of before a repair, about to be replaced.
    _wait_until(lambda: read_json(folder / INDEX_NAME) == index, folder / INDEX_NAME)


def _assemble(record: dict[str, Any], sidecars: list[dict[str, Any]]) -> dict[str, Any]:
    shards = [sidecar for sidecar in sidecars if sidecar["num_samples"]]
    if not shards:
        raise ValueError(f"None of the {sum(sidecar['num_rows'] for sidecar in sidecars)} images could be read.")
    dims = {shard["pooled_projection_dim"] for shard in shards}
    if len(dims) > 1:
        raise ValueError(f"Condition vectors must be of one length, the shards have {sorted(dims)}.")
    statistics, counts = ChannelStatistics(), Counter()
    for shard in shards:
        statistics.add(shard["statistics"])
        counts.update(shard["num_samples_per_class"])
    is_standardised = record["vae"] is not None and record["vae"]["is_standardised"]
    latents_mean, latents_std = statistics.of_standardised() if is_standardised else statistics.result()
    id2label = record["id2label"]
    if id2label == {}:  # a stream of bare ids
        highest, num_samples = max(map(int, counts)), sum(counts.values())
        if highest >= num_samples:
            raise ValueError(f"Ids must run from 0 without a gap, {num_samples} images have ids up to {highest}.")
        id2label = {str(id_): str(id_) for id_ in range(highest + 1)}
    index = {
        **record,
        "latent_shape": shards[0]["latent_shape"],
        "pooled_projection_dim": dims.pop(),
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "latents_mean": latents_mean,
        "latents_std": latents_std,
        "id2label": id2label,
        "num_samples_per_class": None if id2label is None else {id_: counts[id_] for id_ in id2label},
        "shards": [{key: shard[key] for key in ("name", "num_samples", "num_bytes", "sha256")} for shard in shards],
        "num_rows": sum(sidecar["num_rows"] for sidecar in sidecars),
        "rows_sha256": hashlib.sha256("".join(sidecar["row_digests"] for sidecar in sidecars).encode()).hexdigest(),
        "skipped": [name for sidecar in sidecars for name in sidecar["skipped"]],
    }
    return index | {"content_hash": content_hash(index)}


def _wait_until(ready: Callable[[], bool], path: Path) -> None:
    """Looks for what another process writes, without a limit: a launcher stops all when one has failed."""
    last_said = time.monotonic()
    while not ready():
        time.sleep(POLL_SECONDS)
        if time.monotonic() - last_said > 60:
            logger.warning("Waiting for another process to write %s; all must see the same folder", path)
            last_said = time.monotonic()
