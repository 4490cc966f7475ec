"""What images are encoded to, and how: the argument of `encode_dataset` that its `settings.json` is made of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ..masking import masked
from .latents import FORMAT_VERSION, vae_fingerprint


if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class EncodingSettings:
    """What images are encoded to, and how. A folder keeps the first five; the others may change while it is filled.

    Args:
        resolution (int): side of the images, a multiple of the VAE's downsampling factor.
        random_flip (bool): store the posterior of the mirrored image too. Pixels are mirrored on reading instead.
        num_channels (int): of the images without a VAE (1 or 3); a VAE brings its own.
        pooled_column (str, optional): column of condition vectors, such as a text encoder's pooled output: lists of
            numbers, all of one length.
        shard_size (int): images per file.
        vae_id (str, optional): name kept for people [where the VAE was loaded from].
        image_column, label_column (str): names of the columns.
        batch_size (int): images per forward pass.
        num_workers (int): threads that decode images ahead.
        skip_corrupt (bool): leave damaged images out, with a warning, instead of raising. Files that are missing
            or cannot be read raise all the same.
    Raises:
        ValueError: if a size is less than 1.
    """

    resolution: int
    random_flip: bool = False
    num_channels: int = 3
    pooled_column: str | None = None
    shard_size: int = 2048
    vae_id: str | None = field(default=None, compare=False)
    image_column: str = field(default="image", compare=False)
    label_column: str = field(default="label", compare=False)
    batch_size: int = field(default=32, compare=False)
    num_workers: int = field(default=0, compare=False)
    skip_corrupt: bool = field(default=False, compare=False)

    def __post_init__(self):
        for name in ("resolution", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def for_vae(self, vae: "AutoencoderKL | None") -> "EncodingSettings":
        """The same with the number of channels that a VAE takes; refuses a VAE that cannot encode such images.

        Raises:
            ValueError: if the resolution does not suit the VAE, or images are neither grey nor RGB.
        """
        num_channels = self.num_channels
        if vae is not None:
            num_channels, factor = vae.config.in_channels, 2 ** (len(vae.config.block_out_channels) - 1)
            if self.resolution % factor:
                raise ValueError(
                    f"`resolution` must be a multiple of the VAE's factor {factor}, got {self.resolution}."
                )
        if num_channels not in (1, 3):
            raise ValueError(
                f"`num_channels`, which a VAE brings with it, must be 1 (grey) or 3 (RGB), got {num_channels}."
            )
        return replace(self, num_channels=num_channels)

    def record(
        self, vae: "AutoencoderKL | None", id2label: Mapping[int, str] | None, num_rows: int | None
    ) -> dict[str, Any]:
        """All that the encoded data depend on, as `settings.json` has it.

        Args:
            vae (AutoencoderKL, optional), id2label (dict, optional): as in `encode_dataset`.
            num_rows (int, optional): of the source; a stream's are counted by reading it.
        Returns:
            dict: of JSON values.
        """
        fingerprint = None
        if vae is not None:
            fingerprint = {"id": masked(self.vae_id or vae.config.get("_name_or_path")), **vae_fingerprint(vae)}
        return {
            "format_version": FORMAT_VERSION,
            "vae": fingerprint,
            **{each.name: getattr(self, each.name) for each in fields(self) if each.compare},
            "id2label": None if id2label is None else {str(id_): name for id_, name in id2label.items()},
            "num_rows": num_rows,
        }


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In what two records differ, in words: a stream has any number of rows, and a VAE is itself under any name."""
    wanted = dict(wanted)
    if stored.get("num_rows") is None or wanted["num_rows"] is None:
        wanted["num_rows"] = stored.get("num_rows")
    if stored.get("vae") and wanted["vae"]:
        wanted["vae"] = wanted["vae"] | {"id": stored["vae"]["id"]}
    return [
        f"{name} {shortened(stored.get(name))} (now {shortened(value)})"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]


def shortened(value: Any) -> str:
    """A JSON value, cut where it gets too long for a message."""
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:300] + "…"
