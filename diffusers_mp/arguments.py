"""Flags of the scripts. A flag carries its range, and nothing heavy is imported, so that `--help` answers at once.

    add("--train_batch_size", type=at_least(1), default=256)

ends a script with "argument --train_batch_size: must be at least 1, got 0".
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any


# Those of `diffusers.optimization.get_scheduler` that need no rules beside the numbers of updates.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says no "(default: None)", beside which help in brackets says what is done."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def within(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A `type=` of argparse: the text as `kind`, for which `holds`; else "must `rule`, got …"."""

    def value_of(text: str):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must {rule}, got {text}")
        return value

    value_of.__name__ = kind.__name__  # for argparse's "invalid int value: 'x'"
    value_of.__doc__ = f"The number that a flag is given, which must {rule}."
    return value_of


def at_least(minimum: float, kind: type = int) -> Callable[[str], Any]:
    """A number from `minimum` on, finite."""
    return within(kind, f"be at least {minimum}", lambda value: minimum <= value < math.inf)


positive = within(float, "be positive", lambda value: 0 < value < math.inf)
finite = within(float, "be finite", math.isfinite)
share = within(float, "be in [0, 1)", lambda value: 0 <= value < 1)
ema_width = within(float, "be in (0, 1/sqrt(12)), that is below 0.2887", lambda value: 0 < value < 12**-0.5)


def check_ema_stds(stds: Sequence[float], parser: argparse.ArgumentParser) -> None:
    """Refuse widths of averages of which two have one name, which is that of a folder."""
    names = [f"{std:g}" for std in stds]
    if len({*names}) < len(names):
        parser.error(f"--ema_stds must differ in six digits, got {' '.join(map(str, stds))}")


def add_source_arguments(add: Callable[..., Any], split_help: str = "split to train on") -> None:
    """Where images and their classes come from; `add` is `add_argument` of a parser or of a group."""
    add("--train_data_dir", help="folder of images, one sub-folder for each class; of several splits, name one")
    add("--dataset_name", help="data set on the Hub, or a path `datasets.load_dataset` understands")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split", default="train", help=split_help)
    add("--image_column", default="image", help="column of the images")
    add("--label_column", default="label", help="column of the class labels")
    add("--cache_dir", help="where `datasets` and the Hub client keep their files")
    add("--max_train_samples", type=at_least(1), help="use this many samples only, chosen by the seed")
    add("--skip_corrupt", action="store_true", help="leave damaged images out instead of stopping")


def source_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of a source say, as arguments of `load_image_dataset`."""
    names = ("train_data_dir", "dataset_name", "dataset_config_name", "cache_dir", "image_column", "label_column")
    names += ("max_train_samples", "seed", "streaming")
    return {"split": args.dataset_split} | {name: getattr(args, name) for name in names if name in args}


def add_encoding_arguments(add: Callable[..., Any]) -> None:
    """What becomes of the images before they are kept, for the scripts that train or encode from scratch."""
    add("--pooled_column", help="column of condition vectors, such as a text encoder's pooled output")
    add(
        "--streaming",
        action="store_true",
        help="keep no copy of the source; until all is encoded, each restart of each process reads it from the start",
    )
    add("--image_channels", type=int, default=3, choices=(1, 3), help="with `--vae none`: grey or RGB")


def encoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a script's flags say of the encoding, as arguments of `EncodingSettings`."""
    names = ("resolution", "random_flip", "pooled_column", "shard_size", "image_column", "label_column")
    flag_of = {name: name for name in (*names, "skip_corrupt")}
    flag_of |= {"vae_id": "vae", "num_channels": "image_channels"}
    flag_of |= {"batch_size": "encode_batch_size", "num_workers": "dataloader_num_workers"}
    return {name: getattr(args, flag) for name, flag in flag_of.items() if flag in args}


def add_hub_arguments(add: Callable[..., Any], default_id: str = "name of output_dir") -> None:
    """Whether and where the result is published."""
    add("--push_to_hub", action="store_true", help="publish the result with a model card at the end")
    add("--hub_model_id", help=f"repository, as in user/name [{default_id}]")
    add("--hub_token", help="better: `hf auth login`, which leaves it out of the process list")
    add("--hub_private_repo", action="store_true", help="make the repository private")
    add("--hub_license", help="licence of the weights, as the Hub names it, for the model card")
