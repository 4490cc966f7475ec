"""What each trick of docs/design/performance.md is worth: the formula and what stands in its place.

    python benchmarks/speed/operations.py

Tensors of S/2 with 16 latents of 4x16x16: 1024 tokens of 384 channels, 6 heads. "inference" is a forward without
gradient, "forward" one with, "backward" gives all gradients; each comes after a matrix product, as in a model, which
leaves the caches full of other things. Both take turns; times are medians in microseconds, the ratio is the median of
the ratios within a round. The second table leaves parts of E out of whole steps, whose operators are counted. Prints
Markdown; asserts nothing.
"""

import argparse
import contextlib
import copy
import functools
import math
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from compared import A, E, build_inputs, build_models
from facts import facts_of_run, head
from timing import ratio, spread, take_turns
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_mp import (
    MPDiTTransformer2DModel,
    MPEmbedding,
    MPLinear,
    PowerFunctionEMA,
    functional,
    fused,
    get_preset,
    normalize_weights_,
    trust_rows_,
)
from diffusers_mp.averages.ema import power_function_decay


B, N, D, H = 16, 64, 384, 6


def gated(module):
    return lambda x, branch, gate: module.gated_sum(x, branch, gate, 0.3)


def modulated(module):
    return lambda x, scale, angle: module.modulate(x, scale=scale, angle=angle)


