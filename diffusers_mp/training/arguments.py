"""Command line of train_mpdit.py, with diffusers' own flag names and the recipe of arXiv 2505.19122 as defaults.

Nothing heavy is imported, so that `--help` and wrong flags are answered at once; `checks.py` has the other checks.
"""

import argparse
import importlib.util
import re
from pathlib import Path

from ..arguments import (
    LR_SCHEDULERS,
    NUM_WORKERS_HELP,
    HelpFormatter,
    add_encoding_arguments,
    add_hub_arguments,
    add_schedule_arguments,
    add_source_arguments,
    at_least,
    check_effects,
    check_ema_stds,
    check_schedule,
    check_source_effects,
    ema_width,
    finite,
    pixels,
    positive,
    seed,
    share,
)
from ..files import read_json
from ..presets import SWITCHES, get_preset
from ..scripts import ScriptParser
from .batch_size import RECIPE_BATCH_SIZE, add_batch_arguments, check_batch_arguments
from .objective_arguments import add_objective_arguments, check_objective_arguments


MODEL_FLAGS = (*SWITCHES, "max_magnitude")
DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
PRESET_DEFAULTS = {
    "preset": "S/2",
    "configuration": "F",
    "modulation": ["scale", "rotate", "gate"],
    "activation_fn": "silu",
}
# What a resumed run must not change about its optimiser and schedule, beside the numbers of updates.
OPTIMIZER_FLAGS = ("optimizer", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay")
OPTIMIZER_FLAGS += ("lr_num_cycles", "lr_power")
# What each tracker calls the name of a run, in the arguments that it is started with; tensorboard's is a folder.
NAMES_OF_RUNS = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}
# What a run writes into its folder beside its log, and replaces or deletes there.
OF_THE_RUN = re.compile(
    r"checkpoint-.*|samples|latents|transformer.*|vae|scheduler|ema_snapshots|non_finite|\.lock|.*\.(json|md|png)",
    re.IGNORECASE,
)
# In the folder of a run, held by the process that trains there.
LOCK_NAME = ".lock"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what follows from it and from images that are encoded already.

    Args:
        argv (list of str, optional): what stands in for `sys.argv[1:]`.
    Returns:
        argparse.Namespace: a value for each flag.
    Raises:
        SystemExit: after a line that says what is wrong, with 2; after `--help`, with 0.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    _check_data(args, parser)
    check_objective_arguments(args, parser)
    _check_model(args, parser)
    _check_training(args, parser)
    _check_optimizer(args, parser)
    _check_trackers(args, parser)
    _check_folders(args, parser)
    return args


def make_parser() -> ScriptParser:
    """The flags, each with its range. What `error` of it says ends the script with 2."""
    parser = ScriptParser(
        description="Train a magnitude-preserving diffusion transformer on images. What stands in [] holds if the "
        "flag is not given.",
        formatter_class=HelpFormatter,
    )
    _add_data_arguments(parser.add_argument_group("data").add_argument)
    _add_model_arguments(parser.add_argument_group("model").add_argument)
    add_objective_arguments(parser.add_argument_group("objective").add_argument)
    _add_training_arguments(parser.add_argument_group("training").add_argument)
    _add_log_arguments(parser.add_argument_group("checkpoints, validation, logs").add_argument)
    add_hub_arguments(parser.add_argument_group("publishing").add_argument)
    return parser


def _add_data_arguments(add):
    add_source_arguments(add)
    add_encoding_arguments(add)
    add("--resolution", type=pixels, help="side of the images in pixels, after centre crop [128]")
    add("--random_flip", action="store_true", help="mirror half of the samples")
    add(
        "--vae",
        help="image autoencoder of diffusers, or a pipeline that has one, by path or Hub id; 'none' trains on pixels "
        f"[that of --pretrained_model_name_or_path, or {DEFAULT_VAE}]",
    )
    add("--encode_batch_size", type=at_least(1), default=32, help="images per forward pass of the VAE")
    add("--latents_dir", help="where encoded images are kept and found again [OUTPUT_DIR/latents]")
    add("--dataloader_num_workers", type=at_least(0), help=NUM_WORKERS_HELP)


