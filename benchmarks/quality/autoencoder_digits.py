"""Do other autoencoders than the SD VAE's kind carry a run? A KL, a DC and an RAE on digits, and a model on each.

    python benchmarks/quality/autoencoder_digits.py --output_dir autoencoder_digits

The demo's digits, judge and model, in configuration E. The KL is the demo's own (64 numbers an image); the DC has no
posterior (8 x 4 x 4, factor 8); the RAE's encoder, of width 64 with patches of 8, learns to classify the training
digits and is frozen, and its decoder learns to undo it (64 x 4 x 4). It shows that the parts fit together, and
nothing of the quality of a published RAE, whose encoder has seen a world. What a broken-off run has finished is not
done again. Prints a table; `samples_<autoencoder>.png` are to be looked at.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderRAE
from diffusers.image_processor import VaeImageProcessor
from shared import demo, facts_of_run, head, run_trainer, table
from torch import nn
from tqdm.auto import tqdm

from diffusers_mp.autoencoders import decode, encode, geometry
from diffusers_mp.data.encoding import load_vae
from diffusers_mp.data.pixels import prepare_image
from diffusers_mp.files import whole_folder, write_json


DC = {
    **{"in_channels": 1, "latent_channels": 8},
    **{"encoder_block_out_channels": [16, 32, 64, 64], "decoder_block_out_channels": [16, 32, 64, 64]},
    **{"encoder_layers_per_block": [1] * 4, "decoder_layers_per_block": [1] * 4},
    **{"encoder_qkv_multiscales": [[]] * 4, "decoder_qkv_multiscales": [[]] * 4},
}
RAE = {
    **{"encoder_type": "mae", "encoder_hidden_size": 64, "encoder_num_hidden_layers": 3},
    **{"encoder_patch_size": 8, "encoder_input_size": demo.IMAGE_SIZE, "patch_size": 8},
    **{"decoder_hidden_size": 96, "decoder_num_hidden_layers": 3, "decoder_num_attention_heads": 4},
    # Noise on tokens while the decoder learns, as RAE has it: samples of a model are not exact either.
    **{"decoder_intermediate_size": 256, "noise_tau": 0.5},
}
PATCH_SIZES = {"kl": 2, "dc": 1, "rae": 1}  # 16 tokens each


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder for everything")
    add("--autoencoders", nargs="+", choices=[*PATCH_SIZES], default=[*PATCH_SIZES])
    add("--vae_steps", type=int, default=600, help="updates of each autoencoder, and of the RAE's encoder before")
    add("--max_train_steps", type=int, default=1500, help="updates of the model on each")
    add("--guidance_scale", type=float, default=2.0, help="guidance of the samples")
    add("--num_inference_steps", type=int, default=25, help="sampling steps")
    add("--num_images_per_class", type=int, default=50, help="samples that are judged, of each digit")
    add("--seed", type=int, default=0)
    return parser.parse_args()


# Autoencoders


def pixels_of(images, num_channels):
    """As the trainer takes them in, in [-1, 1]."""
    pixels = [prepare_image(image, demo.IMAGE_SIZE, num_channels) for image in images]
    return torch.stack(pixels).float() / 127.5 - 1


def minimise(compute_loss, parameters, num_images, num_steps, seed, name):
    """AdamW on batches of 32 with the demo's schedule; `compute_loss` takes the places of the images."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    progress_bar = tqdm(range(num_steps), name)
    for step in progress_bar:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / num_steps)
        loss = compute_loss(torch.randint(num_images, (32,), generator=generator))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress_bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def train_to_reconstruct(vae, pixels, num_steps, seed, name):
    """Mean squared error, of those parameters that are not frozen."""
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]

    def loss_of(places):
        return F.mse_loss(decode(vae, encode(vae, pixels[places])["mean"]), pixels[places])

    minimise(loss_of, parameters, len(pixels), num_steps, seed, name)
    return vae.eval()


