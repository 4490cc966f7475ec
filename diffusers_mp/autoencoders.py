"""What an image autoencoder of diffusers returns and needs: a row for each class, by its name.

Encoding, the cache, the trainer, the pipeline, evaluation and the cards ask here. Latents are what the transformer
works on before they are standardised by the statistics of the data: packed, without a dimension of frames, and in the
autoencoder's own units where it brings statistics for each position of a pack or of the image (FLUX.2, RAE).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F


if TYPE_CHECKING:
    from diffusers import ModelMixin

Config = Mapping[str, Any]


def _entry(name: str) -> Callable[[Config], int]:
    return lambda config: config[name]


def _halvings(name: str) -> Callable[[Config], int]:
    """One halving between two levels of an encoder."""
    return lambda config: 2 ** (len(config[name]) - 1)


@dataclass(frozen=True)
class ImageAutoencoder:
    """A row: how one class encodes and decodes, as its code in diffusers has it.

    Attributes:
        output (str): where `encode` returns it: a posterior as "latent_dist", a point as "latent" or "latents".
        factor (callable): pixels for each position of the encoder's output, of the config.
        latent_channels (callable): of the encoder's output.
        in_channels, out_channels (callable): of the images.
        frames (bool): whether images and latents have a dimension of frames, of which there is one.
        is_packed (bool): whether latents are packed, `patch_size` x `patch_size` positions to one, and then
            standardised by the running statistics of `bn`: the pipelines of FLUX.2 do both, the class neither.
        standardises (bool): whether `encode` and `decode` themselves apply `_latents_mean`, `_latents_std` and
            `scaling_factor`.
        value_range (tuple): of the images that it takes and gives.
        image_size (callable, optional): side of the only images that it decodes.
        draws (bool): whether decoding draws noise, and takes a generator.
        decode_options (callable): further arguments of `decode`, of the config.
    """

    output: str = "latent_dist"
    factor: Callable[[Config], int] = _halvings("block_out_channels")
    latent_channels: Callable[[Config], int] = _entry("latent_channels")
    in_channels: Callable[[Config], int] = _entry("in_channels")
    out_channels: Callable[[Config], int] = _entry("out_channels")
    frames: bool = False
    is_packed: bool = False
    standardises: bool = False
    value_range: tuple[int, int] = (-1, 1)
    image_size: Callable[[Config], int] | None = None
    draws: bool = False
    decode_options: Callable[[Config], dict[str, Any]] = lambda config: {}


IMAGE_AUTOENCODERS = {
    "AsymmetricAutoencoderKL": ImageAutoencoder(factor=_halvings("down_block_out_channels")),
    "AutoencoderDC": ImageAutoencoder(
        output="latent", factor=_halvings("encoder_block_out_channels"), out_channels=_entry("in_channels")
    ),
    "AutoencoderKL": ImageAutoencoder(),
    "AutoencoderKLFlux2": ImageAutoencoder(is_packed=True),
    "AutoencoderKLHunyuanImage": ImageAutoencoder(factor=_entry("spatial_compression_ratio")),
    "AutoencoderKLKVAE": ImageAutoencoder(
        factor=_halvings("ch_mult"), latent_channels=_entry("z_channels"), out_channels=_entry("in_channels")
    ),
    "AutoencoderKLQwenImage": ImageAutoencoder(
        factor=_halvings("dim_mult"),
        latent_channels=_entry("z_dim"),
        in_channels=_entry("input_channels"),
        out_channels=_entry("input_channels"),
        frames=True,
    ),
    "AutoencoderKLQwenImage21": ImageAutoencoder(
        factor=lambda config: 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1),
        latent_channels=_entry("z_dim"),
        frames=True,
    ),
    "AutoencoderRAE": ImageAutoencoder(
        output="latent",
        factor=_entry("patch_size"),
        latent_channels=_entry("encoder_hidden_size"),
        in_channels=_entry("num_channels"),
        out_channels=_entry("num_channels"),
        standardises=True,
        value_range=(0, 1),
        image_size=lambda config: (
            config["patch_size"] * (config["encoder_input_size"] // config["encoder_patch_size"])
        ),
    ),
    "AutoencoderTiny": ImageAutoencoder(output="latents", factor=_halvings("encoder_block_out_channels")),
    "ConsistencyDecoderVAE": ImageAutoencoder(
        factor=_halvings("encoder_block_out_channels"),
        in_channels=_entry("encoder_in_channels"),
        out_channels=lambda config: 3,
        draws=True,
    ),
    "VQModel": ImageAutoencoder(
        output="latents",
        latent_channels=lambda config: config["vq_embed_dim"] or config["latent_channels"],
        # As the pipelines of latent diffusion decode, and those of Kandinsky, whose decoder is told of its input.
        decode_options=lambda config: {"force_not_quantize": config["norm_type"] == "spatial"},
    ),
}

_AUDIO = """
    AutoencoderKLKVAEAudio AutoencoderKLLTX2Audio AutoencoderKLMiniMaxH3Audio AutoencoderOobleck AutoencoderSAME
    Cosmos3AVAEAudioTokenizer LongCatAudioDiTVae MMAudioVAE
