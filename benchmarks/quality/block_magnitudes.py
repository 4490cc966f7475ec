"""Magnitude of the tokens after each block at initialisation, configurations E and A side by side.

    python benchmarks/quality/block_magnitudes.py --sizes S/2 XL/2

Gaussian latents of 4x16x16, random timesteps and classes, every gain at 0 as at the start of training. Five more
columns say why tokens of E lose magnitude, as means over the seeds: what attention and feed-forward return relative
to what they are given, the share of the tokens' magnitude that is common to all tokens of a sample, E when each token
attends to itself alone, so that attention averages nothing, and E with leaky ReLU in place of SiLU in its
feed-forwards. Prints Markdown; asserts nothing.
"""

import argparse

import torch
from shared import facts_of_run, head, table

from diffusers_mp import MPDiTTransformer2DModel, MPLeakyReLU, functional, get_preset
from diffusers_mp.blocks import MPDiTAttnProcessor


LATENT_SHAPE = (4, 16, 16)


class SelfOnlyAttnProcessor:
    """Every token takes its own value and no other: the maps of attention without its average."""

    def __call__(self, attn, hidden_states):
        return attn.to_out[0](attn.to_v(hidden_states))


@torch.no_grad()
def block_magnitudes(model: MPDiTTransformer2DModel, batch_size: int = 8, seed: int = 0) -> list[dict[str, float]]:
    """Run one batch of Gaussian latents and measure every block.

    Args:
        model (MPDiTTransformer2DModel): a model for latents of 4 channels.
        batch_size (int): number of latents.
        seed (int): seed of the latents, timesteps and classes.
    Returns:
        list of dict: for each block the magnitude of the tokens after it (`output`), of what its branches return
        relative to what they are given (`attention`, `feed_forward`), and of the mean token of a sample relative to
        the tokens (`common`).
    """
    measured: list[dict[str, float]] = [{} for _ in model.transformer_blocks]

    def record(numbers: dict[str, float], name: str, relative: bool):
        def hook(module, inputs, output):
            numbers[name] = functional.magnitude(output).item()
            if relative:
                numbers[name] /= functional.magnitude(inputs[0]).item()
            else:
                numbers["common"] = functional.magnitude(output.mean(dim=1)).item() / numbers[name]

        return hook

    handles = []
    for block, numbers in zip(model.transformer_blocks, measured, strict=True):
        handles.append(block.register_forward_hook(record(numbers, "output", relative=False)))
        handles.append(block.attn.register_forward_hook(record(numbers, "attention", relative=True)))
        handles.append(block.ff.register_forward_hook(record(numbers, "feed_forward", relative=True)))
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, *LATENT_SHAPE, generator=generator)
    timestep = torch.randint(0, 1000, (batch_size,), generator=generator)
    class_labels = torch.randint(0, model.config.num_classes, (batch_size,), generator=generator)
    model(latents, timestep, class_labels)
    for handle in handles:
        handle.remove()
    return measured


def measure_size(size: str, seeds: list[int], batch_size: int) -> list[dict[str, float]]:
    """One row of numbers for each block: E and A for each seed, the rest as means over the seeds."""
    rows: list[dict[str, float]] = []
    for seed in seeds:
        results = {}
        for configuration in ("E", "A"):
            torch.manual_seed(seed)
            model = MPDiTTransformer2DModel(**get_preset(size, configuration)).eval()
            results[configuration] = block_magnitudes(model, batch_size, seed)
            if configuration == "E":
                model.set_attn_processor(SelfOnlyAttnProcessor())
                results["self"] = block_magnitudes(model, batch_size, seed)
                model.set_attn_processor(MPDiTAttnProcessor())
                for block in model.transformer_blocks:
                    block.ff.act = MPLeakyReLU()
                results["leaky"] = block_magnitudes(model, batch_size, seed)
            del model
        if not rows:
            rows = [dict.fromkeys(("attention", "feed_forward", "common", "self", "leaky"), 0.0) for _ in results["E"]]
        for index, row in enumerate(rows):
            row[f"E{seed}"] = results["E"][index]["output"]
            row[f"A{seed}"] = results["A"][index]["output"]
            for name in ("attention", "feed_forward", "common"):
                row[name] += results["E"][index][name] / len(seeds)
            row["self"] += results["self"][index]["output"] / len(seeds)
            row["leaky"] += results["leaky"][index]["output"] / len(seeds)
    return rows


def table_of(rows: list[dict[str, float]], seeds: list[int]) -> str:
    columns = {
        **{f"E{seed}": f"E, seed {seed}" for seed in seeds},
        **{f"A{seed}": f"A, seed {seed}" for seed in seeds},
        "attention": "E: attention, out / in",
        "feed_forward": "E: feed-forward, out / in",
        "common": "E: common to all tokens",
        "self": "E, no averaging",
        "leaky": "E, leaky ReLU",
    }
    return table(
        ("block", *columns.values()),
        [(index, *(f"{row[key]:.3f}" for key in columns)) for index, row in enumerate(rows, start=1)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S/2", "XL/2"], help="presets, such as S/2 XL/2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--batch_size", type=int, default=8, help="latents for each seed")
    arguments = parser.parse_args()

    print("# Magnitude after each block at initialisation\n")
    print(head(facts_of_run()))
    print(f"- {arguments.batch_size} Gaussian latents of {'x'.join(map(str, LATENT_SHAPE))} for each seed, gains at 0")
    for size in arguments.sizes:
        print(f"\n## {size}\n")
        print(table_of(measure_size(size, arguments.seeds, arguments.batch_size), arguments.seeds), flush=True)


if __name__ == "__main__":
    main()
