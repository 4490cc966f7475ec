"""Speed and memory of configuration E beside A and diffusers' DiT: the same size, the same data, turn by turn.

    make bench
    python benchmarks/speed/speed.py --size S/2 --sample_size 16 --batch_size 16 --output benchmarks/records/speed

Models: E with scale, rotation and gate, and with scale, shift and gate; F, which is E with a bound on tokens; A with
scale, shift and gate, through the same operations; diffusers' `DiTTransformer2DModel`. Gains and modulations are
drawn: nothing is zero. A training step is forward, backward, fused Adam, forced normalisation and averages of two
widths. In a round every model runs once; a ratio is the median of the ratios within a round, with its quartiles.
float32 on the CPU, bfloat16 on a CUDA device (training: autocast over float32 weights). Writes a table to OUTPUT.md
and everything to OUTPUT.json; asserts nothing.
"""

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from compared import (
    A_FUSED,
    E_FUSED,
    E_SHIFT,
    F_BOUND,
    LABELS,
    NUM_CLASSES,
    STOCK,
    A,
    E,
    build_inputs,
    build_models,
    forward_of,
    in_dtype_of,
    training_step,
    without_gradient,
)
from diffusers import AutoencoderKL, DDIMScheduler
from facts import facts_of_run, head
from imagenet_cost import count_flops
from PIL import Image
from timing import keep_memory, ratio, share_taken, spread, take_turns

from diffusers_mp import MPDiTPipeline, trust_rows_
from diffusers_mp.data.encoding import encode_dataset
from diffusers_mp.data.settings import EncodingSettings
from diffusers_mp.training import StreamBatchSampler, TrainingSamples, load_batches


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", help="as in `get_preset`")
    parser.add_argument("--sample_size", type=int, default=16, help="side of a latent of 4 channels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--num_inference_steps", type=int, default=4, help="of the pipeline, in each round")
    parser.add_argument("--num_images", type=int, default=512, help="encoded to measure the loading of latents")
    parser.add_argument("--no_compile", action="store_true", help="eager mode only")
    parser.add_argument("--keep_memory", action="store_true", help="glibc returns no freed memory to the system")
    parser.add_argument("--output", type=Path, help="where to write, without a suffix; standard output by default")
    return parser.parse_args()


