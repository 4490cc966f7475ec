"""The model of a run: of a preset and flags, of another model's config, or of pretrained weights; its objective."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin

from ..class_embeddings import resize_class_embeddings_
from ..data.latents import LatentDataset
from ..data.settings import vae_fingerprint
from ..files import sha256_of_weights
from ..pipeline_mpdit import MPDiTPipeline
from ..predictions import FLOW_PREDICTIONS
from ..presets import get_preset
from ..rows import normalize_weights_
from ..sources import check_reachable, naming
from ..transformer_mpdit import MPDiTTransformer2DModel
from .arguments import DEFAULT_VAE, MODEL_FLAGS
from .flow_matching import FlowMatchObjective
from .objective_arguments import OBJECTIVES
from .objectives import DDPMObjective, Objective


# Of a flow's scheduler.
SHIFT_OPTIONS = ("shift", "use_dynamic_shifting", "time_shift_type")
SHIFT_OPTIONS += ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


@dataclass
class Pretrained:
    """What a run starts from that does not start from random weights; of a transformer alone the first two only."""

    transformer: MPDiTTransformer2DModel
    # Of the weights as they lie there: what is made of them depends, in the last bit, on processor and threads.
    weights_sha256: str
    id2label: dict[int, str] | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None


def vae_of_pretrained(args: argparse.Namespace) -> str:
    """What `--vae` is by default: the autoencoder of the checkpoint, whose latents the transformer knows."""
    source = args.pretrained_model_name_or_path
    _check_reachable(args, "pretrained_model_name_or_path")
    try:
        components = MPDiTPipeline.load_config(source, cache_dir=args.cache_dir)
    except OSError:  # no model_index.json: a transformer alone, or nothing, which is an error
        MPDiTTransformer2DModel.load_config(source, cache_dir=args.cache_dir)
        return DEFAULT_VAE
    return source if components.get("vae", [None])[0] is not None else "none"


def make_objective(args: argparse.Namespace, config: Mapping[str, Any]) -> Objective:
    """The objective of the flags for a model of this config; its scheduler is saved and says how to sample."""
    objective = FlowMatchObjective if args.prediction_type in FLOW_PREDICTIONS else DDPMObjective
    options = {flag: getattr(args, flag) for flag in OBJECTIVES[args.prediction_type]}
    return objective.of_recipe(args.prediction_type, config, **options)


def load_pretrained(args: argparse.Namespace, vae: ModelMixin | None) -> Pretrained:
    """A pipeline or a transformer, refused where the VAE or the objective is another, before images are encoded.

    Args:
        args (argparse.Namespace): the command line.
        vae (ModelMixin, optional): of the run; None for pixels.
    """
    source = args.pretrained_model_name_or_path
    _check_reachable(args, "pretrained_model_name_or_path")
    try:
        MPDiTPipeline.load_config(source, cache_dir=args.cache_dir)
    except OSError:  # no model_index.json
        with naming("pretrained_model_name_or_path", source):
            transformer = MPDiTTransformer2DModel.from_pretrained(source, cache_dir=args.cache_dir)
            check_finite(transformer, source)
        return Pretrained(transformer, sha256_of_weights(transformer.state_dict()))
    with naming("pretrained_model_name_or_path", source):
        pipeline = MPDiTPipeline.from_pretrained(source, cache_dir=args.cache_dir)
        check_finite(pipeline.transformer, source)
    if (pipeline.vae is None) != (vae is None) or (
        vae is not None and vae_fingerprint(pipeline.vae) != vae_fingerprint(vae)
    ):
        raise ValueError(
            f"`--vae` must be the VAE of {source}, whose latents the transformer knows "
            f"({'none: it works on pixels' if pipeline.vae is None else 'its folder is vae/'}), got {args.vae}."
        )
    if pipeline.config.prediction_type != args.prediction_type:
        raise ValueError(
            f"`--prediction_type` must be {pipeline.config.prediction_type}, which is what {source} predicts, got "
            f"{args.prediction_type}."
        )
    wanted, stored = make_objective(args, pipeline.transformer.config).scheduler.config, pipeline.scheduler.config
    for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", *SHIFT_OPTIONS):
        if stored.get(name) != wanted.get(name):
            way_out = "; see --shift" if name in SHIFT_OPTIONS else ""
            raise ValueError(
                f"{source} must have been trained as `--prediction_type {args.prediction_type}` trains here, with "
                f"{name} {wanted.get(name)} of the scheduler, got {stored.get(name)}{way_out}."
            )
    transformer, config = pipeline.transformer, pipeline.config
    sha256 = sha256_of_weights(transformer.state_dict())
    return Pretrained(transformer, sha256, pipeline.id2label, config.latents_mean, config.latents_std)


def _check_reachable(args: argparse.Namespace, flag: str) -> None:
    check_reachable(flag, getattr(args, flag), ("model_index.json", "config.json"), cache_dir=args.cache_dir)


def channels_of(args: argparse.Namespace, vae: ModelMixin | None, pretrained: Pretrained | None) -> int | None:
    """What `--image_channels` is by default: that of a checkpoint of pixels, else 3; None with a VAE."""
    if vae is not None:
        if args.image_channels is not None:
            raise ValueError("`image_channels` would have no effect with a VAE, which brings its own: leave it out.")
        return None
    if args.image_channels is None and pretrained is not None:
        return pretrained.transformer.config.in_channels
    return args.image_channels or 3


def check_finite(model: torch.nn.Module, source: str) -> None:
    """Refuse weights of which no training or measurement comes.

    Raises:
        ValueError: naming a tensor that is not finite, or was not in the file.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(
                f"the weights in {source} must be those that its config.json describes, {name} is missing."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"the weights in {source} must be finite, {name} has NaN or infinity.")


