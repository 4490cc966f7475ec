"""Averages of a run's weights as files, from which those of other widths can be rebuilt (reconstruction.py).

    ema_snapshots/model_index.json, scheduler/, vae/      what a pipeline needs besides a transformer, once
    ema_snapshots/step-0001000_std-0.05/                  a transformer folder: config.json, weights, snapshot.json
    ema_snapshots/step-0001000_std-0.1/                   …

Snapshots hold averages as they are, with rows shorter than 1, since only those combine linearly: whoever loads one as
a model calls `normalize_weights_` on it.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..files import (
    UNFINISHED,
    component_names,
    discard_folder,
    read_json,
    sha256_of_file,
    space_for,
    whole_folder,
    write_json,
)
from ..sharding import is_sharded, unwrapped, whole
from ..transformer_mpdit import MPDiTTransformer2DModel
from .ema import PowerFunctionEMA


SNAPSHOT_NAME = re.compile(r"step-(\d+)_std-(\d+(?:\.\d+)?(?:e-\d+)?)")
SNAPSHOT_FILE = "snapshot.json"
PIPELINE_FILE = "model_index.json"
# Entries of a config that say where a model came from, not what it is.
_OF_THE_FILE = ("_diffusers_version", "_name_or_path")


@dataclass(frozen=True, order=True)
class Snapshot:
    """A stored average.

    Attributes:
        step (int): optimiser updates that it has seen.
        std (float): its width.
        path (Path): its folder, which `from_pretrained` of the model loads.
    """

    step: int
    std: float
    path: Path


def save_snapshots(ema: PowerFunctionEMA, directory: str | Path, pipeline: DiffusionPipeline) -> list[Path]:
    """Write every average of a tracker as a snapshot; a folder with a snapshot's name is always complete.

    To be called on every process: sharded averages are gathered, one parameter at a time, and the first process
    writes. In its main memory it needs room for one whole model.

    Save snapshots before the checkpoint of the same step, and call `discard_snapshots_after` when a run goes on from a
    checkpoint: then none is lost or left over, whenever the run was killed.

    Args:
        ema (PowerFunctionEMA): tracker of an `MPDiTTransformer2DModel`, updated at least once. Averages of another
            model are in its `state_dict`; `reconstruct_ema` rebuilds this one alone.
        directory (str or Path): folder of the run's snapshots, made if missing.
        pipeline (DiffusionPipeline): its parts except the transformer are stored once, beside the snapshots. Its
            transformer is whole and tells the config: `fully_shard` changes the name of a model's class.
    Returns:
        list of Path: one folder per width. A snapshot of the same step and width is replaced.
    Raises:
        TypeError: if the pipeline's transformer is of another class.
        ValueError: if the averages have seen nothing yet, the pipeline's transformer is sharded, or the folder is that
            of another pipeline.
    """
    transformer = unwrapped(getattr(pipeline, "transformer", None))
    if not isinstance(transformer, MPDiTTransformer2DModel):
        raise TypeError(
            "`pipeline` must have an MPDiTTransformer2DModel, which is what `reconstruct_ema` rebuilds, got a "
            f"{type(transformer).__name__}."
        )
    if ema.step < 1:
        raise ValueError("`ema` must have been updated before its averages are stored, its step is 0")
    if any(is_sharded(parameter) for parameter in transformer.parameters()):
        raise ValueError("`pipeline` must have a whole transformer, whose class has its own name; this one is sharded")
    directory = Path(directory)
    writes = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if writes:
        with space_for(directory):
            directory.mkdir(parents=True, exist_ok=True)
            _save_pipeline_parts(pipeline, directory)
    folders = []
    for std, averages in zip(ema.stds, ema.state_dict()["averages"], strict=True):
        folders.append(directory / f"step-{ema.step:07d}_std-{std!r}")
        tensors = {}
        for name, average in averages.items():
            average = whole(average)
            if writes:
                tensors[name] = average.cpu().contiguous()
        if writes:
            _save_snapshot(folders[-1], ema.step, std, tensors, transformer)
    return folders


def _save_snapshot(folder: Path, step: int, std: float, tensors: dict, transformer: ModelMixin) -> None:
    with whole_folder(folder) as unfinished:
        transformer.save_config(unfinished)
        weights = unfinished / SAFETENSORS_WEIGHTS_NAME
        save_file(tensors, weights, metadata={"format": "pt"})
        write_json(unfinished / SNAPSHOT_FILE, {"step": step, "std": std, "sha256": sha256_of_file(weights)})


def find_snapshots(directory: str | Path) -> list[Snapshot]:
    """Finished snapshots of a run.

    Args:
        directory (str or Path): folder that `save_snapshots` wrote to.
    Returns:
        list of Snapshot: in the order of their steps, then widths.
    """
    names = [(path, SNAPSHOT_NAME.fullmatch(path.name)) for path in Path(directory).glob("step-*")]
    return sorted(Snapshot(int(name[1]), float(name[2]), path) for path, name in names if name)


def discard_snapshots_after(directory: str | Path, step: int) -> None:
    """Remove snapshots past a step, and what a kill left half written: the run goes on from there.

    Args:
        directory (str or Path): folder of the run's snapshots; it need not exist. If none stays, what was saved beside
            them goes too, and the folder if nothing else is in it.
        step (int): the last step that stays.
    Raises:
        ValueError: if the index beside the snapshots names a part by a path; then nothing is removed.
    """
    directory = Path(directory)
    index = directory / PIPELINE_FILE
    parts = component_names(directory) if index.is_file() else []  # refused before anything is deleted
    for snapshot in find_snapshots(directory):
        if snapshot.step > step:
            discard_folder(snapshot.path)
    for path in directory.glob(f"*{UNFINISHED}"):
        shutil.rmtree(path)
    # Nothing that `save_snapshots` has not written: it may be the folder of a run. A pipeline has a transformer.
    if find_snapshots(directory) or (directory / "transformer").exists():
        return
    for name in parts:
        shutil.rmtree(directory / name, ignore_errors=True)
    index.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other things are in it, or it is not there
        directory.rmdir()


def check_snapshots(snapshots: Sequence[Snapshot]) -> dict:
    """The config that all snapshots share, once each is found to be whole and what its name says.

    Args:
        snapshots (sequence of Snapshot): from `find_snapshots`.
    Returns:
        dict: config of the model.
    Raises:
        FileNotFoundError: if a snapshot lacks a file.
        ValueError: if one is damaged, or of another model than the first.
    """
    configs = []
    for snapshot in snapshots:
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, SNAPSHOT_FILE):
            if not (snapshot.path / name).is_file():
                raise FileNotFoundError(f"{snapshot.path} must hold {name}; to rebuild without it, remove the folder")
        try:
            record = json.loads((snapshot.path / SNAPSHOT_FILE).read_text(encoding="utf-8"))
            facts = record["step"], record["std"], record["sha256"]
            configs.append(_comparable(snapshot.path / CONFIG_NAME))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{snapshot.path} is damaged: its JSON files cannot be read ({error!r})") from error
        if facts[:2] != (snapshot.step, snapshot.std):
            raise ValueError(
                f"{snapshot.path} must be the average of its name, got one of std {facts[1]} at step {facts[0]}"
            )
        if sha256_of_file(snapshot.path / SAFETENSORS_WEIGHTS_NAME) != facts[2]:
            raise ValueError(
                f"{snapshot.path / SAFETENSORS_WEIGHTS_NAME} is damaged: it is not the file that {SNAPSHOT_FILE} was "
                "written for; to rebuild without it, remove the folder"
            )
        different = sorted(
            name for name in configs[0].keys() | configs[-1].keys() if configs[0].get(name) != configs[-1].get(name)
        )
        if different:
            raise ValueError(
                f"snapshots must be of one model: {snapshot.path} differs from {snapshots[0].path.name} in {different}"
            )
    return configs[0]


def pipeline_parts(directory: Path) -> list[Path]:
    """The files and folders of a pipeline except the transformer.

    Args:
        directory (Path): folder that `save_snapshots` wrote to.
    Returns:
        list of Path: the index and a folder for each part that it names.
    Raises:
        FileNotFoundError: if one is missing.
    """
    index = directory / PIPELINE_FILE
    if not index.is_file():
        raise FileNotFoundError(f"{directory} must hold {PIPELINE_FILE} and the parts it names, beside the snapshots")
    parts = [directory / name for name in component_names(directory) if name != "transformer"]
    for part in parts:
        if not part.is_dir():
            raise FileNotFoundError(f"{directory} must hold the folder {part.name}, which {PIPELINE_FILE} names")
    return [index, *parts]


def _save_pipeline_parts(pipeline: DiffusionPipeline, directory: Path) -> None:
    index = directory / PIPELINE_FILE
    if index.is_file():
        stored, given = _comparable(index), _comparable(pipeline.to_json_string())
        different = sorted(name for name in stored.keys() | given.keys() if stored.get(name) != given.get(name))
        if different:
            raise ValueError(
                f"`directory` must be new or hold snapshots of this pipeline; {index} differs in {different}"
            )
        return
    unfinished = directory / f"pipeline{UNFINISHED}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        pipeline.save_config(unfinished)
        for name, part in pipeline.components.items():
            if name != "transformer" and part is not None:
                part.save_pretrained(unfinished / name)
                shutil.rmtree(directory / name, ignore_errors=True)
                (unfinished / name).rename(directory / name)
        # The index last: once it is there, so is what it names.
        (unfinished / PIPELINE_FILE).rename(index)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _comparable(config: Path | str) -> dict:
    """Entries of a config that must agree."""
    content = read_json(config, {}) if isinstance(config, Path) else json.loads(config)
    return {name: value for name, value in content.items() if name not in _OF_THE_FILE}
