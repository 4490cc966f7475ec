"""Flags of the scripts. A flag carries its range, and nothing heavy is imported, so that `--help` answers at once.

    add("--train_batch_size", type=at_least(1), default=256)

ends a script with "argument --train_batch_size: must be at least 1, got 0".
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .masking import mask


# Those of `diffusers.optimization.get_scheduler` but for piecewise_constant, which takes rules as a text.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# `lr_end` of its polynomial.
POLYNOMIAL_END = 1e-7


# Arguments of the package, and the flags that they are in scripts that have none of their name.
FLAG_OF_ARGUMENT = {
    "vae_id": "vae",
    "num_channels": "image_channels",
    "batch_size": "encode_batch_size",
    "num_workers": "dataloader_num_workers",
    "folder": "latents_dir",
    "train_data_dir": "reference_dir",
    "max_train_samples": "max_reference_images",
    "num_validation": "num_validation_images",
    "std": "ema_stds",
    "guidance_scale": "guidance_scales",
    "size": "preset",
    "repo_id": "hub_model_id",
    "token": "hub_token",
    "license": "hub_license",
}


NUM_WORKERS_HELP = "processes that prepare batches [0 on the CPU, up to 4 on an accelerator]"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says no "(default: None)", beside which help in brackets says what is done."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


# What is not below these has no number in int32 or float32, in which libraries and models compute.
_LIMITS = {int: 2**31, float: 3e38}


def within(kind: type, rule: str, holds: Callable[[Any], bool], limit: float | None = None) -> Callable[[str], Any]:
    """A `type=` of argparse: the text as `kind`, for which `holds`; else "must `rule`, got …"; its size is limited."""
    limit = _LIMITS[kind] if limit is None else limit

    def value_of(text: str):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must {rule}, got {text}")
        if abs(value) >= limit:
            raise argparse.ArgumentTypeError(f"must be below {limit} in size, got {text}")
        return value

    value_of.__name__ = kind.__name__  # for argparse's "invalid int value: 'x'"
    value_of.__doc__ = f"The number that a flag is given, which must {rule}."
    return value_of


def at_least(minimum: float, kind: type = int) -> Callable[[str], Any]:
    """A number from `minimum` on, finite."""
    return within(kind, f"be at least {minimum}", lambda value: minimum <= value < math.inf)


positive = within(float, "be positive", lambda value: 0 < value < math.inf)
finite = within(float, "be finite", math.isfinite)
pixels = within(int, "be at least 1", lambda value: value >= 1, limit=16385)
seed = within(int, "be in [0, 2**32)", lambda value: 0 <= value < 2**32, limit=2**32)
share = within(float, "be in [0, 1)", lambda value: 0 <= value < 1)
ema_width = within(float, "be in (0, 1/sqrt(12)), that is below 0.2887", lambda value: 0 < value < 12**-0.5)


def color(text: str) -> str:
    """A colour as `PIL.ImageColor` names it, without transparency."""
    from PIL import ImageColor  # here, not above: `--help` needs none of it

    try:
        channels = len(ImageColor.getrgb(text))
    except ValueError:
        channels = 0
    if channels != 3:
        raise argparse.ArgumentTypeError(f"must be a colour such as white, gray or #ff8800, got {text}")
    return text


def check_ema_stds(stds: Sequence[float], parser: argparse.ArgumentParser) -> None:
    """Refuse widths of averages of which two have one name, which is that of a folder."""
    names = [f"{std:g}" for std in stds]
    if len({*names}) < len(names):
        parser.error(f"--ema_stds must differ in six digits, got {' '.join(map(str, stds))}")


def add_source_arguments(add: Callable[..., Any], split_help: str = "split to train on") -> None:
    """Where images and their classes come from; `add` is `add_argument` of a parser or of a group."""
    add("--train_data_dir", help="folder of images, one sub-folder for each class")
    add("--dataset_name", help="data set on the Hub, or a path `datasets.load_dataset` understands")
    add("--dataset_config_name", help="configuration of the data set")
    add("--split", help=f"{split_help}: of a data set [train], or the name of the folders to take images from")
    add(
        "--class_level",
        choices=("first", "last"),
        help="which folder of a path names the class, where there are several",
    )
    add("--image_column", default="image", help="column of the images")
    add("--label_column", default="label", help="column of the class labels; none for no labels")
    add("--cache_dir", help="where `datasets` and the Hub client keep their files")
    add("--max_train_samples", type=at_least(1), help="use this many samples only, chosen by the seed")
    add("--background", type=color, default="white", help="ground under transparent images: a name, or #rrggbb")
    add("--skip_corrupt", action="store_true", help="leave damaged images out instead of stopping")


def source_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of a source say, as arguments of `load_image_dataset`."""
    names = ("train_data_dir", "dataset_name", "dataset_config_name", "split", "class_level", "cache_dir")
    names += ("image_column", "max_train_samples", "seed", "streaming", "skip_corrupt")
    label_column = None if args.label_column == "none" else args.label_column
    return {name: getattr(args, name) for name in names if name in args} | {"label_column": label_column}