def _add_model_arguments(add):
    add("--preset", help="XS, S, B, L or XL, a slash, and a patch size of 1, 2, 4 or 8 [S/2]")
    add(
        "--configuration",
        help="A (DiT, if --modulation is scale shift gate) to E (the paper's), or F, E with tokens bounded [F]",
    )
    add("--modulation", nargs="+", help="kinds of modulation [scale rotate gate]")
    add("--activation_fn", choices=("silu", "leaky_relu"), help="activation [silu]")
    add("--class_dropout_prob", type=share, help="share of conditions that are dropped [0.1, or the checkpoint's]")
    add("--max_magnitude", type=positive, help="largest RMS of a token after each sum [the configuration's]")
    add(
        "--pin_weight_norms",
        choices=("row", "matrix"),
        help="weights keep the norms they start with, each row or each matrix; for configurations A and B [none]",
    )
    for flag in SWITCHES:
        add(f"--{flag}", action=argparse.BooleanOptionalAction, help="overrides the configuration")
    add("--model_config_name_or_path", help="config of a model, instead of the preset and its flags")
    add(
        "--pretrained_model_name_or_path",
        help="start from the weights of this pipeline or transformer; classes of the same names keep their rows",
    )


def _add_training_arguments(add):
    add("--output_dir", type=Path, default=Path("mpdit"), help="folder of the run and of the pipeline")
    add("--dry_run", action="store_true", help="say what would be trained on what, and end without writing anything")
    add("--seed", type=seed, default=0, help="seed of the weights and of every training sample")
    add_batch_arguments(add, RECIPE_BATCH_SIZE)
    add("--max_train_steps", type=at_least(1), help="number of updates [400000, or as num_train_epochs says]")
    add("--num_train_epochs", type=positive, help="instead of max_train_steps")
    add("--learning_rate", type=positive, help="[1e-2; 1e-4 without weight normalisation]")
    add(
        "--lr_scheduler",
        default="inverse_sqrt",
        choices=("inverse_sqrt", *LR_SCHEDULERS),
        help="inverse_sqrt is the paper's; the others are those of diffusers",
    )
    add(
        "--lr_warmup_steps",
        type=at_least(0),
        help="updates of linear warm-up [max_train_steps / 150; none for constant]",
    )
    add("--lr_constant_steps", type=at_least(1), help="inverse_sqrt decays after it [max_train_steps / 10]")
    add_schedule_arguments(add)
    add(
        "--optimizer",
        default="adam",
        choices=("adam", "adamw", "muon"),
        help="muon updates the weights of the blocks, AdamW the rest, both at the learning rate",
    )
    add("--use_8bit_adam", action="store_true", help="moments of adam or adamw in 8 bits, by bitsandbytes")
    add("--adam_beta1", type=share, default=0.9, help="Adam's first decay rate")
    add("--adam_beta2", type=share, default=0.99, help="Adam's second decay rate")
    add("--adam_epsilon", type=positive, default=1e-8, help="Adam's epsilon, for rows of RMS 1")
    add(
        "--adam_weight_decay",
        type=at_least(0, float),
        default=0.0,
        help="decoupled decay of weights that are not normalised, as in configurations A and B, by adamw and muon",
    )
    add("--max_grad_norm", type=positive, help="clip gradients to this norm [no clipping]")
    add(
        "--on_non_finite",
        default="stop",
        choices=("stop", "skip"),
        help="what to do about an update whose loss or gradient is not finite, and whether a loss that has exploded "
        "stops the run; evidence goes to OUTPUT_DIR/non_finite",
    )
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="[as `accelerate config` says]")
    add("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the blocks: a wait before the first update, faster ones then [on CUDA, but for FSDP2]",
    )
    add(
        "--deterministic",
        action="store_true",
        help="the same bits in each run on one kind of GPU, by slower kernels; the CPU has them anyway",
    )
    add("--ema_stds", type=ema_width, nargs="+", default=[0.05, 0.10], help="relative widths of averages")
    add("--ema_update_steps", type=at_least(1), default=1, help="updates of the weights for each of an average")


