"""What can be told of a run before anything is downloaded or encoded, but not without torch, diffusers, Accelerate."""

import argparse

from accelerate import init_empty_weights
from accelerate.tracking import get_available_trackers
from diffusers import ModelMixin

from ..autoencoders import geometry
from ..publishing.hub import check_trackers
from ..sources import check_reachable, naming
from ..transformer_mpdit import MPDiTTransformer2DModel
from .arguments import make_parser
from .model import Pretrained, check_pinning, model_config
from .optimizers import optimizer_groups


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse, as the parser does, trackers that are not there, flags that make no model, decay that does nothing."""
    parser = make_parser()
    check_reporting(args, parser)
    try:
        if args.preset is not None:
            with init_empty_weights():
                model = MPDiTTransformer2DModel(**model_config(args, (4, 8, 8), 2))
            check_pinning(args, model.config)
            optimizer_groups(args, model.train(), learning_rate=1.0)
    except ValueError as error:
        parser.error(str(error))


def check_reporting(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse, as the parser does, a tracker that is not there, or that would be told the token."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    try:
        check_trackers(args.report_to, vars(args))
    except ValueError as error:
        parser.error(str(error))
    if args.report_to not in ("none", *installed):
        parser.error(f"--report_to {args.report_to}: not installed; there are {installed}")


def check_model(args: argparse.Namespace, vae: ModelMixin | None, pretrained: Pretrained | None) -> None:
    """Refuse a model that latents of this size or the optimiser do not fit, before images are encoded for hours."""
    channels, size, _ = shape = latent_shape_of(args, vae)
    known = {"num_classes": None, "pooled_projection_dim": None}  # the data will tell; until then, as the config says
    if pretrained is not None:
        known |= pretrained.transformer.config
    elif args.model_config_name_or_path is not None:
        check_reachable(
            "model_config_name_or_path", args.model_config_name_or_path, ["config.json"], cache_dir=args.cache_dir
        )
        with naming("model_config_name_or_path", args.model_config_name_or_path):
            source = args.model_config_name_or_path
            known |= MPDiTTransformer2DModel.load_config(source, cache_dir=args.cache_dir)
    conditions = known["num_classes"], known["pooled_projection_dim"]
    source = known if pretrained is not None or args.model_config_name_or_path is not None else None
    if source is not None:
        check_pinning(args, source)
    try:
        with init_empty_weights():
            model = MPDiTTransformer2DModel(**model_config(args, shape, *conditions, source))
    except ValueError as error:
        raise ValueError(
            f"`--resolution {args.resolution}` with this `--vae` makes latents of {channels} x {size} x {size}, which "
            f"the model must take: {error}"
        ) from error
    optimizer_groups(args, model.train(), learning_rate=1.0)


def latent_shape_of(args: argparse.Namespace, vae: ModelMixin | None) -> tuple[int, int, int]:
    """Channels, height and width of what images will be encoded to."""
    if vae is None:
        return args.image_channels or 3, args.resolution, args.resolution
    channels, factor, *_ = geometry(vae)
    return channels, args.resolution // factor, args.resolution // factor
