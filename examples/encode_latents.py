"""Encode an image folder or a Hub data set once, for any number of training runs.

    python examples/encode_latents.py --train_data_dir photos --resolution 256 --random_flip --latents_dir latents
    accelerate launch examples/encode_latents.py --dataset_name somebody/images --streaming --latents_dir latents
    python examples/encode_latents.py --train_data_dir photos --list
    python examples/encode_latents.py --latents_dir latents --verify

Several processes share the shards (without accelerators: `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2`); the
folder must be one that all of them see. Killed, it goes on where it stopped when started again with the same
arguments, whatever the number of processes. The trainer takes the folder as `--latents_dir`.
"""

import argparse
import shlex

from diffusers_mp.arguments import (
    HelpFormatter,
    add_encoding_arguments,
    add_source_arguments,
    at_least,
    check_effects,
    check_paths,
    encoding_of,
    pixels,
    seed,
    source_of,
)
from diffusers_mp.scripts import ScriptParser, command_line, run_script


def make_parser() -> ScriptParser:
    parser = ScriptParser(
        description="Encode images into latents that the trainer reads.", formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--latents_dir", help="where encoded images are kept")
    add_source_arguments(add, split_help="split to encode")
    add("--seed", type=seed, default=0, help="seed of the choice of --max_train_samples")
    add_encoding_arguments(add)
    add("--resolution", type=pixels, default=128, help="side of the images in pixels, after centre crop")
    add("--random_flip", action="store_true", help="encode each image mirrored too")
    add(
        "--vae",
        default="stabilityai/sd-vae-ft-mse",
        help="image autoencoder of diffusers, or a pipeline that has one, by path or Hub id; 'none' keeps pixels",
    )
    add("--encode_batch_size", type=at_least(1), default=32, help="images per forward pass of the VAE")
    add("--shard_size", type=at_least(1), default=2048, help="images per file")
    add(
        "--dataloader_num_workers",
        type=at_least(0),
        help="threads that decode images [0 on the CPU, up to 8 on an accelerator]",
    )
    add("--list", action="store_true", help="encode nothing, print images, classes and what is left out")
    add("--verify", action="store_true", help="encode nothing, read all shards and name those that were altered")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.verify and args.list:
        parser.error("give one of --list and --verify")
    if args.latents_dir is None and not args.list:
        parser.error("--latents_dir must be given, or --list")
    if args.verify:
        check_effects(parser, sorted(parser.given - {"latents_dir", "verify", "debug"}), "with --verify")
    if args.train_data_dir is not None and args.dataset_name is not None:
        parser.error("give one of --train_data_dir and --dataset_name")
    if args.dataset_name is None:
        check_effects(parser, ["dataset_config_name"], "without --dataset_name")
    if args.max_train_samples is None:
        check_effects(parser, ["seed"], "without --max_train_samples")
    if args.vae == "none":
        check_effects(parser, ["random_flip"], "with --vae none: pixels are mirrored when they are read")
    else:
        check_effects(parser, ["image_channels"], "with a VAE, which brings its own")
    return args


def check_source(args):
    """Refuse what names nothing to encode."""
    if not args.verify and args.train_data_dir is None and args.dataset_name is None:
        raise ValueError("give one of --train_data_dir and --dataset_name, or --verify")
    check_paths(args)


if __name__ == "__main__":
    args = command_line(parse_args, make_parser())  # before the imports below, which take seconds

from accelerate import Accelerator

from diffusers_mp.data.encoding import encode_dataset, load_vae
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.data.settings import EncodingSettings
from diffusers_mp.start_block import device_warnings, device_words, start_block
from diffusers_mp.training.engine import check_processes


def main(args):
    check_source(args)
    accelerator = Accelerator()
    check_processes(accelerator, "encode everything")
    processes = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    if args.verify:
        latents = LatentDataset(args.latents_dir)
        if accelerator.is_main_process:
            latents.verify()
    else:
        dataset, id2label, report = load_image_dataset(**source_of(args))
        accelerator.print("\n".join(report.lines()))
        if args.list:
            return
        mirrored = ", each mirrored too" if args.random_flip else ""
        rows = {
            "device": device_words(accelerator),
            "encoding": f"--vae {args.vae}, {args.resolution} pixels{mirrored}",
            "output": f"{args.latents_dir}: {args.shard_size:,} images a file",
        }
        accelerator.print(start_block(rows, device_warnings(accelerator)))
        vae, settings = load_vae(args.vae, args.cache_dir), EncodingSettings(**encoding_of(args))
        vae = None if vae is None else vae.to(accelerator.device)
        latents = encode_dataset(dataset, args.latents_dir, settings, vae=vae, id2label=id2label, **processes)
    state = "unaltered" if args.verify else "encoded"
    accelerator.print(
        f"{len(latents):,} images {state} in {len(latents.index['shards']):,} shards, {args.latents_dir}, "
        f"{len(latents.index['skipped']):,} left out, content {latents.index['content_hash'][:16]}"
    )
    if not args.verify:
        flags = ["--latents_dir", args.latents_dir, *(["--random_flip"] if args.random_flip else [])]
        command = shlex.join(["python", "examples/train_mpdit.py", *flags, "--output_dir", "run"])
        accelerator.print(f"Next: {command}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, args, make_parser())