""".split()
_VIDEO = """
    AutoencoderKLAllegro AutoencoderKLCogVideoX AutoencoderKLCosmos AutoencoderKLHunyuanVideo
    AutoencoderKLHunyuanImageRefiner AutoencoderKLHunyuanVideo15 AutoencoderKLKVAEVideo AutoencoderKLLTXVideo
    AutoencoderKLLTX2Video AutoencoderKLMagvit AutoencoderKLMiniMaxH3 AutoencoderKLMochi AutoencoderKLWan
    AutoencoderVidTok Kandinsky6SRVAE
""".split()
REFUSED = {
    **dict.fromkeys(_AUDIO, "it encodes audio"),
    **dict.fromkeys(_VIDEO, "it encodes videos"),
    "AutoencoderKLTemporalDecoder": "it decodes videos, several frames together",
    "RFD4ProteinaAutoencoder": "it encodes proteins",
}


class Geometry(NamedTuple):
    """What the transformer and the images of an autoencoder have to fit.

    Attributes:
        latent_channels (int): of the latents that the transformer works on.
        factor (int): pixels for each of their positions, along each side.
        in_channels, out_channels (int): of the images.
        image_size (int or None): side of the only images that it decodes.
    """

    latent_channels: int
    factor: int
    in_channels: int
    out_channels: int
    image_size: int | None


def row_of(vae: "ModelMixin | Config") -> ImageAutoencoder:
    """The row of an autoencoder's class, or of one that it is derived from.

    Args:
        vae (ModelMixin or mapping): the autoencoder, or what its `config.json` holds.
    Raises:
        ValueError: if the class is none of them, with the reason.
    """
    of_config = isinstance(vae, Mapping)
    names = [vae.get("_class_name")] if of_config else [base.__name__ for base in type(vae).__mro__]
    for name in names:
        if name in IMAGE_AUTOENCODERS:
            return IMAGE_AUTOENCODERS[name]
    reason = next((f": {REFUSED[name]}" for name in names if name in REFUSED), "")
    raise ValueError(
        f"`vae` must be an image autoencoder of diffusers, one of {', '.join(IMAGE_AUTOENCODERS)}, got "
        f"{names[0]}{reason}."
    )


def geometry(vae: "ModelMixin | Config") -> Geometry:
    """Channels and sizes, of the config alone.

    Args:
        vae (ModelMixin or mapping): the autoencoder, or what its `config.json` holds.
    Raises:
        ValueError: if the class is not supported.
    """
    row, config = row_of(vae), vae if isinstance(vae, Mapping) else vae.config
    patch_size = config["patch_size"][0] if row.is_packed else 1
    in_channels, out_channels = row.in_channels(config), row.out_channels(config)
    if row.frames:  # a fourth channel is opacity: added as opaque, left out
        in_channels, out_channels = min(in_channels, 3), min(out_channels, 3)
    return Geometry(
        row.latent_channels(config) * patch_size**2,
        row.factor(config) * patch_size,
        in_channels,
        out_channels,
        None if row.image_size is None else row.image_size(config),
    )


def check_image_size(vae: "ModelMixin", height: int, width: int) -> None:
    """Refuse images of another size than the only one that an autoencoder decodes.

    Args:
        vae (ModelMixin): of a supported class.
        height, width (int): of the images, in pixels.
    Raises:
        ValueError: naming that size.
    """
    only = geometry(vae).image_size
    if only is not None and (height, width) != (only, only):
        raise ValueError(
            f"`height` and `width` must be {only}, the only size that this {type(vae).__name__} decodes, got "
            f"{height}x{width}."
        )


def check_config(config: Config) -> None:
    """Refuse an autoencoder that would not work, before its weights are read.

    Args:
        config (mapping): what its `config.json` holds.
    Raises:
        ValueError: if the class is not supported, or is one that the installed versions cannot make.
    """
    row_of(config)
    if config["_class_name"] != "AutoencoderRAE":
        return
    if not config.get("reshape_to_2d", True):
        raise ValueError("`vae` must have `reshape_to_2d` in its config: the transformer takes latents as images.")
    import diffusers

    try:
        with torch.device("meta"):
            diffusers.AutoencoderRAE.from_config(config)
    except AttributeError as error:
        raise ValueError(
            f"`vae` must be an AutoencoderRAE that diffusers {version('diffusers')} with transformers "
            f"{version('transformers')} can make, with encoder 'mae' or 'dinov2', got "
            f"{config.get('encoder_type')!r}: {error}."
        ) from error


def has_statistics(config: Config) -> bool:
    """Whether latents of this class come standardised, where the autoencoder was given statistics.

    Args:
        config (mapping): what its `config.json` holds.
    """
    row = row_of(config)
    return row.is_packed or row.standardises


def is_posterior(vae: "ModelMixin") -> bool:
    """Whether encoding returns a normal distribution to draw from, and not a point."""
    return row_of(vae).output == "latent_dist"


def is_standardised(vae: "ModelMixin") -> bool:
    """Whether latents come standardised by statistics that the autoencoder brings; those of the data then do nothing.

    It brings none where mean and variance are 0 and 1, as before its training.
    """
    row = row_of(vae)
    if row.is_packed:
        mean, spread = vae.bn.running_mean, vae.bn.running_var
    elif row.standardises:
        mean, spread = vae._latents_mean, vae._latents_std
    else:
        return False
    return bool((mean != 0).any() or (spread != 1).any())


def encode(vae: "ModelMixin", images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images to latents.

    Args:
        vae (ModelMixin): of a supported class, in evaluation mode.
        images (torch.Tensor): in [-1, 1], shape (B, in_channels, H, W).
    Returns:
        dict: `mean`, and of a posterior `std`, each of shape (B, latent_channels, H / factor, W / factor).
    """
    row = row_of(vae)
    if row.value_range == (0, 1):
        images = (images + 1) / 2
    if row.frames:
        missing = row.in_channels(vae.config) - images.shape[1]
        images = torch.cat([images, images.new_ones(len(images), missing, *images.shape[2:])], 1)[:, :, None]
    encoded = getattr(vae.encode(images), row.output)
    latents = {"mean": encoded.mean, "std": encoded.std} if is_posterior(vae) else {"mean": encoded}
    if row.frames:
        latents = {name: values[:, :, 0] for name, values in latents.items()}
    if row.is_packed:
        latents = {name: F.pixel_unshuffle(values, vae.config.patch_size[0]) for name, values in latents.items()}
        mean, std = _batch_norm(vae, images)
        latents = {"mean": (latents["mean"] - mean) / std, "std": latents["std"] / std}
    return latents