def model_config(
    args: argparse.Namespace,
    latent_shape: tuple[int, int, int],
    num_classes: int | None,
    pooled_projection_dim: int | None = None,
    pretrained_config: dict | None = None,
) -> dict:
    """Keyword arguments of the model: preset and flags, or another model's config, and what follows from the data."""
    channels, sample_size, _ = latent_shape
    of_data = {
        "in_channels": channels,
        "out_channels": 2 * channels if args.variance_type == "learned_range" else channels,
        "sample_size": sample_size,
        "num_classes": num_classes,
        "pooled_projection_dim": pooled_projection_dim,
    }
    class_dropout_prob = 0.1 if args.class_dropout_prob is None else args.class_dropout_prob
    is_conditional = num_classes is not None or pooled_projection_dim is not None
    if not is_conditional:
        class_dropout_prob = 0.0
    if pretrained_config is None and args.model_config_name_or_path is None:
        flags = {name: getattr(args, name) for name in MODEL_FLAGS if getattr(args, name) is not None}
        return get_preset(
            args.preset,
            args.configuration,
            args.modulation,
            activation_fn=args.activation_fn,
            class_dropout_prob=class_dropout_prob,
            **of_data,
            **flags,
        )
    source = args.pretrained_model_name_or_path or args.model_config_name_or_path
    config = pretrained_config
    if config is None:
        _check_reachable(args, "model_config_name_or_path")
        with naming("model_config_name_or_path", source):
            config = MPDiTTransformer2DModel.load_config(source, cache_dir=args.cache_dir)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for name, value in of_data.items():
        # A table of classes that there is takes the place of one of another size.
        is_resized = name == "num_classes" and pretrained_config is not None and None not in (config[name], value)
        if config.get(name, value) != value and not is_resized:
            raise ValueError(
                f"`{name}` of {source} must be {value} for these data and "
                f"--prediction_type {args.prediction_type} with --variance_type {args.variance_type}, got "
                f"{config[name]}."
            )
    if args.class_dropout_prob is None and is_conditional:
        class_dropout_prob = config.get("class_dropout_prob", class_dropout_prob)
    return {**config, **of_data, "class_dropout_prob": class_dropout_prob}


def check_pinning(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Refuse pinned norms where rows are normalised already, when they are used or after each update."""
    if args.pin_weight_norms is not None and config.get("weight_normalization", True):
        raise ValueError(
            "`pin_weight_norms` must be left out for a model with `weight_normalization`, as configurations C to F "
            "have: D to F force their rows to a norm already, and C with pinned rows would be D; got "
            f"{args.pin_weight_norms!r}. Take configuration A or B, or D instead of C."
        )


def num_known_classes(pretrained: Pretrained, id2label: dict[int, str] | None) -> int | None:
    """How many of the data's classes the pretrained model knows by name; None for data without classes."""
    known = set((pretrained.id2label or {}).values())
    return None if id2label is None else sum(name in known for name in id2label.values())


def make_model(
    args: argparse.Namespace,
    latents: LatentDataset,
    num_classes: int | None,
    pretrained: Pretrained | None,
) -> MPDiTTransformer2DModel:
    """The model of the run, with random weights or those it is to start from."""
    if args.class_dropout_prob and num_classes is None and latents.pooled_projection_dim is None:
        raise ValueError(
            "`class_dropout_prob` would have no effect on data without labels and vectors, got "
            f"{args.class_dropout_prob}: leave it out."
        )
    pretrained_config = None if pretrained is None else pretrained.transformer.config
    config = model_config(args, latents.latent_shape, num_classes, latents.pooled_projection_dim, pretrained_config)
    check_pinning(args, config)
    if pretrained is None:
        return MPDiTTransformer2DModel(**config)
    model = pretrained.transformer
    if num_classes is not None:
        generator = torch.Generator().manual_seed(args.seed)
        resize_class_embeddings_(model, pretrained.id2label, latents.id2label, generator)
    model.register_to_config(class_dropout_prob=config["class_dropout_prob"])
    # Of a snapshot of averages, and of weights that were saved in half precision, rows are shorter than 1.
    return normalize_weights_(model)