def rae_of_classifier(pixels, labels, num_steps, seed):
    """An RAE whose encoder tells the digits apart by the mean of its tokens; with the statistics of its latents."""
    rae, classifier = AutoencoderRAE(**RAE).eval(), nn.Linear(RAE["encoder_hidden_size"], 10)
    rae.encoder.requires_grad_(True)

    def loss_of(places):
        return F.cross_entropy(classifier(encode(rae, pixels[places])["mean"].mean((2, 3))), labels[places])

    parameters = [*rae.encoder.parameters(), *classifier.parameters()]
    minimise(loss_of, parameters, len(pixels), num_steps, seed, "encoder")
    with torch.no_grad():
        latents = torch.cat([encode(rae, batch)["mean"] for batch in pixels.split(128)])
    # Of each channel and position; a number that hardly varies would be blown up.
    statistics = {"latents_mean": latents.mean(0), "latents_std": latents.std(0).clamp(min=0.05)}
    weights = rae.state_dict() | {f"_{name}": values for name, values in statistics.items()}
    rae = AutoencoderRAE(**RAE, **statistics)
    rae.load_state_dict(weights)
    return rae  # whose encoder is frozen


def train_autoencoder(args, name, digits):
    """One of them, unless it is there."""
    folder = args.output_dir / name / "vae"
    if name == "kl":
        demo.train_vae(folder, digits, args.vae_steps, args.seed)
    elif not (folder / "config.json").is_file():
        torch.manual_seed(args.seed)
        if name == "dc":
            vae, pixels = AutoencoderDC(**DC), pixels_of(digits.images, 1)
        else:
            pixels = pixels_of(digits.images, 3)
            vae = rae_of_classifier(pixels, torch.from_numpy(digits.labels), args.vae_steps, args.seed)
        train_to_reconstruct(vae, pixels, args.vae_steps, args.seed, name)
        with whole_folder(folder) as unfinished:
            vae.save_pretrained(unfinished)
    return folder


@torch.no_grad()
def reconstruct(vae, images):
    """Images after one pass through an autoencoder, a posterior by its mean."""
    decoded = decode(vae, encode(vae, pixels_of(images, geometry(vae).in_channels))["mean"])
    return VaeImageProcessor().postprocess(decoded)


# Models


def train_model(args, name, vae):
    folder, model = args.output_dir / name / "model", args.output_dir / name / "model.json"
    write_json(model, {**demo.MODEL, "patch_size": PATCH_SIZES[name]})
    options = {
        "--train_data_dir": args.output_dir / "digits" / "train",
        "--vae": vae,
        "--resolution": demo.IMAGE_SIZE,
        "--latents_dir": args.output_dir / name / "latents",
        "--model_config_name_or_path": model,
        "--total_batch_size": 64,
        "--max_train_steps": args.max_train_steps,
        "--learning_rate": 3e-2,  # the demo's
        "--checkpointing_steps": max(1, args.max_train_steps // 4),
        "--checkpoints_total_limit": 1,
        "--validation_steps": 0,
        "--seed": args.seed,
    }
    run_trainer(folder, options)
    return folder


def row_of(args, name, splits):
    """What the judge says of samples of a model, and of real digits through its autoencoder."""
    folder = train_autoencoder(args, name, splits["train"])
    model = train_model(args, name, folder)
    images, sheet = demo.sample(args, model)
    sheet.save(args.output_dir / f"samples_{name}.png")
    judge, held_out, vae = demo.fit_judge(splits["judge"]), splits["held_out"], load_vae(str(folder))
    labels = np.repeat(range(10), args.num_images_per_class)
    channels, factor, *_ = geometry(vae)
    side = demo.IMAGE_SIZE // factor
    return (
        type(vae).__name__,
        f"{channels} x {side} x {side}",
        f"{demo.recognised(judge, images, labels):.1%}",
        f"{demo.recognised(judge, reconstruct(vae, held_out.images), held_out.labels):.1%}",
        f"{demo.within_class_ratio(images, labels, held_out):.2f}",
        f"{demo.nearest_training_ratio(images, labels, held_out, splits['train']):.2f}",
    )


def main():
    args, start = parse_args(), time.perf_counter()
    splits = demo.split_digits()
    demo.write_image_folder(args.output_dir / "digits" / "train", splits["train"])
    rows = [row_of(args, name, splits) for name in args.autoencoders]
    real = demo.recognised(demo.fit_judge(splits["judge"]), splits["held_out"].images, splits["held_out"].labels)
    print(head(facts_of_run()))
    columns = ("latents", "samples read as asked for", "real digits through it", "distance within a class")
    print(table(("autoencoder", *columns, "to the nearest training image"), rows))
    print(f"Real digits are read right in {real:.1%}; distances are 1 for them. Look at the samples, too.")
    print(f"seconds in all: {time.perf_counter() - start:.0f}")


if __name__ == "__main__":
    main()
