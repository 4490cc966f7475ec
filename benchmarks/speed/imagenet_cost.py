"""What training on ImageNet costs, by arithmetic: FLOPs are counted, the share of a GPU's rate is assumed.

    python benchmarks/speed/imagenet_cost.py

Counts products of configuration E on meta tensors: nothing is computed, a second is enough. An update is a forward and
a backward, which is two more; the run is the paper's, 400 000 updates of 256 images. Prints the tables of
docs/imagenet.md.
"""

import torch
from diffusers import AutoencoderKL
from facts import table
from torch.utils.flop_counter import FlopCounterMode

from diffusers_mp import MPDiTTransformer2DModel, get_preset


NUM_TRAIN_STEPS, BATCH_SIZE, NUM_IMAGES = 400_000, 256, 1_281_167
NUM_SAMPLES, NUM_INFERENCE_STEPS = 50_000, 250
# Dense bfloat16 rates of the data sheets, FLOP/s, and the share of it that a model is taken to reach.
RATES = {"A100": 312e12, "H100 SXM": 989e12}
SHARE = 0.4


def count_flops(module: torch.nn.Module, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args, **kwargs)
    return counter.get_total_flops()


def hours(flops: float) -> list[str]:
    of_each = [flops / (SHARE * rate) / 3600 for rate in RATES.values()]
    return [f"{number:.0f}" if number >= 10 else f"{number:.2g}" for number in of_each]


def count_model(config: dict, resolution: int) -> tuple[int, int]:
    """FLOP of a forward pass of one image, and parameters."""
    model = MPDiTTransformer2DModel(**config).eval()
    forward = count_flops(
        model,
        torch.empty(1, 4, resolution // 8, resolution // 8, device="meta"),
        timestep=torch.zeros(1, dtype=torch.long, device="meta"),
        class_labels=torch.zeros(1, dtype=torch.long, device="meta"),
    )
    return forward, sum(parameter.numel() for parameter in model.parameters())


def rows_of_models():
    for resolution in (128, 256):
        for size in ("S/2", "B/2", "L/2", "XL/2"):
            config = get_preset(size, sample_size=resolution // 8, num_classes=1000, out_channels=8)
            # Blocks are all alike, so two models tell what the rest of them costs.
            one, two = (count_model({**config, "num_layers": number}, resolution) for number in (1, 2))
            forward, num_parameters = (
                with_one + (config["num_layers"] - 1) * (with_two - with_one)
                for with_one, with_two in zip(one, two, strict=True)
            )
            training = 3 * forward * NUM_TRAIN_STEPS * BATCH_SIZE
            sampling = forward * NUM_SAMPLES * NUM_INFERENCE_STEPS
            yield (
                *(f"{resolution}", size, f"{num_parameters / 1e6:.0f}"),
                *(f"{forward / 1e9:.3g}", f"{training / 1e18:.2g}", *hours(training), *hours(sampling)),
            )


def rows_of_latents():
    # The encoder of stabilityai/sd-vae-ft-mse.
    channels = (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
    ).eval()
    for resolution in (128, 256):
        flops = count_flops(vae.encoder, torch.empty(1, 3, resolution, resolution, device="meta"))
        size = 2 * 4 * 4 * (resolution // 8) ** 2 * NUM_IMAGES
        yield (
            *(f"{resolution}", f"{flops / 1e9:.3g}", *hours(flops * NUM_IMAGES)),
            *(f"{size / 2**30:.0f}", f"{2 * size / 2**30:.0f}"),
        )


def tables() -> str:
    gpus = list(RATES)
    first = ["resolution", "size", "parameters, M", "GFLOP an image", "training, EFLOP"]
    first += [f"training, {gpu} h" for gpu in gpus] + [f"FID-50K, {gpu} h" for gpu in gpus]
    second = ["resolution", "encoder, GFLOP an image", *(f"encoding, {gpu} h" for gpu in gpus)]
    second += ["latents, GiB", "with flips, GiB"]
    with torch.device("meta"):
        return f"{table(first, rows_of_models())}\n\n{table(second, rows_of_latents())}"


if __name__ == "__main__":
    print(tables())
