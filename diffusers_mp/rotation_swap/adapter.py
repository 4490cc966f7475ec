"""Rotation adapters: what a swap and its fine-tuning added to a stock model, in two small files.

    adapter_config.json           base model, its class, options of the swap, versions
    adapter_model.safetensors     rotation heads, constant shifts and, if asked for, scale and gate rows

The file names are those of PEFT's adapters; the content is this package's own.
"""

import json
import os
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .. import __version__
from ..files import read_json
from ..masking import mask
from ..offloading import check_loaded
from ..publishing.hub import is_repo_id
from .checks import check_model, check_plain, check_sites, check_swapped
from .linear import RotationLinear, make_rotation_linears, rotation_linears, rotation_tensors
from .model_class import install
from .sites import find_sites
from .swap import SwapReport, num_parameters


logger = logging.get_logger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_TYPE = "rotation_modulation"
FORMAT_VERSION = 1
# Channel j turns with channel j + D/2, as in `functional.rotate`.
PAIRING = "halves"


def save_rotation_adapter(
    model: ModelMixin,
    directory: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    base_model_revision: str | None = None,
    base_model_subfolder: str | None = "transformer",
    modulation_rows: bool = False,
) -> None:
    """Save what a swap added to a model, without the model: megabytes instead of gigabytes.

    Nothing else of the model is saved: fine-tune the rotations alone (`RotationLinear.rotation` and `mean_shift`), or
    also the scale and gate rows, and save those with `modulation_rows`. A model trained as a whole is saved by its
    own `save_pretrained`.

    Args:
        model (ModelMixin): a swapped model.
        directory (str or Path): made if missing.
        base_model_name_or_path (str, optional): where the stock model came from; by default where the model says.
        base_model_revision (str, optional): commit, tag or branch of it.
        base_model_subfolder (str, optional): the transformer's folder in it.
        modulation_rows (bool): save the linear maps of scales and gates (and kept shifts) as well.
    Raises:
        ValueError: if the model is not swapped, or maps to be saved carry a LoRA, are quantised or offloaded.
    """
    check_swapped(model)
    linears = rotation_linears(model)
    check_loaded(model, rotation_tensors(linears))
    for name, linear in linears.items():
        _check_saveable(name, linear, modulation_rows)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, linear in linears.items()
        for key, tensor in linear.state_dict().items()
        if modulation_rows or not key.startswith("linear.")
    }
    base = base_model_name_or_path or model.config.get("_name_or_path")
    if base and Path(base).exists():
        base = Path(base).absolute()  # a relative path would pass for an id of the Hub elsewhere
    config = {
        "adapter_type": ADAPTER_TYPE,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": mask(str(base)) if base else None,
        "base_model_revision": base_model_revision,
        "base_model_subfolder": base_model_subfolder,
        "base_model_class": type(model).__mro__[1].__name__,
        "pairing": PAIRING,
        "modulation_rows": modulation_rows,
        **model.config.rotation_modulation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "diffusers_version": diffusers.__version__,
        "diffusers_mp_version": __version__,
    }
    # Both are whole before an adapter that is there goes.
    weights, options = (directory / f"{name}.unfinished" for name in (WEIGHTS_FILE, CONFIG_FILE))
    save_file(tensors, weights, metadata={"format": "pt"})
    options.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # Where there is a config, there is an adapter, and its weights are those that it was written for.
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    os.replace(weights, directory / WEIGHTS_FILE)
    os.replace(options, directory / CONFIG_FILE)


def _check_saveable(name: str, linear: RotationLinear, modulation_rows: bool) -> None:
    rotation = linear.rotation if type(linear.rotation) is nn.Sequential else [linear.rotation]
    maps = [("rotation", each) for each in rotation]
    if modulation_rows and linear.linear is not None:
        maps.append(("linear", linear.linear))
    for part, each in maps:
        remedy = "dequantise it, or merge and unload the LoRA before"
        check_plain(f"{name}.{part}", each, "to be saved as an adapter", remedy)


