"""Command line of train_mpdit.py, with diffusers' own flag names and the recipe of arXiv 2505.19122 as defaults."""

import argparse
import json
import math
from pathlib import Path

from accelerate import init_empty_weights
from accelerate.tracking import get_available_trackers
from diffusers.optimization import SchedulerType

from ..arguments import HelpFormatter
from ..averages.ema import exponent_of_std
from ..presets import CONFIGURATIONS, get_preset
from ..publishing.hub import check_trackers
from ..transformer_mpdit import MPDiTTransformer2DModel
from .engine import LOCK_NAME


MODEL_FLAGS = tuple(CONFIGURATIONS["E"])
DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
AT_LEAST_1 = (
    "checkpointing_steps",
    "checkpoints_total_limit",
    "ema_update_steps",
    "encode_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "lr_constant_steps",
    "max_train_samples",
    "max_train_steps",
    "num_validation_levels",
    "resolution",
    "train_batch_size",
    "validation_inference_steps",
)
NOT_NEGATIVE = (
    "dataloader_num_workers",
    "lr_warmup_steps",
    "num_validation_images",
    "record_magnitudes_steps",
    "seed",
    "validation_steps",
)
POSITIVE = ("adam_epsilon", "learning_rate", "logit_std", "max_grad_norm", "num_train_epochs", "snr_gamma")
PRESET_DEFAULTS = {
    "preset": "S/2",
    "configuration": "E",
    "modulation": ["scale", "rotate", "gate"],
    "activation_fn": "silu",
}
OBJECTIVE_FLAGS = ("prediction_type", "variance_type", "snr_gamma", "logit_mean", "logit_std")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a magnitude-preserving diffusion transformer on images. What stands in [] holds if the "
        "flag is not given.",
        formatter_class=HelpFormatter,
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--train_data_dir", help="folder of images, one sub-folder for each class; of several splits, name one"
    )
    group.add_argument("--dataset_name", help="data set on the Hub, or a path `datasets.load_dataset` understands")
    group.add_argument("--dataset_config_name", help="configuration of the data set")
    group.add_argument("--dataset_split", default="train", help="split to train on")
    group.add_argument("--image_column", default="image", help="column of the images")
    group.add_argument("--label_column", default="label", help="column of the class labels")
    group.add_argument("--pooled_column", help="column of condition vectors, such as a text encoder's pooled output")
    group.add_argument("--cache_dir", help="where `datasets` and the Hub client keep their files")
    group.add_argument(
        "--streaming",
        action="store_true",
        help="keep no copy of the source; until all is encoded, each restart of each process reads it from the start",
    )
    group.add_argument("--max_train_samples", type=int, help="use this many samples only, chosen by the seed")
    group.add_argument("--skip_corrupt", action="store_true", help="leave damaged images out instead of stopping")
    group.add_argument("--resolution", type=int, help="side of the images in pixels, after centre crop [128]")
    group.add_argument("--random_flip", action="store_true", help="mirror half of the samples")
    group.add_argument(
        "--vae",
        help="AutoencoderKL, or a pipeline that has one, by path or Hub id; 'none' trains on pixels "
        f"[that of --pretrained_model_name_or_path, or {DEFAULT_VAE}]",
    )
    group.add_argument("--image_channels", type=int, default=3, choices=(1, 3), help="with `--vae none`: grey or RGB")
    group.add_argument("--encode_batch_size", type=int, default=32, help="images per forward pass of the VAE")
    group.add_argument("--latents_dir", help="where encoded images are kept and found again [OUTPUT_DIR/latents]")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that prepare batches")

    group = parser.add_argument_group("model")
    group.add_argument("--preset", help="XS, S, B, L or XL, a slash, and a patch size of 2, 4 or 8 [S/2]")
    group.add_argument(
        "--configuration", help="A (DiT, if --modulation is scale shift gate) to E (magnitude preserving) [E]"
    )
    group.add_argument("--modulation", nargs="+", help="kinds of modulation [scale rotate gate]")
    group.add_argument("--activation_fn", choices=("silu", "leaky_relu"), help="activation [silu]")
    group.add_argument(
        "--class_dropout_prob", type=float, help="share of conditions that are dropped [0.1, or the checkpoint's]"
    )
    for flag in MODEL_FLAGS:
        group.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, help="overrides the configuration")
    group.add_argument("--model_config_name_or_path", help="config of a model, instead of the preset and its flags")
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="start from the weights of this pipeline or transformer; classes of the same names keep their rows",
    )
    group.add_argument(
        "--variance_type",
        choices=("learned_range", "fixed_small", "fixed_large"),
        help="learned_range doubles the output channels and adds the variational bound to the loss "
        "[learned_range; none for flow_prediction]",
    )

    group = parser.add_argument_group("objective")
    group.add_argument(
        "--prediction_type",
        default="epsilon",
        choices=("epsilon", "v_prediction", "flow_prediction"),
        help="what the model predicts; flow_prediction is rectified flow, sampled by FlowMatchEulerDiscreteScheduler",
    )
    group.add_argument(
        "--snr_gamma", type=float, help="min-SNR weights of the squared error (arXiv 2303.09556), 5.0 there [none]"
    )
    group.add_argument("--logit_mean", type=float, help="of flow_prediction's logit-normal times; up is noisier [0.0]")
    group.add_argument("--logit_std", type=float, help="of flow_prediction's logit-normal times [1.0]")

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, default=Path("mpdit"), help="folder of the run and of the pipeline")
    group.add_argument("--seed", type=int, default=0, help="seed of the weights and of every training sample")
    group.add_argument("--train_batch_size", type=int, default=256, help="samples per process and micro batch")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro batches per update")
    group.add_argument("--max_train_steps", type=int, help="number of updates [400000, or as num_train_epochs says]")
    group.add_argument("--num_train_epochs", type=float, help="instead of max_train_steps")
    group.add_argument("--learning_rate", type=float, help="[1e-2; 1e-4 without weight normalisation]")
    group.add_argument(
        "--lr_scheduler",
        default="inverse_sqrt",
        choices=["inverse_sqrt", *(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT)],
        help="inverse_sqrt is the paper's; the others are those of diffusers",
    )
    group.add_argument(
        "--lr_warmup_steps", type=int, help="updates of linear warm-up [max_train_steps / 150; none for constant]"
    )
    group.add_argument("--lr_constant_steps", type=int, help="inverse_sqrt decays after it [max_train_steps / 10]")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Adam's first decay rate")
    group.add_argument("--adam_beta2", type=float, default=0.99, help="Adam's second decay rate")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon, for rows of RMS 1")
    group.add_argument("--max_grad_norm", type=float, help="clip gradients to this norm [no clipping]")
    group.add_argument(
        "--on_non_finite",
        default="stop",
        choices=("stop", "skip"),
        help="what to do about an update whose loss or gradient is not finite; evidence goes to OUTPUT_DIR/non_finite",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="[as `accelerate config` says]")
    group.add_argument("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later")
    group.add_argument("--ema_stds", type=float, nargs="+", default=[0.05, 0.10], help="relative widths of averages")
    group.add_argument("--ema_update_steps", type=int, default=1, help="updates of the weights for each of an average")

    group = parser.add_argument_group("checkpoints, validation, logs")
    group.add_argument("--checkpointing_steps", type=int, default=5000, help="updates between checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep this many, delete the oldest")
    group.add_argument(
        "--ema_snapshot_steps",
        type=int,
        default=0,
        help="updates between snapshots of the averages, of which reconstruct_ema.py makes other widths; 0 for none",
    )
    group.add_argument("--resume_from_checkpoint", help="'latest', or a checkpoint-N folder")
    group.add_argument("--validation_steps", type=int, default=5000, help="updates between validations; 0 for none")
    group.add_argument(
        "--num_validation_images", type=int, help="images held out of training [256, at most one in 20]; 0 for none"
    )
    group.add_argument("--num_validation_levels", type=int, default=8, help="noise levels of the validation loss")
    group.add_argument("--validation_inference_steps", type=int, default=50, help="steps of the validation samples")
    group.add_argument("--validation_guidance_scale", type=float, help="guidance of the samples [pipeline's default]")
    group.add_argument("--logging_steps", type=int, default=10, help="updates between log entries")
    group.add_argument(
        "--record_magnitudes_steps",
        type=int,
        default=0,
        help="updates between records of magnitudes, also kept in LOGGING_DIR/magnitudes.json; 0 for none",
    )
    group.add_argument(
        "--report_to", default="none", help="tensorboard, wandb, … or none; metrics.jsonl is always kept"
    )
    group.add_argument("--logging_dir", default="logs", help="folder for logs inside output_dir")

    group = parser.add_argument_group("publishing")
    group.add_argument("--push_to_hub", action="store_true", help="publish the pipeline with a model card at the end")
    group.add_argument("--hub_model_id", help="repository, as in user/name [name of output_dir]")
    group.add_argument("--hub_token", help="better: `hf auth login`, which leaves it out of the process list")
    group.add_argument("--hub_private_repo", action="store_true", help="make the repository private")
    group.add_argument("--hub_license", help="licence of the weights, as the Hub names it, for the model card")

    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.train_data_dir is not None and args.dataset_name is not None:
        parser.error("give one of --train_data_dir and --dataset_name")
    index_file, index = latents_folder(args) / "index.json", {"resolution": 128}
    if index_file.is_file():
        index = json.loads(index_file.read_text())
    elif args.train_data_dir is None and args.dataset_name is None:
        parser.error("give one of --train_data_dir and --dataset_name, or the --latents_dir of encoded images")
    # What encoded images were made with need not be said again.
    if args.resolution is None:
        args.resolution = index["resolution"]
    if args.vae is None and "vae" in index:
        args.vae = index["vae"]["id"] if index["vae"] else "none"
        if args.vae is None:
            parser.error(f"--vae must be given: {index_file} has no name of the VAE that encoded its images")
    elif args.vae is None and args.pretrained_model_name_or_path is None:
        args.vae = DEFAULT_VAE
    if args.max_train_steps is not None and args.num_train_epochs is not None:
        parser.error("give one of --max_train_steps and --num_train_epochs")
    try:
        check_trackers(args.report_to, args.hub_token)
    except ValueError as error:
        parser.error(str(error))
    is_flow = args.prediction_type == "flow_prediction"
    for name in ("variance_type", "snr_gamma") if is_flow else ("logit_mean", "logit_std"):
        if getattr(args, name) is not None:
            parser.error(f"--{name} has no meaning for --prediction_type {args.prediction_type}")
    if is_flow:
        args.logit_mean = 0.0 if args.logit_mean is None else args.logit_mean
        args.logit_std = 1.0 if args.logit_std is None else args.logit_std
    elif args.variance_type is None:
        args.variance_type = "learned_range"
    for name in POSITIVE:
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.report_to != "none" and args.report_to not in map(str, get_available_trackers()):
        parser.error(f"--report_to {args.report_to}: not installed; there are {[*map(str, get_available_trackers())]}")
    for name in AT_LEAST_1:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in NOT_NEGATIVE:
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name} must not be negative, got {getattr(args, name)}")
    for name in ("adam_beta1", "adam_beta2", "class_dropout_prob"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} must be in [0, 1), got {getattr(args, name)}")
    for name in ("logit_mean", "validation_guidance_scale"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            parser.error(f"--{name} must be finite, got {getattr(args, name)}")
    is_guided = args.validation_steps and args.validation_guidance_scale not in (None, 1)
    if is_guided and args.class_dropout_prob == 0:
        parser.error("--validation_guidance_scale needs dropped conditions in training, not --class_dropout_prob 0")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        parser.error("--lr_warmup_steps has no meaning for --lr_scheduler constant: use constant_with_warmup")
    if args.lr_scheduler != "inverse_sqrt" and args.lr_constant_steps is not None:
        parser.error(f"--lr_constant_steps has no meaning for --lr_scheduler {args.lr_scheduler}")
    for std in args.ema_stds:
        try:
            exponent_of_std(std)
        except ValueError as error:
            parser.error(f"--ema_stds: {error}")
    if len(set(args.ema_stds)) < len(args.ema_stds):
        parser.error(f"--ema_stds must differ from each other, got {args.ema_stds}")
    _check_model_flags(args, parser)
    if args.max_train_steps is not None and args.ema_update_steps > args.max_train_steps:
        parser.error(
            f"--ema_update_steps must be at most --max_train_steps ({args.max_train_steps}), got "
            f"{args.ema_update_steps}"
        )
    if args.ema_snapshot_steps < 0 or args.ema_snapshot_steps % args.ema_update_steps:
        parser.error(
            f"--ema_snapshot_steps must be a multiple of --ema_update_steps ({args.ema_update_steps}) or 0, got "
            f"{args.ema_snapshot_steps}"
        )
    if not (args.output_dir / args.logging_dir).resolve().is_relative_to(args.output_dir.resolve()):
        # Elsewhere the log of another run could be taken for this one's, and be shortened.
        parser.error(f"--logging_dir must lie inside --output_dir ({args.output_dir}), got {args.logging_dir}")
    # Encoded images alone are what a run leaves that stopped before its first update: nothing to lose, much to keep.
    found = [path.name for path in args.output_dir.iterdir()] if args.output_dir.is_dir() else []
    if args.resume_from_checkpoint is None and set(found) - {"latents", LOCK_NAME}:
        parser.error(
            f"--output_dir must be new or empty, {args.output_dir} is not: choose another, or go on with "
            "--resume_from_checkpoint latest"
        )


def latents_folder(args: argparse.Namespace) -> Path:
    """Where the run keeps its encoded images."""
    return Path(args.latents_dir or args.output_dir / "latents")


def _check_model_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what a config would silently replace; build the model on no device, before images are encoded."""
    sources = ("pretrained_model_name_or_path", "model_config_name_or_path")
    given = [name for name in (*sources, *PRESET_DEFAULTS, *MODEL_FLAGS) if getattr(args, name) is not None]
    if given and given[0] in sources:
        if given[1:]:
            parser.error(f"--{given[0]} stands instead of --{', --'.join(given[1:])}: give one or the other")
        return
    for name, default in PRESET_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    try:
        with init_empty_weights():
            MPDiTTransformer2DModel(**model_config(args, (4, 8, 8), 2))
    except ValueError as error:
        parser.error(str(error))


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
