"""Where compiled inference spends its time: what E, A and diffusers' DiT have in common, and what is left to save.

    python benchmarks/compiled_parts.py --output docs/results/compiled_parts.md

The models of speed.py, turn by turn. In each round the profiler adds up the time that a call spends in products of
tokens, products of the conditioning, attention, compiled kernels, and besides. Products and attention come from the
libraries under PyTorch: a compiled model can take no less than they do. The profiler takes time itself, mostly between
kernels; ratios of whole calls are speed.py's to give. Prints the first decile of the rounds, the least disturbed of
them; asserts nothing.
"""

import argparse
import collections
import shlex
import statistics
import sys
from pathlib import Path

import torch
import torch._inductor.config
from speed import LABELS, STOCK, A, E, build_inputs, build_models, forward_of, machine, without_gradient
from timing import keep_memory
from torch.profiler import ProfilerActivity, profile


TOKENS, CONDITIONING, ATTENTION = "products of tokens", "products of the conditioning", "attention"
KERNELS, BESIDES = "compiled kernels", "copies, allocation, calls"
PARTS = (TOKENS, CONDITIONING, ATTENTION, KERNELS, BESIDES)


def part_of(event, batch_size: int) -> str:
    if event.key in ("aten::mm", "aten::addmm"):
        rows = {shape[0] for shape in event.input_shapes if len(shape) == 2}
        return CONDITIONING if batch_size in rows else TOKENS
    if "attention" in event.key and event.key.startswith("aten::"):
        return ATTENTION
    return KERNELS if event.key.startswith("graph_") else BESIDES


def profiled(function, batch_size: int) -> dict[str, float]:
    """Milliseconds of one call by part."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    parts = collections.Counter(dict.fromkeys(PARTS, 0.0))
    for event in profiler.key_averages(group_by_input_shape=True):
        parts[part_of(event, batch_size)] += event.self_cpu_time_total / 1000
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", help="as in `get_preset`")
    parser.add_argument("--sample_size", type=int, default=16, help="side of a latent of 4 channels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--output", type=Path, help="Markdown file; standard output by default")
    args = parser.parse_args()
    keep_memory()
    torch._inductor.config.cpp.enable_kernel_profile = True
    device = torch.device("cpu")
    models = build_models(args.size, args.sample_size, device)
    inputs = build_inputs(args.sample_size, args.batch_size, device, torch.float32)
    names = [E, A, STOCK]
    functions = {name: without_gradient(forward_of(models[name].eval(), inputs, compiled=True)) for name in names}
    for function in functions.values():
        for _ in range(3):
            function()
    rounds = []
    for turn in range(args.rounds):
        first = turn % len(names)
        rounds.append({name: profiled(functions[name], args.batch_size) for name in names[first:] + names[:first]})

    command = shlex.join(["python", "benchmarks/compiled_parts.py", *sys.argv[1:]])
    facts = {**machine(device), "command": f"`{command}`"}
    rows = [*((part, (part,)) for part in PARTS), ("products and attention", PARTS[:3]), ("all", PARTS)]
    columns = {
        name: [
            statistics.quantiles([sum(map(of[name].get, parts)) for of in rounds], n=10, method="inclusive")[0]
            for _, parts in rows
        ]
        for name in names
    }
    lines = [
        f"# Parts of compiled inference: {args.size}, {args.batch_size} latents of "
        f"4x{args.sample_size}x{args.sample_size}",
        "",
        *(f"- {name}: {facts[name]}" for name in ("command", "machine", "device", "versions", "date")),
        f"- first decile of {args.rounds} rounds in ms, and in percent of all that A takes; {facts['threads']} "
        "threads, freed memory kept",
        "",
        "By the profiler, which takes time itself, mostly in the row of copies and calls. Products and attention come",
        "from the libraries under PyTorch: no model that makes these products can take less. What follows from it:",
        "[performance](../design/performance.md).",
        "",
        f"| part | {' | '.join(LABELS[name] for name in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row, (label, _) in enumerate(rows):
        cells = [f"{columns[name][row]:.1f} ({100 * columns[name][row] / columns[A][-1]:.1f} %)" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