def add_encoding_arguments(add: Callable[..., Any]) -> None:
    """What becomes of the images before they are kept, for the scripts that train or encode from scratch."""
    add("--pooled_column", help="column of condition vectors, such as a text encoder's pooled output")
    add(
        "--streaming",
        action="store_true",
        help="keep no copy of the source; until all is encoded, each restart of each process reads it from the start",
    )
    add("--image_channels", type=int, choices=(1, 3), help="with `--vae none`: grey or RGB [3, or the checkpoint's]")


def encoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a script's flags say of the encoding, as arguments of `EncodingSettings`."""
    names = ("resolution", "random_flip", "pooled_column", "shard_size", "image_column", "label_column", "background")
    flag_of = {name: name for name in (*names, "skip_corrupt")}
    flag_of |= {name: FLAG_OF_ARGUMENT[name] for name in ("vae_id", "num_channels", "batch_size", "num_workers")}
    encoding = {name: getattr(args, flag) for name, flag in flag_of.items() if flag in args}
    if encoding.get("num_channels", 3) is None:  # the flag was not given
        encoding["num_channels"] = 3
    return encoding


def add_schedule_arguments(add: Callable[..., Any]) -> None:
    """What diffusers' schedules take beside the numbers of updates."""
    add("--lr_num_cycles", type=at_least(1), help="restarts of cosine_with_restarts; with 1 it is cosine [1]")
    add("--lr_power", type=positive, help="power of polynomial, which decays to 1e-7; with 1.0 it is linear [1.0]")


