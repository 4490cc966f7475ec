"""Train a small `AutoencoderKL` on an image folder, for the demo's latent diffusion.

    python examples/digits.py --output_dir demo/digits
    python examples/train_digits_vae.py --train_data_dir demo/digits/train --output_dir demo/vae

Three levels make a downsampling factor of 4: a 32x32 image becomes a latent of 1x8x8. The loss is

    mean (x - decode(z))² + kl_weight · mean KL(q(z|x) ‖ N(0, 1)),      z drawn from q(z|x)

with both means taken per value, no adversarial and no perceptual term. It suits small images of one kind; for
photographs take a published VAE.

The result is a function of images, flags and number of threads: each update draws from a generator of (seed, update).
A run that was killed goes on from its last save, `training.pt` in `OUTPUT_DIR.unfinished`, and ends with the same VAE.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm


DOWNSAMPLING_FACTOR = 4
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
SAVING_STEPS = 50


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--train_data_dir", type=Path, required=True, help="folder of images, searched recursively")
    parser.add_argument("--output_dir", type=Path, required=True, help="new or empty folder for the VAE")
    parser.add_argument("--in_channels", type=int, choices=(1, 3), default=1, help="1: greyscale, 3: RGB")
    parser.add_argument("--latent_channels", type=int, default=1, help="channels of a latent")
    parser.add_argument(
        "--block_out_channels", type=int, nargs=3, default=(16, 32, 32), help="channels of each level, multiples of 8"
    )
    parser.add_argument("--layers_per_block", type=int, default=1, help="layers of a level")
    parser.add_argument("--kl_weight", type=float, default=1e-3, help="of the KL term in the loss")
    parser.add_argument("--train_batch_size", type=int, default=32, help="images of an update")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="after warm-up")
    parser.add_argument("--max_train_steps", type=int, default=400, help="number of updates")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and draws")
    return parser.parse_args(arguments)


def read_images(folder, in_channels):
    """Every image under `folder`, in the order of the paths.

    Args:
        folder (Path): searched recursively.
        in_channels (int): 1 converts to greyscale, 3 to RGB.
    Returns:
        torch.Tensor: values in [-1, 1], shape (N, in_channels, H, W).
    Raises:
        ValueError: no image, an unreadable image, different sizes, or a size that 4 does not divide.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(
            f"`train_data_dir` must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none in {folder}."
        )
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L" if in_channels == 1 else "RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"`train_data_dir` must hold readable images, got {path}: {error}") from error
        if any(length % DOWNSAMPLING_FACTOR for length in pixels.shape[:2]):
            raise ValueError(
                f"Image sides must be divisible by {DOWNSAMPLING_FACTOR}, got {pixels.shape[:2]} in {path}."
            )
        if images and pixels.shape != images[0].shape:
            raise ValueError(
                f"All images must have one size, got {images[0].shape[:2]} and {pixels.shape[:2]} in {path}."
            )
        images.append(pixels)
    images = torch.from_numpy(np.stack(images)).reshape(len(images), *images[0].shape[:2], in_channels)
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def latent_statistics(vae, pixels):
    """Per channel the mean and std of draws from the posterior, and the root mean square of its own std.

    Args:
        vae (AutoencoderKL): in eval mode.
        pixels (torch.Tensor): shape (N, C, H, W), values in [-1, 1].
    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: each of shape (latent channels,).
    """
    posteriors = [vae.encode(batch).latent_dist for batch in pixels.split(128)]
    means = torch.cat([posterior.mean for posterior in posteriors])
    posterior_variance = torch.cat([posterior.var for posterior in posteriors]).mean((0, 2, 3))
    return means.mean((0, 2, 3)), (means.var((0, 2, 3)) + posterior_variance).sqrt(), posterior_variance.sqrt()


def make_vae(args, sample_size):
    """A VAE with random weights, functions of the seed."""
    torch.manual_seed(args.seed)
    num_levels = len(args.block_out_channels)
    return AutoencoderKL(
        in_channels=args.in_channels,
        out_channels=args.in_channels,
        down_block_types=["DownEncoderBlock2D"] * num_levels,
        up_block_types=["UpDecoderBlock2D"] * num_levels,
        block_out_channels=list(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=sample_size,
    )


def train(args, vae, pixels, state_file):
    """All updates that `state_file` does not have yet, saved there every `SAVING_STEPS`."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    settings = {name: str(value) for name, value in sorted(vars(args).items()) if name != "output_dir"}
    first_step = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{state_file} must be of a run with the same flags, got {state['settings']} there and {settings} "
                f"here: delete {state_file.parent}, or give another `--output_dir`."
            )
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]

    progress_bar = tqdm(range(first_step, args.max_train_steps), "VAE", args.max_train_steps, initial=first_step)
    for step in progress_bar:
        generator = torch.Generator().manual_seed(args.seed * args.max_train_steps + step)
        warmup = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * (1 - step / args.max_train_steps)

        batch = pixels[torch.randint(len(pixels), (args.train_batch_size,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.mse_loss(reconstruction, batch) + args.kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress_bar.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}", refresh=False)

        if (step + 1) % SAVING_STEPS == 0:
            state = {"settings": settings, "step": step + 1}
            state |= {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            unwritten = state_file.with_name(f"{state_file.name}.unfinished")
            torch.save(state, unwritten)
            os.replace(unwritten, state_file)


def main(args):
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise ValueError(f"`output_dir` must be new or empty, got {args.output_dir}, which holds files.")
    pixels = read_images(args.train_data_dir, args.in_channels)
    vae = make_vae(args, pixels.shape[-1])
    unfinished = args.output_dir.with_name(f"{args.output_dir.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    train(args, vae, pixels, unfinished / "training.pt")

    vae.eval()
    # At once, so that a folder that is there is whole.
    vae.save_pretrained(unfinished)
    (unfinished / "training.pt").unlink(missing_ok=True)
    if args.output_dir.exists():
        args.output_dir.rmdir()
    unfinished.rename(args.output_dir)
    mean, std, posterior_std = latent_statistics(vae, pixels)
    num_parameters = sum(p.numel() for p in vae.parameters())
    print(f"{args.max_train_steps} updates, {num_parameters:,} parameters, saved to {args.output_dir}")
    for channel in range(args.latent_channels):
        share = posterior_std[channel] / std[channel]
        print(
            f"latent channel {channel}: mean {mean[channel]:.3f}, std {std[channel]:.3f}, posterior {share:.1%} of it"
        )
    return vae


if __name__ == "__main__":
    main(parse_args())