def _add_log_arguments(add):
    add("--checkpointing_steps", type=at_least(1), default=5000, help="updates between checkpoints")
    add("--checkpoints_total_limit", type=at_least(0), default=3, help="the newest so many are kept; 0 keeps all")
    add(
        "--ema_snapshot_steps",
        type=at_least(0),
        default=0,
        help="updates between snapshots of the averages, of which reconstruct_ema.py makes other widths; 0 for none",
    )
    add("--resume_from_checkpoint", help="'latest', or a checkpoint-N folder")
    add("--validation_steps", type=at_least(0), default=5000, help="updates between validations; 0 for none")
    add(
        "--num_validation_images",
        type=at_least(0),
        help="images held out of training [256, at most one in 20]; 0 for none",
    )
    add("--num_validation_levels", type=at_least(1), default=8, help="noise levels of the validation loss")
    add("--validation_inference_steps", type=at_least(1), default=50, help="steps of the validation samples")
    add("--validation_labels", nargs="+", help="names of the classes that are sampled, or ids [the first ten]")
    add("--validation_guidance_scale", type=finite, help="guidance of the samples [pipeline's default]")
    add("--logging_steps", type=at_least(1), default=10, help="updates between log entries")
    add(
        "--record_magnitudes_steps",
        type=at_least(0),
        default=0,
        help="updates between records of magnitudes, also kept in LOGGING_DIR/magnitudes.json; 0 for none",
    )
    add(
        "--norm_watch_steps",
        type=at_least(0),
        default=50,
        help="updates between looks at norms, updates, activations and gates, with a warning where one leaves its "
        "limit; 0 for none",
    )
    add("--report_to", default="none", help="tensorboard, wandb, … or none; metrics.jsonl is always kept")
    add("--tracker_project_name", type=file_name, help="project that the tracker files the run under [train_mpdit]")
    add("--tracker_run_name", type=file_name, help="name of the run in it [the tracker's choice]")
    add("--logging_dir", default="logs", help="folder for logs inside output_dir")


def file_name(text: str) -> str:
    """A name that may become a folder, and leads to no other one."""
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise argparse.ArgumentTypeError(f"must be a name without slashes, got {text!r}")
    return text


def latents_folder(args: argparse.Namespace) -> Path:
    """Where the run keeps its encoded images."""
    return Path(args.latents_dir or args.output_dir / "latents")


def _check_data(args, parser):
    if args.train_data_dir is not None and args.dataset_name is not None:
        parser.error("give one of --train_data_dir and --dataset_name")
    index_file, index = latents_folder(args) / "index.json", {"resolution": 128}
    if index_file.is_file():
        way_out = "encode again in another folder, or take an intact copy"
        index = read_json(index_file, {}, keys=("resolution", "vae"), way_out=way_out)
    elif args.train_data_dir is None and args.dataset_name is None:
        parser.error("give one of --train_data_dir and --dataset_name, or the --latents_dir of encoded images")
    if args.train_data_dir is None and args.dataset_name is None:
        names = (
            "split",
            "class_level",
            "background",
            "image_column",
            "label_column",
            "pooled_column",
            "image_channels",
            "encode_batch_size",
        )
        names += ("max_train_samples", "skip_corrupt", "streaming")
        check_effects(parser, names, f"without a source: the images in {latents_folder(args)} are encoded already")
    check_source_effects(args, parser)
    # What encoded images were made with need not be said again.
    if args.resolution is None:
        args.resolution = index["resolution"]
    if args.vae is None and "vae" in index:
        args.vae = (index["vae"] or {"id": "none"}).get("id")
        if args.vae is None:
            parser.error(f"--vae must be given: {index_file} has no name of the VAE that encoded its images")
    elif args.vae is None and args.pretrained_model_name_or_path is None:
        args.vae = DEFAULT_VAE
    if args.vae not in (None, "none"):
        check_effects(parser, ["image_channels"], "with a VAE, which brings its own")


