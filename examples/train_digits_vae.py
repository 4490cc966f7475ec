"""Train a small `AutoencoderKL` on an image folder within a time budget, for the demo's latent diffusion.

    python examples/digits.py --output_dir demo/digits
    python examples/train_digits_vae.py --train_data_dir demo/digits/train --output_dir demo/vae

Three levels make a downsampling factor of 4: a 32x32 image becomes a latent of 1x8x8. The loss is

    mean (x - decode(z))² + kl_weight · mean KL(q(z|x) ‖ N(0, 1)),      z drawn from q(z|x)

with both means taken per value, no adversarial and no perceptual term. It suits small pictures of one kind; for
photographs take a published VAE. The rate falls to zero with the steps done or the seconds spent, whichever is
further, so that a slow machine ends with a finished, if coarser, model.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm


DOWNSAMPLING_FACTOR = 4
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
# Encoding the training set for the report and saving take a second or two of the budget.
RESERVED_SECONDS = 3.0


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
    parser.add_argument("--max_train_steps", type=int, default=400, help="updates, at the most")
    parser.add_argument("--max_seconds", type=float, default=80.0, help="hard limit on the whole of main()")
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


def main(args):
    start = time.monotonic()
    if args.max_seconds <= RESERVED_SECONDS:
        raise ValueError(
            f"`max_seconds` must be above {RESERVED_SECONDS:g}, which ending takes, got {args.max_seconds:g}."
        )
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise ValueError(f"`output_dir` must be new or empty, got {args.output_dir}, which holds files.")
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = read_images(args.train_data_dir, args.in_channels).to(device)

    num_levels = len(args.block_out_channels)
    vae = AutoencoderKL(
        in_channels=args.in_channels,
        out_channels=args.in_channels,
        down_block_types=["DownEncoderBlock2D"] * num_levels,
        up_block_types=["UpDecoderBlock2D"] * num_levels,
        block_out_channels=list(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=pixels.shape[-1],
    ).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)

    budget = args.max_seconds - RESERVED_SECONDS
    step, bar_length = 0, 1000
    bar_format = "VAE {percentage:3.0f}%|{bar}| {elapsed} spent, {remaining} left{postfix}"
    with tqdm(total=bar_length, bar_format=bar_format, smoothing=0) as progress_bar:
        while True:
            progress = max(step / args.max_train_steps, (time.monotonic() - start) / budget)
            progress_bar.update(int(bar_length * min(progress, 1.0)) - progress_bar.n)
            if progress >= 1.0:
                break
            warmup = min(1.0, (step + 1) / 50)
            optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * (1 - progress)

            batch = pixels[torch.randint(len(pixels), (args.train_batch_size,))]
            posterior = vae.encode(batch).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
            reconstruction_loss = F.mse_loss(reconstruction, batch)
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            loss = reconstruction_loss + args.kl_weight * kl
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress_bar.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}", step=step, refresh=False)

    vae.eval()
    # At once, so that a folder that is there is whole.
    unfinished = args.output_dir.with_name(f"{args.output_dir.name}.unfinished")
    vae.save_pretrained(unfinished)
    if args.output_dir.exists():
        args.output_dir.rmdir()
    unfinished.rename(args.output_dir)
    mean, std, posterior_std = latent_statistics(vae, pixels)
    print(f"{step} steps, {sum(p.numel() for p in vae.parameters()):,} parameters, saved to {args.output_dir}")
    for channel in range(args.latent_channels):
        share = posterior_std[channel] / std[channel]
        print(
            f"latent channel {channel}: mean {mean[channel]:.3f}, std {std[channel]:.3f}, posterior {share:.1%} of it"
        )
    print(f"{time.monotonic() - start:.1f} s")
    return vae


if __name__ == "__main__":
    main(parse_args())