def matrix_products(models, inputs) -> dict[str, tuple[Callable[[], None], int]]:
    """The products that E makes of all its tokens, and 2048 cubed: function and FLOPs by name.

    Each is repeated until it has as many FLOPs as the last: the rate of a millisecond says little of a second.
    """
    model, hidden_states = models[E], inputs["hidden_states"]
    num_tokens = hidden_states.shape[0] * (hidden_states.shape[-1] // model.config.patch_size) ** 2
    block = model.transformer_blocks[0]
    maps = {layer.weight.shape for layer in block.modules() if isinstance(layer, torch.nn.Linear)}
    maps -= {site.proj.weight.shape for site in (block.attn_modulation, block.ff_modulation)}
    products = {}
    for rows, inner, columns in [(num_tokens, *reversed(shape)) for shape in maps] + [(2048, 2048, 2048)]:
        x, weight = (torch.randn(n, inner).to(hidden_states) for n in (rows, columns))
        flops = 2 * rows * inner * columns
        repeats = max(1, round(2 * 2048**3 / flops))

        def multiply(x=x, weight=weight, repeats=repeats):
            for _ in range(repeats):
                F.linear(x, weight)

        products[f"product {rows} x {inner} x {columns}"] = multiply, repeats * flops
    return products


def measure_inference(models, inputs, compiled: bool, rounds: int) -> dict:
    models = {name: in_dtype_of(inputs, model) for name, model in models.items()}
    for name, plain in ((E_FUSED, E), (A_FUSED, A)):
        models[name] = copy.deepcopy(models[plain])
        models[name].fuse_qkv_projections()
    # On meta tensors, as the attention of a CPU is not counted.
    flops_of_E = count_flops(copy.deepcopy(models[E]).to("meta"), **{k: v.to("meta") for k, v in inputs.items()})
    products = matrix_products(models, inputs)
    functions = {name: without_gradient(forward_of(model, inputs, compiled)) for name, model in models.items()}
    functions |= {name: without_gradient(function) for name, (function, _) in products.items()}
    times = take_turns(functions, rounds)
    rates = {name: [flops / time for time in times[name]] for name, (_, flops) in products.items()}
    best = max(rates, key=lambda name: statistics.median(rates[name]))
    return {
        "flops_of_E": flops_of_E,
        "seconds": {name: spread(times[name]) for name in times},
        "ratios": {f"{name} / {over}": ratio(times, name, over) for name, over in RATIOS if name in times},
        "best_product": best,
        "matrix_rate_gflops": {name: spread([rate / 1e9 for rate in rates[name]]) for name in rates},
        "share_of_matrix_rate": {
            name: spread([flops_of_E / time / rate for time, rate in zip(times[name], rates[best], strict=True)])
            for name in (E, E_FUSED)
        },
    }


RATIOS = (
    *((E, A), (E_SHIFT, A), (A, STOCK), (E, STOCK), (E_SHIFT, STOCK), (F_BOUND, E)),
    *((E_FUSED, A_FUSED), (E_FUSED, STOCK), (A_FUSED, STOCK)),
)


def measure_training(models, inputs, compiled: bool, rounds: int) -> dict:
    device = inputs["hidden_states"].device
    autocast = contextlib.nullcontext()
    if device.type == "cuda":
        autocast = torch.autocast("cuda", dtype=torch.bfloat16)
    inputs = {**inputs, "hidden_states": inputs["hidden_states"].float()}
    target = torch.randn_like(inputs["hidden_states"]).repeat(1, 2, 1, 1)
    functions, upkeep, peaks = {}, {}, {}
    for name, model in models.items():
        model = trust_rows_(copy.deepcopy(model).train())
        forward = forward_of(model, inputs, compiled)
        functions[name], maintain = training_step(model, forward, target, autocast)
        if name == E:
            upkeep["upkeep"] = maintain
    if device.type == "cuda":
        for name, step in functions.items():
            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    times = take_turns(functions | upkeep, rounds)
    return {
        "seconds": {name: spread(times[name]) for name in times},
        "ratios": {f"{name} / {over}": ratio(times, name, over) for name, over in RATIOS if name in times},
        "upkeep_share_of_step": ratio(times, "upkeep", E),
        "peak_bytes_beyond_state": peaks,
    }


def bytes_saved(models, inputs) -> dict[str, int]:
    """Bytes that eager autograd keeps for the backward pass, weights left out."""
    saved = {}
    for name, model in models.items():
        model = trust_rows_(copy.deepcopy(model).train())
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages, alive = {}, []

        def pack(tensor, weights=weights, storages=storages, alive=alive):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**{**inputs, "hidden_states": inputs["hidden_states"].float()})
        saved[name] = sum(storages.values())
    return saved