def decode(
    vae: "ModelMixin",
    latents: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Latents to images.

    Args:
        vae (ModelMixin): of a supported class.
        latents (torch.Tensor): as `encode` gives them, shape (B, latent_channels, h, w).
        generator (torch.Generator or list of them, optional): for a decoder that draws noise.
    Returns:
        torch.Tensor: in about [-1, 1], shape (B, out_channels, factor · h, factor · w), in the dtype of `vae`.
    """
    row = row_of(vae)
    if row.is_packed:
        mean, std = _batch_norm(vae, latents)
        latents = F.pixel_shuffle(latents * std + mean, vae.config.patch_size[0])
    latents = latents.to(vae.dtype)
    options = row.decode_options(vae.config) | ({"generator": generator} if row.draws else {})
    images = vae.decode(latents[:, :, None] if row.frames else latents, return_dict=False, **options)[0]
    if row.frames:
        images = images[:, :3, 0]
    return 2 * images - 1 if row.value_range == (0, 1) else images


def _batch_norm(vae: "ModelMixin", like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that FLUX.2's pipelines take packed latents to have, shape (1, C, 1, 1)."""
    mean, std = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return tuple(values.to(like.device, like.dtype).view(1, -1, 1, 1) for values in (mean, std))


def to_units_of_autoencoder(vae: "ModelMixin", latents: torch.Tensor) -> torch.Tensor:
    """Latents of a pipeline without statistics of its data: standardised as diffusers' pipelines of that class do.

        z = latents / scaling_factor + shift_factor,     or latents · latents_std / scaling_factor + latents_mean

    Args:
        vae (ModelMixin): of a supported class.
        latents (torch.Tensor): shape (B, latent_channels, h, w).
    Returns:
        torch.Tensor: as `decode` takes them.
    """
    if row_of(vae).standardises:
        return latents
    statistics = vae.config.get("latents_mean"), vae.config.get("latents_std")
    scaling_factor = vae.config.get("scaling_factor") or 1
    if None in statistics:
        return latents / scaling_factor + (vae.config.get("shift_factor") or 0)
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in statistics)
    return latents * std / scaling_factor + mean


def scaling_for_dit_pipeline(vae: "ModelMixin", in_channels: int) -> float:
    """The factor that makes latents for diffusers' `DiTPipeline`, which decodes `latents / scaling_factor`.

    Args:
        vae (ModelMixin): of that pipeline.
        in_channels (int): of its transformer.
    Raises:
        ValueError: if that is not how this class has to be decoded, or it has other channels.
    """
    row, scaling_factor = row_of(vae), vae.config.get("scaling_factor")
    is_plain = not (row.frames or row.is_packed or row.standardises or row.draws)
    if not is_plain or scaling_factor is None:
        raise ValueError(
            "`vae` must be one that diffusers' DiTPipeline decodes, by `vae.decode(latents / scaling_factor)`, got "
            f"{type(vae).__name__}, which needs more: train with an MPDiTPipeline instead (examples/train_mpdit.py)."
        )
    if geometry(vae).latent_channels != in_channels:
        raise ValueError(
            f"`vae` must have as many latent channels as the transformer has input channels ({in_channels}), got "
            f"{geometry(vae).latent_channels}."
        )
    return scaling_factor
