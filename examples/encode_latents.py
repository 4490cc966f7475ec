"""Encode an image folder or a Hub data set once, for any number of training runs.

    python examples/encode_latents.py --train_data_dir photos --resolution 256 --random_flip --latents_dir latents
    accelerate launch examples/encode_latents.py --dataset_name somebody/images --streaming --latents_dir latents
    python examples/encode_latents.py --latents_dir latents --verify

Several processes share the shards (without accelerators: `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2`); the
folder must be one that all of them see. Killed, it goes on where it stopped when started again with the same
arguments, whatever the number of processes. The trainer takes the folder as `--latents_dir`.
"""

import argparse

from accelerate import Accelerator
from training_arguments import HelpFormatter

from diffusers_mp.arguments import encoding_of, source_of
from diffusers_mp.data.encoding import encode_dataset, load_vae
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.data.settings import EncodingSettings
from diffusers_mp.training.engine import check_processes


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Encode images into latents that the trainer reads.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--latents_dir", required=True, help="where encoded images are kept")
    parser.add_argument("--train_data_dir", help="folder of images, one sub-folder for each class")
    parser.add_argument("--dataset_name", help="data set on the Hub, or a path `datasets.load_dataset` understands")
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--dataset_split", default="train", help="split to encode")
    parser.add_argument("--image_column", default="image", help="column of the images")
    parser.add_argument("--label_column", default="label", help="column of the class labels")
    parser.add_argument("--pooled_column", help="column of condition vectors, such as a text encoder's pooled output")
    parser.add_argument("--cache_dir", help="where `datasets` and the Hub client keep their files")
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="keep no copy of the source; until all is encoded, each restart of each process reads it from the start",
    )
    parser.add_argument("--max_train_samples", type=int, help="use this many samples only, chosen by the seed")
    parser.add_argument("--seed", type=int, default=0, help="seed of that choice")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave damaged images out instead of stopping")
    parser.add_argument("--resolution", type=int, default=128, help="side of the images in pixels, after centre crop")
    parser.add_argument("--random_flip", action="store_true", help="encode each image mirrored too")
    parser.add_argument(
        "--vae",
        default="stabilityai/sd-vae-ft-mse",
        help="AutoencoderKL, or a pipeline that has one, by path or Hub id; 'none' keeps pixels",
    )
    parser.add_argument("--image_channels", type=int, default=3, choices=(1, 3), help="with `--vae none`: grey or RGB")
    parser.add_argument("--encode_batch_size", type=int, default=32, help="images per forward pass of the VAE")
    parser.add_argument("--shard_size", type=int, default=2048, help="images per file")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="threads that decode images")
    parser.add_argument(
        "--verify", action="store_true", help="encode nothing, read all shards and name those that were altered"
    )
    return parser


def main(args):
    accelerator = Accelerator()
    check_processes(accelerator, "encode everything")
    processes = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    if args.verify:
        latents = LatentDataset(args.latents_dir)
        if accelerator.is_main_process:
            latents.verify()
    else:
        vae, settings = load_vae(args.vae, args.cache_dir), EncodingSettings(**encoding_of(args))
        settings.for_vae(vae)  # refuses what does not suit it before the data are opened
        dataset, id2label = load_image_dataset(**source_of(args))
        vae = None if vae is None else vae.to(accelerator.device)
        latents = encode_dataset(dataset, args.latents_dir, settings, vae=vae, id2label=id2label, **processes)
    state = "unaltered" if args.verify else "encoded"
    accelerator.print(
        f"{len(latents):,} images {state} in {len(latents.index['shards']):,} shards, {args.latents_dir}, "
        f"{len(latents.index['skipped']):,} left out, content {latents.index['content_hash'][:16]}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main(make_parser().parse_args())