OPERATIONS = {
    # name: (formula, in its place, shapes of the inputs)
    "queries to RMS 1": (functional.unit_magnitude, fused.unit_magnitude, [(B, N, H, D // H)]),
    "scale and rotation": (modulated(functional), modulated(fused), [(B, N, D), (B, 1, D), (B, 1, D // 2)]),
    "gate and MP sum": (gated(functional), gated(fused), [(B, N, D), (B, N, D), (B, 1, D)]),
    "unit rows of D x 4 D: normalised": (functional.unit_norm, fused.unit_norm, [(4 * D, D)]),
    "unit rows of D x 4 D: trusted": (functional.unit_norm, fused.unit_rows, [(4 * D, D)]),
}


def compare(
    before: Callable[..., object],
    after: Callable[..., object],
    rounds: int,
    prepare: Callable[[str], object] | None = None,
) -> tuple[float, float, float]:
    times = take_turns({"before": before, "after": after}, rounds, prepare=prepare)
    return (
        *(spread(times[name])["median"] * 1e6 for name in ("before", "after")),
        ratio(times, "after", "before")["median"],
    )


def rows_of_operations(rounds: int):
    tokens, weight = torch.randn(B * N, D), torch.randn(4 * D, D) / math.sqrt(D)
    for name, (plain, ours, shapes) in OPERATIONS.items():
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        grad = torch.randn_like(plain(*inputs))

        def forward(turn, plain=plain, ours=ours, inputs=inputs):
            return (plain if turn == "before" else ours)(*inputs)

        def prepare(turn, forward=forward, backward=False):
            output = forward(turn) if backward else turn
            F.linear(tokens, weight)
            return output

        def backward(output, inputs=inputs, grad=grad):
            torch.autograd.grad(output, inputs, grad)

        with torch.no_grad():
            yield f"{name}, inference", *compare(forward, forward, rounds, prepare)
        yield f"{name}, forward", *compare(forward, forward, rounds, prepare)
        yield f"{name}, backward", *compare(backward, backward, rounds, functools.partial(prepare, backward=True))

    def feed(inplace):
        # With the map: what is overwritten has to be new each time.
        return functional.mp_silu(F.linear(tokens, weight), inplace=inplace)

    with torch.no_grad():
        yield "map to 4 D and MP SiLU, inference, in place", *compare(lambda: feed(False), lambda: feed(True), rounds)


def rows_of_upkeep(rounds: int):
    model = MPDiTTransformer2DModel(**get_preset("S/2", num_classes=1000, out_channels=8)).train()
    layers = [module for module in model.modules() if isinstance(module, (MPLinear, MPEmbedding))]

    @torch.no_grad()
    def normalise_one_by_one():
        for layer in layers:
            norm = torch.linalg.vector_norm(layer.weight, dim=-1, keepdim=True) / layer.row_norm
            settled = ((norm - 1).abs() <= 4e-6) | (norm == 0)
            layer.weight.copy_(layer.weight / norm.masked_fill(settled, 1))

    @torch.no_grad()
    def read_and_write():
        for layer in layers:
            layer.weight.mul_(1.0)

    yield "forced normalisation", *compare(normalise_one_by_one, lambda: normalize_weights_(model), rounds)
    yield (
        "forced normalisation beside reading and writing all rows once",
        *compare(read_and_write, lambda: normalize_weights_(model), rounds),
    )

    ema = PowerFunctionEMA(model, (0.05, 0.10))
    averages = [[parameter.detach().clone() for parameter in model.parameters()] for _ in ema.stds]
    current = [parameter.detach() for parameter in model.parameters()]

    def width_by_width():
        for std, of_std in zip(ema.stds, averages, strict=True):
            torch._foreach_lerp_(of_std, current, 1 - power_function_decay(max(ema.step, 1), std))

    yield "averages of two widths", *compare(width_by_width, lambda: ema.update(ema.step + 1), rounds)


# What E does and A does not, and what a step would be like without: no longer E, but as long as E would take at best.
WITHOUT = {
    "gradients of rows projected": (fused, "unit_rows", lambda weight: weight),
    "rotation": (fused, "modulate", lambda x, scale, angle: x * (1 + scale)),
    "queries and keys to RMS 1": (fused, "unit_magnitude", lambda x: x),
    "SiLU's constant": (functional, "mp_silu", lambda x, inplace: F.silu(x)),
}


class CountedOperators(TorchDispatchMode):
    """How many operators run, and how many bytes they read and write; views move none."""

    number, num_bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        result = function(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in function._schema.returns]
        if not aliases or any(alias is None or alias.is_write for alias in aliases):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return result


def rows_of_steps(size: str, rounds: int):
    """Forward and backward beside those of A, whole and with parts of E left out; operators and ratios of each."""
    torch.manual_seed(0)
    models = build_models(size, 16, torch.device("cpu"))
    inputs = build_inputs(16, B, torch.device("cpu"), torch.float32)
    variants = {"A": [], "whole": [], **{f"without: {name}": [part] for name, part in WITHOUT.items()}}
    variants["without all four"] = list(WITHOUT.values())

    def step_of(name):
        model, stand_ins = trust_rows_(copy.deepcopy(models[A if name == "A" else E]).train()), variants[name]

        def step():
            with contextlib.ExitStack() as stack:
                for module, function, stand_in in stand_ins:
                    stack.enter_context(mock.patch.object(module, function, stand_in))
                model(**inputs).sample.square().mean().backward()
            model.zero_grad()

        return step

    steps = {name: step_of(name) for name in variants}
    times = take_turns(steps, rounds)
    for name, step in steps.items():
        with CountedOperators() as counted:
            step()
        of_both = ratio(times, name, "A")
        yield name, counted.number, of_both["median"], of_both["low"], of_both["high"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--size", default="S/2", help="of the models whose steps are timed")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{head(facts_of_run())}\n")
    print("| what | formula, µs | now, µs | ratio |\n|---|---|---|---|")
    for name, before, after, of_both in (*rows_of_operations(args.rounds), *rows_of_upkeep(max(args.rounds // 5, 3))):
        print(f"| {name} | {before:.0f} | {after:.0f} | {of_both:.2f} |")
    print("\n| forward and backward of E, eager | operators | over A's time | quartiles |\n|---|---|---|---|")
    for name, operators, median, low, high in rows_of_steps(args.size, max(args.rounds // 5, 3)):
        print(f"| {name} | {operators} | {median:.3f} | {low:.3f} – {high:.3f} |")


if __name__ == "__main__":
    main()