def check_schedule(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Defaults of what a schedule takes; refuses what it does not take, and a polynomial with nothing to decay."""
    for name, owner, default in (("lr_num_cycles", "cosine_with_restarts", 1), ("lr_power", "polynomial", 1.0)):
        if args.lr_scheduler == owner:
            setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
        elif getattr(args, name) is not None:
            parser.error(f"--{name} has no meaning for --lr_scheduler {args.lr_scheduler}, only for {owner}")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        parser.error("--lr_warmup_steps has no meaning for --lr_scheduler constant: use constant_with_warmup")
    if args.lr_scheduler == "polynomial":
        if args.learning_rate is not None and args.learning_rate <= POLYNOMIAL_END:
            parser.error(
                f"--learning_rate must be above {POLYNOMIAL_END:g}, where --lr_scheduler polynomial ends, got "
                f"{args.learning_rate:g}"
            )
        if args.max_train_steps is not None and (args.lr_warmup_steps or 0) >= args.max_train_steps:
            parser.error(
                f"--lr_warmup_steps must be below --max_train_steps ({args.max_train_steps}) for --lr_scheduler "
                f"polynomial, got {args.lr_warmup_steps}"
            )


def license_name(text: str) -> str:
    """The name of a licence; a token that was meant for another flag would be published."""
    if mask(text) != text:
        raise argparse.ArgumentTypeError("must be a licence as the Hub names it, such as apache-2.0, got a token")
    return text


def add_hub_arguments(add: Callable[..., Any], default_id: str = "name of output_dir") -> None:
    """Whether and where the result is published."""
    add("--push_to_hub", action="store_true", help="publish the result with a model card at the end")
    add("--hub_model_id", help=f"repository, as in user/name [{default_id}]")
    add("--hub_token", help="better: `hf auth login`, which leaves it out of the process list")
    add("--hub_private_repo", action="store_true", help="make the repository private")
    add("--hub_license", type=license_name, help="licence of the weights, as the Hub names it, for the model card")


def check_paths(args: argparse.Namespace) -> None:
    """Refuse paths that are not there or of the wrong kind: the cheapest check, before anything is imported.

    Args:
        args (argparse.Namespace): of any script; paths are known by the names of their flags.
    Raises:
        OSError, ValueError: naming the flag.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("train_data_dir", "reference_dir", "snapshots_dir"):
        if name in given and not Path(given[name]).is_dir():
            what = "a file" if Path(given[name]).exists() else "nothing"
            kind = "the ema_snapshots of a run" if name == "snapshots_dir" else "a folder of images"
            raise ValueError(f"`{name}` must be {kind}, got {str(given[name])!r}, where there is {what}.")
    for name in ("checkpoint_path", "id2label", "reference_statistics"):
        for path in given[name] if isinstance(given.get(name), list) else [given[name]] if name in given else []:
            if not Path(path).is_file():
                what = "a folder" if Path(path).is_dir() else "nothing"
                raise ValueError(f"`{name}` must be a file, got {str(path)!r}, where there is {what}.")
    for name in ("pretrained_model_name_or_path", "model_config_name_or_path", "vae", "dataset_name"):
        # Anything of the form user/name may be on the Hub.
        if name in given and _is_path(given[name]) and not Path(given[name]).exists():
            raise FileNotFoundError(
                f"`--{name}` must be a path, or an id on the Hub as user/name, got {given[name]!r}: there is no such "
                "path."
            )
    for name in ("pretrained_model_name_or_path", "vae"):
        if name in given and Path(given[name]).is_file():
            raise ValueError(
                f"`{name}` must be a folder, or an id on the Hub as user/name, got the file {given[name]!r}."
            )
    for name in ("latents_dir", "output_dir", "cache_dir"):
        if name in given:
            _check_folder_can_be_made(name, Path(given[name]))


def _is_path(name: str) -> bool:
    return name.count("/") > 1 or name.startswith(("/", "./", "../", "~")) or name.endswith("/") or name in (".", "..")


def _check_folder_can_be_made(name: str, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"`{name}` must be a folder or a new name, got {str(folder)!r}: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`{name}` must be a folder that can be written to, got {str(folder)!r}: {there} cannot.")


def check_effects(parser: Any, flags: Iterable[str], reason: str) -> None:
    """Refuse flags that were given and would have no effect.

    Args:
        parser (ScriptParser): which has parsed a command line.
        flags (iterable of str): names of flags that have none here.
        reason (str): why, as in "with --vae none".
    """
    without = [f"--{name}" for name in flags if name in parser.given]
    if without:
        parser.error(
            f"{', '.join(without)} would have no effect {reason}: leave {'it' if len(without) == 1 else 'them'} out"
        )


def check_source_effects(args: argparse.Namespace, parser: Any) -> None:
    """Refuse flags of a source or of the Hub that have no effect beside the others."""
    if args.dataset_name is None:
        check_effects(parser, ["dataset_config_name"], "without --dataset_name")
    if not args.push_to_hub:
        check_effects(parser, ["hub_model_id", "hub_private_repo"], "without --push_to_hub")
