"""Command line of train_mpdit.py, with diffusers' own flag names and the recipe of arXiv 2505.19122 as defaults."""

import argparse
from pathlib import Path

from accelerate.tracking import get_available_trackers
from diffusers.optimization import SchedulerType

from diffusers_mp import MPDiTTransformer2DModel, get_preset


MODEL_FLAGS = (
    "cosine_attention",
    "weight_normalization",
    "forced_weight_normalization",
    "mp_residual",
    "mp_silu",
    "mp_pos_embed",
    "mp_embedding",
    "layer_norm",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a magnitude-preserving diffusion transformer on images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    group = parser.add_argument_group("data")
    group.add_argument("--train_data_dir", help="folder of images, one sub-folder for each class")
    group.add_argument("--dataset_name", help="data set on the Hub, or a path `datasets.load_dataset` understands")
    group.add_argument("--dataset_config_name", help="configuration of the data set")
    group.add_argument("--dataset_split", default="train", help="split to train on")
    group.add_argument("--image_column", default="image", help="column of the images")
    group.add_argument("--label_column", default="label", help="column of the class labels")
    group.add_argument("--cache_dir", help="where `datasets` and the Hub client keep their files")
    group.add_argument("--max_train_samples", type=int, help="use this many samples only, chosen by the seed")
    group.add_argument("--skip_corrupt", action="store_true", help="leave unreadable images out instead of stopping")
    group.add_argument("--resolution", type=int, default=128, help="side of the images in pixels, after centre crop")
    group.add_argument("--random_flip", action="store_true", help="mirror half of the samples")
    group.add_argument(
        "--vae", default="stabilityai/sd-vae-ft-mse", help="AutoencoderKL by path or Hub id; 'none' trains on pixels"
    )
    group.add_argument("--image_channels", type=int, default=3, choices=(1, 3), help="with `--vae none`: grey or RGB")
    group.add_argument("--encode_batch_size", type=int, default=32, help="images per forward pass of the VAE")
    group.add_argument("--latents_dir", help="where encoded images are kept and found again [OUTPUT_DIR/latents]")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that prepare batches")

    group = parser.add_argument_group("model")
    group.add_argument("--preset", default="S/2", help="XS, S, B, L or XL, a slash, and a patch size of 2, 4 or 8")
    group.add_argument("--configuration", default="E", help="A (DiT) to E (magnitude preserving)")
    group.add_argument("--modulation", nargs="+", default=["scale", "rotate", "gate"], help="kinds of modulation")
    group.add_argument("--activation_fn", default="silu", choices=("silu", "leaky_relu"), help="activation")
    group.add_argument("--class_dropout_prob", type=float, default=0.1, help="share of labels replaced by the null id")
    for flag in MODEL_FLAGS:
        group.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, help="overrides the configuration")
    group.add_argument("--model_config_name_or_path", help="config of a model, instead of the preset and its flags")
    group.add_argument(
        "--variance_type",
        default="learned_range",
        choices=("learned_range", "fixed_small", "fixed_large"),
        help="learned_range doubles the output channels and adds the variational bound to the loss",
    )

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
    group.add_argument("--lr_warmup_steps", type=int, help="updates of linear warm-up [max_train_steps / 150]")
    group.add_argument("--lr_constant_steps", type=int, help="inverse_sqrt decays after it [max_train_steps / 10]")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Adam's first decay rate")
    group.add_argument("--adam_beta2", type=float, default=0.99, help="Adam's second decay rate")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon, for rows of RMS 1")
    group.add_argument("--max_grad_norm", type=float, help="clip gradients to this norm [no clipping]")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="[as `accelerate config` says]")
    group.add_argument("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later")
    group.add_argument("--ema_stds", type=float, nargs="+", default=[0.05, 0.10], help="relative widths of averages")

    group = parser.add_argument_group("checkpoints, validation, logs")
    group.add_argument("--checkpointing_steps", type=int, default=5000, help="updates between checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep this many, delete the oldest")
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
        "--report_to", default="none", help="tensorboard, wandb, … or none; metrics.jsonl is always kept"
    )
    group.add_argument("--logging_dir", default="logs", help="folder for logs in output_dir")

    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give one of --train_data_dir and --dataset_name")
    if args.max_train_steps is not None and args.num_train_epochs is not None:
        parser.error("give one of --max_train_steps and --num_train_epochs")
    if args.report_to != "none" and args.report_to not in map(str, get_available_trackers()):
        parser.error(f"--report_to {args.report_to}: not installed; there are {[*map(str, get_available_trackers())]}")
    for name in ("checkpointing_steps", "logging_steps", "train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        parser.error(f"--checkpoints_total_limit must be at least 1, got {args.checkpoints_total_limit}")
    if args.resume_from_checkpoint is None and args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        parser.error(
            f"--output_dir must be new or empty, {args.output_dir} is not: choose another, or go on with "
            "--resume_from_checkpoint latest"
        )


def model_config(args: argparse.Namespace, latent_shape: tuple[int, int, int], num_classes: int | None) -> dict:
    """Keyword arguments of the model: preset, flags, and what follows from the data."""
    channels, sample_size, _ = latent_shape
    of_data = {
        "in_channels": channels,
        "out_channels": 2 * channels if args.variance_type == "learned_range" else channels,
        "sample_size": sample_size,
        "num_classes": num_classes,
    }
    class_dropout_prob = 0.0 if num_classes is None else args.class_dropout_prob
    if args.model_config_name_or_path is None:
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
    config = MPDiTTransformer2DModel.load_config(args.model_config_name_or_path)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for name, value in of_data.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"`{name}` of {args.model_config_name_or_path} must be {value} for these data and "
                f"--variance_type {args.variance_type}, got {config[name]}."
            )
    return {"class_dropout_prob": class_dropout_prob, **config, **of_data}
