"""What images are encoded to, and how: the argument of `encode_dataset` that its `settings.json` is made of."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import autoencoders
from ..files import sha256_of_weights
from ..masking import masked
from .feeding import default_num_workers
from .pixels import ground_of


if TYPE_CHECKING:
    from diffusers import ModelMixin

FORMAT_VERSION = 5
# Threads that decode images for an accelerator: it encodes some hundred a second.
MOST_THREADS = 8
# Entries that no argument sets.
_IN_WORDS = {"format_version": "format version", "id2label": "classes", "num_rows": "number of images"}


def vae_fingerprint(vae: "ModelMixin") -> dict[str, Any]:
    """What decides whether encoded latents are a VAE's own, and what they are.

    Args:
        vae (ModelMixin): an image autoencoder of diffusers, in float32.
    Returns:
        dict: its `class_name`, SHA-256 of its configuration as `config_hash` and of its weights as `weights_hash`;
        `latents`, a "posterior" (mean and std) or a "point" (mean), and whether they come standardised,
        `is_standardised`.
    Raises:
        ValueError: if the VAE is not in float32, where the same weights would have another fingerprint.
    """
    if vae.dtype != torch.float32:
        raise ValueError(f"`vae` must be in float32 to encode, got {vae.dtype}: load it with torch.float32.")
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    config_hash = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "class_name": type(vae).__name__,
        "config_hash": config_hash,
        "weights_hash": sha256_of_weights(vae.state_dict()),
        "latents": "posterior" if autoencoders.is_posterior(vae) else "point",
        "is_standardised": autoencoders.is_standardised(vae),
    }


@dataclass(frozen=True)
class EncodingSettings:
    """What images are encoded to, and how. A folder keeps the first six; the others may change while it is filled.

    Args:
        resolution (int): side of the images, a multiple of the VAE's downsampling factor.
        random_flip (bool): store the latents of the mirrored image too. Pixels are mirrored on reading instead.
        num_channels (int): of the images without a VAE (1 or 3); a VAE brings its own.
        background (str): colour of the ground under transparent images, as `prepare_image` takes it.
        pooled_column (str, optional): column of condition vectors, such as a text encoder's pooled output: lists of
            numbers, all of one length.
        shard_size (int): images per file.
        vae_id (str, optional): name kept for people [where the VAE was loaded from].
        image_column, label_column (str): names of the columns.
        batch_size (int): images per forward pass.
        num_workers (int, optional): threads that decode images ahead; None: 0 where the VAE is on the CPU, else up to
            8, as many as there are processors for.
        skip_corrupt (bool): leave damaged images out, with a warning, instead of raising. Files that are missing
            or cannot be read raise all the same.
    Raises:
        ValueError: if a size is less than 1, or the background is no colour.
    """

    resolution: int
    random_flip: bool = False
    num_channels: int = 3
    background: str = "white"
    pooled_column: str | None = None
    shard_size: int = 2048
    vae_id: str | None = field(default=None, compare=False)
    image_column: str = field(default="image", compare=False)
    label_column: str = field(default="label", compare=False)
    batch_size: int = field(default=32, compare=False)
    num_workers: int | None = field(default=None, compare=False)
    skip_corrupt: bool = field(default=False, compare=False)

    def __post_init__(self):
        for name in ("resolution", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        ground_of(self.background)

    def for_vae(self, vae: "ModelMixin | None") -> "EncodingSettings":
        """The same with what a VAE or its absence decides; refuses a VAE that cannot encode such images.

        Raises:
            ValueError: if its class is not supported, the resolution does not suit it, or images are neither grey nor
                RGB.
        """
        num_channels = self.num_channels
        if vae is not None:
            _, factor, num_channels, _, image_size = autoencoders.geometry(vae)
            if image_size not in (None, self.resolution):
                raise ValueError(
                    f"`resolution` must be {image_size}, the only size that this {type(vae).__name__} decodes, got "
                    f"{self.resolution}."
                )
            if self.resolution % factor:
                raise ValueError(
                    f"`resolution` must be a multiple of the VAE's factor {factor}, got {self.resolution}."
                )
        if num_channels not in (1, 3):
            raise ValueError(
                f"`num_channels`, which a VAE brings with it, must be 1 (grey) or 3 (RGB), got {num_channels}."
            )
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = 0 if vae is None else default_num_workers(vae.device, MOST_THREADS)
        # Pixels are mirrored on reading: the same are stored with and without.
        random_flip = self.random_flip and vae is not None
        return replace(self, num_channels=num_channels, random_flip=random_flip, num_workers=num_workers)

    def record(self, vae: "ModelMixin | None", id2label: Mapping[int, str] | None) -> dict[str, Any]:
        """All that the encoded data depend on, as `settings.json` has it.

        Args:
            vae (ModelMixin, optional), id2label (dict, optional): as in `encode_dataset`.
        Returns:
            dict: of JSON values.
        """
        fingerprint = None
        if vae is not None:
            fingerprint = vae_fingerprint(vae) | {"id": masked(self.vae_id or vae.config.get("_name_or_path"))}
        return {
            "format_version": FORMAT_VERSION,
            "vae": fingerprint,
            **{each.name: getattr(self, each.name) for each in fields(self) if each.compare},
            "id2label": None if id2label is None else {str(id_): name for id_, name in id2label.items()},
        }


def refuse_differences(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses encoded data that are not what is asked for.

    Args:
        folder (Path): of the data, for the message.
        stored (mapping): what they were encoded with, as `EncodingSettings.record` has it, or their index.
        wanted (mapping): the entries that have to agree. A VAE is itself under any name.
    Raises:
        ValueError: naming each difference.
    """
    found = []
    for name, value in wanted.items():
        former = stored.get(name)
        if isinstance(former, dict) and isinstance(value, dict):
            names = [key for key in former | value if former.get(key) != value.get(key)]
            if name == "vae" and not {*names} - {"id"}:
                continue
            former, value = ({key: entry[key] for key in names if key in entry} for entry in (former, value))
        if former != value:
            found.append(f"{_IN_WORDS.get(name, f'`{name}`')} {shortened(former)} (now {shortened(value)})")
    if found:
        raise ValueError(
            f"{folder} was encoded with {', '.join(found)}. Give the same again, or another `folder` to encode to."
        )


def shortened(value: Any) -> str:
    """A JSON value, cut where it gets too long for a message."""
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:300] + "…"