def _check_model(args, parser):
    """Refuse what a config would silently replace."""
    sources = ("pretrained_model_name_or_path", "model_config_name_or_path")
    given = [name for name in (*sources, *PRESET_DEFAULTS, *MODEL_FLAGS) if getattr(args, name) is not None]
    if given and given[0] in sources:
        if given[1:]:
            parser.error(f"--{given[0]} stands instead of --{', --'.join(given[1:])}: give one or the other")
    else:
        for name, default in PRESET_DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        try:
            get_preset(args.preset, args.configuration, args.modulation)
        except ValueError as error:
            parser.error(str(error).replace("`size`", "--preset").replace("`configuration`", "--configuration"))
    if args.validation_labels is not None and (not args.validation_steps or args.pooled_column is not None):
        reason = "condition vectors, which are those of held-out images" if args.validation_steps else "no validation"
        parser.error(f"--validation_labels has no meaning with {reason}")
    is_guided = args.validation_steps and args.validation_guidance_scale not in (None, 1)
    if is_guided and args.class_dropout_prob == 0:
        parser.error("--validation_guidance_scale needs dropped conditions in training, not --class_dropout_prob 0")


def _check_optimizer(args, parser):
    check_schedule(args, parser)
    if args.adam_weight_decay and args.optimizer == "adam":
        parser.error("--adam_weight_decay has no meaning for --optimizer adam: use adamw")
    if args.use_8bit_adam and args.optimizer == "muon":
        parser.error("--use_8bit_adam has no meaning for --optimizer muon: use adam or adamw")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--use_8bit_adam needs bitsandbytes, which is not installed: pip install bitsandbytes")


def _check_training(args, parser):
    if args.max_train_steps is not None and args.num_train_epochs is not None:
        parser.error("give one of --max_train_steps and --num_train_epochs")
    check_batch_arguments(args, parser, RECIPE_BATCH_SIZE)
    if args.lr_scheduler != "inverse_sqrt" and args.lr_constant_steps is not None:
        parser.error(f"--lr_constant_steps has no meaning for --lr_scheduler {args.lr_scheduler}")
    if not args.validation_steps:
        check_effects(parser, ["validation_guidance_scale", "num_validation_levels"], "with --validation_steps 0")
    if args.num_validation_images == 0:
        check_effects(parser, ["num_validation_levels"], "with --num_validation_images 0")
    check_ema_stds(args.ema_stds, parser)
    if args.max_train_steps is not None and args.ema_update_steps > args.max_train_steps:
        parser.error(
            f"--ema_update_steps must be at most --max_train_steps ({args.max_train_steps}), got "
            f"{args.ema_update_steps}"
        )
    if args.ema_snapshot_steps % args.ema_update_steps:
        parser.error(
            f"--ema_snapshot_steps must be a multiple of --ema_update_steps ({args.ema_update_steps}) or 0, got "
            f"{args.ema_snapshot_steps}"
        )


def _check_trackers(args, parser):
    for name in ("tracker_project_name", "tracker_run_name"):
        if getattr(args, name) is not None and args.report_to == "none":
            parser.error(f"--{name} has no meaning without a tracker: give --report_to")
    if args.tracker_run_name is not None and args.report_to not in ("tensorboard", *NAMES_OF_RUNS):
        parser.error(f"--tracker_run_name is for {', '.join(['tensorboard', *NAMES_OF_RUNS])}, got {args.report_to}")


def _check_folders(args, parser):
    output_dir, latents = args.output_dir.resolve(), latents_folder(args).resolve()
    logs = (output_dir / args.logging_dir).resolve()
    if not logs.is_relative_to(output_dir):
        # Elsewhere the log of another run could be taken for this one's, and be shortened.
        parser.error(f"--logging_dir must lie inside --output_dir ({args.output_dir}), got {args.logging_dir}")
    for name, folder in (("logging_dir", logs), ("latents_dir", latents)):
        parts = folder.relative_to(output_dir).parts if folder.is_relative_to(output_dir) else ("elsewhere",)
        is_taken = not parts or OF_THE_RUN.fullmatch(parts[0]) and (name, parts) != ("latents_dir", ("latents",))
        if is_taken or latents == logs:
            parser.error(f"--{name} must be a folder that the run uses for nothing else, got {getattr(args, name)}")
    # Encoded images alone are what a run leaves that stopped before its first update: nothing to lose, much to keep.
    found = [path.name for path in args.output_dir.iterdir()] if args.output_dir.is_dir() else []
    if args.resume_from_checkpoint is None and set(found) - {"latents", LOCK_NAME}:
        parser.error(
            f"--output_dir must be new or empty, {args.output_dir} is not: choose another, or go on with "
            "--resume_from_checkpoint latest"
        )