def measure_pipeline(models, inputs, num_inference_steps: int, rounds: int) -> dict:
    """A step of guided sampling against the transformer alone on the same batch."""
    model = in_dtype_of(inputs, models[E])
    pipe = MPDiTPipeline(model, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    labels = inputs["class_labels"][: len(inputs["class_labels"]) // 2].tolist()
    bare = without_gradient(forward_of(model, inputs, compiled=False))

    def bare_steps():
        for _ in range(num_inference_steps):
            bare()

    def sample():
        pipe(labels, num_inference_steps=num_inference_steps, guidance_scale=2.0, output_type="latent")

    times = take_turns({"pipeline": sample, "transformer": bare_steps}, rounds)
    overhead = [a / b - 1 for a, b in zip(times["pipeline"], times["transformer"], strict=True)]
    return {"num_inference_steps": num_inference_steps, "overhead_per_step": spread(overhead)}


def measure_loading(num_images: int, sample_size: int, batch_size: int) -> dict:
    """Encoded posteriors to batches, as in the trainer, without workers; one epoch of it, three times."""
    generator = np.random.default_rng(0)
    resolution = 8 * sample_size
    images = [Image.fromarray(generator.integers(0, 256, (resolution, resolution, 3), np.uint8)) for _ in range(64)]
    table = datasets.Dataset.from_dict({"image": images, "label": list(range(64))}).cast_column(
        "image", datasets.Image(decode=False)
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        table = datasets.concatenate_datasets([table] * (num_images // 64))
        names = dict(enumerate(map(str, range(64))))
        latents = encode_dataset(table, folder, EncodingSettings(resolution), vae=vae, id2label=names)
        samples = TrainingSamples(latents, seed=0, num_classes=NUM_CLASSES, class_dropout_prob=0.1)

        def epoch():
            sampler = StreamBatchSampler(
                len(samples), seed=0, train_batch_size=batch_size, max_train_steps=len(samples) // batch_size
            )
            for _ in load_batches(samples, sampler, torch.device("cpu")):
                pass

        times = take_turns({"epoch": epoch}, 3, warmup=1)["epoch"]
    return {"images_per_second": spread([len(samples) // batch_size * batch_size / time for time in times])}


def measure_import(rounds: int) -> dict[str, float]:
    program = (
        "import time, torch; start = time.perf_counter(); from diffusers_mp import MPLinear; "
        "print(time.perf_counter() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
        for _ in range(rounds + 1)
    ]
    return spread(seconds[1:])


def ratio_row(what: str, name: str, over: str, target: float | None = None, compiled: bool = False) -> tuple:
    return (
        f"{what}, {LABELS[name]} / {LABELS[over]}{', compiled' if compiled else ''}",
        target,
        (what.split()[0], "compiled" if compiled else "eager", "ratios", f"{name} / {over}"),
    )


# What a row of the table says, the target of this package's own for it (S/2, CPU), and where it lies in the results.
ROWS = [
    ratio_row("inference", E, A, 1.03),
    ratio_row("inference", E_SHIFT, A),
    ratio_row("inference", F_BOUND, E),
    ratio_row("inference", E_FUSED, A_FUSED, 1.03),
    ratio_row("inference", A, STOCK),
    ratio_row("inference", A_FUSED, STOCK),
    ratio_row("inference", E, STOCK, 0.85),
    ratio_row("inference", E_FUSED, STOCK, 0.85),
    ratio_row("inference", E, A, 0.97, compiled=True),
    ratio_row("inference", E_SHIFT, A, compiled=True),
    ratio_row("inference", F_BOUND, E, compiled=True),
    ratio_row("inference", E_FUSED, A_FUSED, 0.97, compiled=True),
    ratio_row("inference", A, STOCK, 0.95, compiled=True),
    ratio_row("inference", A_FUSED, STOCK, 0.95, compiled=True),
    ratio_row("inference", E, STOCK, 0.85, compiled=True),
    ratio_row("inference", E_FUSED, STOCK, 0.85, compiled=True),
    ratio_row("training step", E, A, 1.03),
    ratio_row("training step", E_SHIFT, A),
    ratio_row("training step", F_BOUND, E),
    ratio_row("training step", E, STOCK),
    ratio_row("training step", E, A, 1.00, compiled=True),
    ratio_row("training step", E_SHIFT, A, compiled=True),
    ratio_row("training step", F_BOUND, E, compiled=True),
    ratio_row("training step", E, STOCK, compiled=True),
    ("forced normalisation and two averages, share of a step", 0.04, ("training", "eager", "upkeep_share_of_step")),
    ("pipeline's overhead on a step of the bare transformer", 0.03, ("pipeline", "overhead_per_step")),
    ("seconds of `from diffusers_mp import MPLinear` after `import torch`", 0.1, ("import_seconds",)),
]


LEGEND = """\
Ratios of time: below 1 is faster. E is magnitude preserving, with rotation unless it says shift; A is DiT in this
package, with shift; diffusers' DiT has their depth and width, and more parameters, since each of its blocks embeds
time and class anew. A share of the matrix rate is that of the fastest matrix product, measured in the same rounds.
Bytes are what eager autograd keeps, beside the weights. What the targets are, and why some are missed:
[performance](../../docs/design/performance.md).
"""


def table(results: dict) -> str:
    lines = ["| what | median | quartiles | target |", "|---|---|---|---|"]
    # Targets were set for one size, on a CPU.
    facts = [results[name] for name in ("size", "batch_size", "latent", "device")]
    has_targets = facts == ["S/2", 16, [4, 16, 16], "CPU"]

    def add(what, value, target="", digits=3):
        numbers = [f"{value[key]:.{digits}f}" for key in ("median", "low", "high")]
        target = target if has_targets else ""
        lines.append(f"| {what} | {numbers[0]} | {numbers[1]} – {numbers[2]} | {target} |")

    for what, target, path in ROWS:
        value = results
        for key in path:
            value = value.get(key, {})
        if value:
            add(what, value, "" if target is None else f"≤ {target:.2f}")
    for mode, of_mode in results["inference"].items():
        best = of_mode["best_product"]
        add(f"matrix rate beside {mode} inference, {best}, GFLOP/s", of_mode["matrix_rate_gflops"][best], digits=0)
        for name, share in of_mode["share_of_matrix_rate"].items():
            add(f"{name}, {mode} inference, share of it", share, "≥ 0.90" if (name, mode) == (E, "compiled") else "")
    saved = results["bytes_saved_for_backward"]
    target = "≤ 1.00" if has_targets else ""
    for name in (E, E_SHIFT, F_BOUND):
        lines.append(f"| bytes kept for backward, {name} / A | {saved[name] / saved[A]:.3f} | exact | {target} |")
    add("latents loaded, images/s, one process", results["loading"]["images_per_second"], digits=0)
    consumed = results["batch_size"] / results["training"]["eager"]["seconds"][E]["median"]
    lines.append(f"| latents that training of E consumes, images/s, eager | {consumed:.0f} | | |")
    return "\n".join(lines)


def main():
    args = parse_args()
    if args.keep_memory:
        keep_memory()
    # Ten compiled models share the code of a forward pass; beyond this number PyTorch gives up.
    torch._dynamo.config.recompile_limit = 32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = build_models(args.size, args.sample_size, device)
    inputs = build_inputs(args.sample_size, args.batch_size, device, dtype)
    results = {
        **facts_of_run(device),
        "size": args.size,
        "batch_size": args.batch_size,
        "latent": [4, args.sample_size, args.sample_size],
        "rounds": args.rounds,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "import_seconds": measure_import(min(args.rounds, 5)),
        "bytes_saved_for_backward": bytes_saved(models, inputs),
        "pipeline": measure_pipeline(models, inputs, args.num_inference_steps, args.rounds),
        "loading": measure_loading(args.num_images, args.sample_size, args.batch_size),
        "inference": {},
        "training": {},
    }
    for mode in ("eager",) if args.no_compile else ("eager", "compiled"):
        for kind, measure in (("inference", measure_inference), ("training", measure_training)):
            print(f"{kind}, {mode}", file=sys.stderr, flush=True)
            results[kind][mode] = measure(models, inputs, mode == "compiled", args.rounds)
    results["share_taken"] = share_taken()
    text = (
        f"# Speed of {args.size}, {args.batch_size} latents of 4x{args.sample_size}x{args.sample_size}"
        f"{', freed memory kept' if args.keep_memory else ''}\n\n"
        f"{head(results)}\n- {args.rounds} rounds; medians of the ratios within a round\n"
        f"- taken of the processors' time by others: at most {results['share_taken']:.1%} of a round\n\n"
        f"{LEGEND}\n"
        f"{table(results)}\n"
    )
    if args.output is None:
        print(text)
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