def load_rotation_adapter(
    model: ModelMixin,
    pretrained_model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> SwapReport:
    """Swap a stock model as an adapter was swapped, and give it the adapter's weights, in place.

    The adapter has to fit exactly; one that does not leaves the model as it was. Of a pipeline: `pipe.transformer =
    pipe.transformer` afterwards, so that it is saved under its new class.

    Args:
        model (ModelMixin): the stock base model, with weights.
        pretrained_model_name_or_path (str or Path): a folder, or a repository on the Hub.
        revision, subfolder, token, cache_dir, local_files_only: as in `from_pretrained`.
    Returns:
        SwapReport: what was replaced.
    Raises:
        FileNotFoundError: if a file of the adapter is missing.
        ValueError: if it is an adapter of something else, or a key is missing, left over or of another shape.
    """
    folder = Path(pretrained_model_name_or_path)
    if not folder.is_dir():
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in (CONFIG_FILE, WEIGHTS_FILE)]
        folder = Path(
            snapshot_download(
                str(pretrained_model_name_or_path),
                revision=revision,
                allow_patterns=patterns,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    if subfolder:
        folder = folder / subfolder
    config = _read_config(folder)
    check_model(model)
    if config["base_model_class"] != type(model).__name__:
        raise ValueError(
            f"`model` must be a {config['base_model_class']}, of which {folder} is an adapter, got a "
            f"{type(model).__name__}."
        )
    base, given = config["base_model_name_or_path"], str(model.config.get("_name_or_path"))
    # Of a transformer that came with its pipeline, only the folder is known that the Hub's client keeps it in.
    if is_repo_id(base) and is_repo_id(given) and base != given:
        logger.warning("The adapter in %s was made for %s, the model came from %s", folder, base, given)
    options = {name: config[name] for name in ("sublayers", "keep_shift", "mean_shift", "rank")}
    sites = find_sites(model, options["sublayers"])
    check_sites(model, sites, options["keep_shift"])
    before = num_parameters(model)
    linears = make_rotation_linears(sites, options)
    _load_strictly(linears, folder / WEIGHTS_FILE, config["modulation_rows"])
    install(model, linears, options)
    return SwapReport({site.name: site.kinds for site in sites}, before, num_parameters(model))


def _read_config(folder: Path) -> dict:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}, {name} is missing.")
    config = read_json(folder / CONFIG_FILE, {}, way_out="take an intact copy of the adapter")
    expected = {"adapter_type": ADAPTER_TYPE, "format_version": FORMAT_VERSION, "pairing": PAIRING}
    for name, value in expected.items():
        if config.get(name) != value:
            raise ValueError(f"{folder / CONFIG_FILE} must have {name} {value!r}, it has {config.get(name)!r}.")
    names = ("base_model_name_or_path", "base_model_class", "sublayers", "keep_shift", "mean_shift", "rank")
    missing = [name for name in (*names, "modulation_rows") if name not in config]
    if missing:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: it lacks {missing}.")
    return config


@torch.no_grad()
def _load_strictly(linears: dict, weights: Path, modulation_rows: bool) -> None:
    targets = {
        f"{name}.{key}": tensor
        for name, linear in linears.items()
        for key, tensor in linear.state_dict().items()
        if modulation_rows or not key.startswith("linear.")
    }
    try:
        opened = safe_open(weights, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}. Take an intact copy of the adapter.") from error
    with opened as file:
        names = set(file.keys())
        missing, unexpected = sorted(targets.keys() - names), sorted(names - targets.keys())
        if missing or unexpected:
            raise ValueError(
                f"{weights} must hold exactly the rotations of this model: missing {missing[:5]} ({len(missing)}), "
                f"unexpected {unexpected[:5]} ({len(unexpected)})."
            )
        for name, target in targets.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(target.shape):
                raise ValueError(f"{weights}: {name} must have shape {tuple(target.shape)}, it has {shape}.")
        tensors = {name: file.get_tensor(name) for name in targets}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{weights} must hold finite numbers, {broken[0]} has NaN or infinity.")
    for name, target in targets.items():
        target.copy_(tensors[name])
