"""Time of sampling with guidance at all noise levels, within an interval of them (arXiv 2404.07724), and nowhere.

    python benchmarks/speed/guidance_interval.py --preset S/2 --num_inference_steps 50

The three take turns in one process. Beside each time stands the number of rows that the transformer saw, relative to
full guidance: what the time would be if nothing but the transformer took any. Weights are those of initialisation,
which no time depends on. Prints Markdown; asserts nothing.
"""

import argparse
from collections.abc import Callable

import diffusers
import torch
from facts import facts_of_run, head
from timing import ratio, spread, take_turns

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, get_preset


# Noise levels of EDM2-XXL, (0.19, 1.61] for data of std 0.5, for data of std 1.
INTERVAL = (0.38, 3.22)


def make_samplers(
    pipe: MPDiTPipeline, batch_size: int, num_inference_steps: int, interval: tuple[float, float] = INTERVAL
) -> dict[str, Callable[[], object]]:
    """Functions that sample latents, by where they guide."""

    def sampler(**guidance):
        generator = torch.Generator().manual_seed(0)
        return lambda: pipe(
            list(range(batch_size)),
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type="latent",
            **guidance,
        )

    return {
        "everywhere": sampler(guidance_scale=2.0),
        "interval": sampler(guidance_scale=2.0, guidance_interval=interval),
        "nowhere": sampler(guidance_scale=1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="S/2", help="size and patch of the transformer")
    parser.add_argument("--sample_size", type=int, default=16, help="side of the latents")
    parser.add_argument("--batch_size", type=int, default=2, help="images of a call")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="steps of DDIM")
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        default=INTERVAL,
        help="noise levels; by default those of EDM2-XXL",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    transformer = MPDiTTransformer2DModel(**get_preset(arguments.preset, sample_size=arguments.sample_size)).eval()
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    pipe = MPDiTPipeline(transformer, scheduler).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    transformer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    samplers = make_samplers(
        pipe, arguments.batch_size, arguments.num_inference_steps, tuple(arguments.guidance_interval)
    )
    num_rows = {}
    for name, call in samplers.items():
        rows.clear()
        call()
        num_rows[name] = sum(rows)
        if name == "interval":
            num_guided = sum(count > arguments.batch_size for count in rows)
            num_steps = len(rows)
    times = take_turns(samplers, arguments.rounds, warmup=1)

    low, high = arguments.guidance_interval
    print("# Time of guidance\n")
    print(head(facts_of_run(arguments.device)))
    print(
        f"- {arguments.preset}, {arguments.batch_size} images of {arguments.sample_size}x{arguments.sample_size} "
        f"latents, {num_steps} steps of DDIM, float32; {num_guided} of them at noise levels in ({low:g}, {high:g}]"
    )
    print(f"- medians and quartiles of {arguments.rounds} calls, ratios within a round\n")
    print("| guidance | seconds a call | relative to everywhere | rows of the transformer, relative |")
    print("|---|---|---|---|")
    for name in samplers:
        seconds, relative = spread(times[name]), ratio(times, name, "everywhere")
        print(
            f"| {name} | {seconds['median']:.2f} | {relative['median']:.3f} ({relative['low']:.3f} to "
            f"{relative['high']:.3f}) | {num_rows[name] / num_rows['everywhere']:.3f} |"
        )


if __name__ == "__main__":
    main()
