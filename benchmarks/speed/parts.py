"""Where E, A and diffusers' DiT spend their time: what they have in common, and what is left to save.

    python benchmarks/speed/parts.py --output benchmarks/records/parts.md

The models of speed.py, turn by turn: inference and training, eager and compiled. In each round the profiler adds up
the time of a forward, or of a forward and a backward pass, in products of tokens, products of the conditioning,
attention, and all else; a training step's update, forced normalisation and averages are timed besides. Products and
attention come from the libraries under PyTorch: a model can take no less than they do. The profiler takes time itself,
mostly between kernels; ratios of whole calls are speed.py's to give. Prints medians of the rounds; asserts nothing.
"""

import argparse
import collections
import copy
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from compared import LABELS, STOCK, A, E, build_inputs, build_models, forward_of, without_gradient
from facts import facts_of_run, head
from timing import keep_memory, quiet_rounds, share_taken
from torch.profiler import ProfilerActivity, profile

from diffusers_mp import PowerFunctionEMA, normalize_weights_, parameter_groups, trust_rows_


TOKENS, CONDITIONING, ATTENTION = "products of tokens", "products of the conditioning", "attention"
KERNELS, BESIDES, OPERATORS = "compiled kernels", "copies, allocation, calls", "other operators"
ADAM, NORMALISATION, AVERAGES = "Adam", "forced normalisation", "two averages"
PARTS = (TOKENS, CONDITIONING, ATTENTION, KERNELS, BESIDES, OPERATORS, ADAM, NORMALISATION, AVERAGES)
SUMS = {"products and attention": PARTS[:3], "all": PARTS}
PRODUCTS = ("aten::mm", "aten::addmm")
MODELS = (E, A, STOCK)

Step = Callable[[], dict[str, float]]


def part_of(event, batch_size: int, compiled: bool) -> str:
    if event.key in PRODUCTS:
        of_batch = any(batch_size in shape for shape in event.input_shapes if len(shape) == 2)
        return CONDITIONING if of_batch else TOKENS
    if "attention" in event.key and event.key.startswith("aten::"):
        return ATTENTION
    if not compiled:
        return OPERATORS
    return KERNELS if event.key.startswith("graph_") else BESIDES


def profiled(function: Callable[[], object], batch_size: int, compiled: bool) -> Step:
    def step():
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            function()
        parts = collections.Counter()
        for event in profiler.key_averages(group_by_input_shape=True):
            parts[part_of(event, batch_size, compiled)] += event.self_cpu_time_total / 1000
        return parts

    return step


def inference(model: torch.nn.Module, inputs: dict, compiled: bool) -> Step:
    function = without_gradient(forward_of(copy.deepcopy(model).eval(), inputs, compiled))
    return profiled(function, len(inputs["class_labels"]), compiled)


def training(model: torch.nn.Module, inputs: dict, compiled: bool) -> Step:
    model = trust_rows_(copy.deepcopy(model).train())
    forward = forward_of(model, inputs, compiled)
    target = torch.randn_like(inputs["hidden_states"]).repeat(1, 2, 1, 1)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-4), betas=(0.9, 0.99), fused=True)
    ema = PowerFunctionEMA(model, (0.05, 0.10))
    passes = profiled(lambda: F.mse_loss(forward(), target).backward(), len(inputs["class_labels"]), compiled)

    def step():
        parts = passes()
        for part, function in (
            (ADAM, optimizer.step),
            (NORMALISATION, lambda: normalize_weights_(model)),
            (AVERAGES, lambda: ema.update(ema.step + 1)),
        ):
            start = time.perf_counter()
            function()
            parts[part] += 1000 * (time.perf_counter() - start)
        optimizer.zero_grad()
        return parts

    return step


def measure(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, str]]:
    """Milliseconds, and percent of all that A takes in the same round, of each part and sum that is not empty.

    Row to model to cell; both numbers are medians of their own.
    """
    for step in steps.values():
        for _ in range(3):
            step()
    names, order = list(steps), random.Random(0)
    counted = quiet_rounds(lambda: {name: steps[name]() for name in order.sample(names, len(names))}, rounds)
    whole = [sum(of[A].values()) for of in counted]
    table = {}
    for row, parts in {**{part: (part,) for part in PARTS}, **SUMS}.items():
        times = {name: [sum(of[name].get(part, 0.0) for part in parts) for of in counted] for name in names}
        if any(map(any, times.values())):
            shares = {
                name: [100 * time / of_A for time, of_A in zip(times[name], whole, strict=True)] for name in names
            }
            table[row] = {
                name: f"{statistics.median(times[name]):.1f} ({statistics.median(shares[name]):.1f} %)"
                for name in names
            }
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", help="as in `get_preset`")
    parser.add_argument("--sample_size", type=int, default=16, help="side of a latent of 4 channels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--no_compile", action="store_true", help="eager mode only")
    parser.add_argument("--output", type=Path, help="Markdown file; standard output by default")
    args = parser.parse_args()
    keep_memory()
    torch._inductor.config.cpp.enable_kernel_profile = True
    device = torch.device("cpu")
    models = build_models(args.size, args.sample_size, device)
    inputs = build_inputs(args.sample_size, args.batch_size, device, torch.float32)

    lines = []
    for compiled in (False,) if args.no_compile else (False, True):
        for kind, build in (("Inference", inference), ("Training step", training)):
            table = measure({name: build(models[name], inputs, compiled) for name in MODELS}, args.rounds)
            lines += ["", f"## {kind}, {'compiled' if compiled else 'eager'}", ""]
            lines += [f"| part | {' | '.join(LABELS[name] for name in MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]
            for row, cells in table.items():
                lines.append(f"| {row} | {' | '.join(cells[name] for name in MODELS)} |")
    text = f"""# Parts of a step: {args.size}, {args.batch_size} latents of 4x{args.sample_size}x{args.sample_size}

{head(facts_of_run(device))}
- medians of {args.rounds} rounds in ms, and in percent of all that A takes in the same round; freed memory kept
- taken of the processors' time by others: at most {share_taken():.1%} of a round

By the profiler, which takes time itself, mostly in the rows of calls and other operators. Products and attention come
from the libraries under PyTorch: no model that makes these products can take less. What follows from it:
[performance](../../docs/design/performance.md).
""" + "\n".join([*lines, ""])
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
