"""Parts of the run that need models alone: their speed and memory, FSDP2, sampling."""

import functools
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from compared import (
    F_BOUND,
    LABELS,
    STOCK,
    A,
    E,
    build_inputs,
    build_models,
    config_of,
    training_step,
    without_gradient,
)
from diffusers import DDIMScheduler
from guidance_interval import INTERVAL, make_samplers
from timing import ratio, spread, take_turns
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffusers_mp import MPDiTPipeline, trust_rows_


MODELS = (E, F_BOUND, A, STOCK)
RATIOS = [(LABELS[name], LABELS[over]) for name, over in ((E, A), (E, STOCK), (F_BOUND, E))]
# Outputs of a kind of modulation, in widths of the model.
WIDTHS = {"scale": 1, "shift": 1, "rotate": 0.5, "gate": 1}
# Without which a measurement does not begin; most is compilation.
SECONDS = {
    ("training step", "eager"): 20,
    ("inference", "eager"): 10,
    ("training step", "compiled"): 90,
    ("inference", "compiled"): 45,
}
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}


def xl2(run) -> None:
    """E, F, A and diffusers' DiT at the size of DiT-XL/2 and 256 tokens."""
    speed(run, "XL/2", 32, 64, ("eager", "compiled"))


def b2(run) -> None:
    """The same at B/2 and 64 tokens, where starting kernels takes more of the time."""
    speed(run, "B/2", 16, 256, ("eager",))


def b2_compiled(run) -> None:
    """What `b2` leaves to the end, since compilation takes minutes."""
    speed(run, "B/2", 16, 256, ("compiled",))


def speed(run, size: str, sample_size: int, batch_size: int, modes: tuple[str, ...]) -> None:
    """Training and inference in each of the modes, eager or compiled: a table each."""
    size, sample_size, batch_size = ("XS/2", 8, 2) if run.tiny else (size, sample_size, batch_size)
    num_tokens = (sample_size // 2) ** 2
    options = run, size, sample_size, batch_size
    configs = {LABELS[name]: config_of(name, size, sample_size, **overrides(run)) for name in MODELS}
    flops = {name: batch_size * forward_flops(config, num_tokens) for name, config in configs.items()}
    matrix_rate(run)
    release(run)
    for mode in modes:
        if mode == "compiled":
            run.record["facts"]["derivatives of rows, compiled"] = derivatives_of_rows()
        for kind, make, num_passes in (("training step", training, 3), ("inference", inference, 1)):
            table = f"{size}, {num_tokens} tokens, {batch_size} images: {kind}, {mode}"
            if run.has_time(table, SECONDS[kind, mode]):
                makers = {LABELS[name]: functools.partial(make, *options, name, mode) for name in MODELS}
                with run.going_on(table):
                    measure(run, table, makers, RATIOS, {name: num_passes * n for name, n in flops.items()})
        if mode == "compiled":
            # Of one class no more than eight versions are compiled.
            torch.compiler.reset()


def fsdp2(run) -> None:
    """A training under FSDP2 in one process beside one without: losses, time and memory."""
    size, sample_size, batch_size = ("XS/2", 8, 2) if run.tiny else ("B/2", 16, 256)
    table = f"FSDP2 in one process: {size}, {(sample_size // 2) ** 2} tokens, {batch_size} images"
    options = run, size, sample_size, batch_size, E, "eager"
    dist.init_process_group("nccl" if run.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(run.device, (1,))
        makers = {
            "E": functools.partial(training, *options),
            "E, sharded": functools.partial(training, *options, shard=functools.partial(shard, mesh=mesh)),
        }
        for name, make in makers.items():
            step = make()
            losses = [step().item() for _ in range(3)]
            run.row(table, name, **{f"loss_{number}": f"{loss:.6f}" for number, loss in enumerate(losses, 1)})
        measure(run, table, makers, [("E, sharded", "E")])
    finally:
        dist.destroy_process_group()


def sampling(run) -> None:
    """Images a second of the pipeline, by where it guides."""
    size, sample_size, batch_size, num_steps = ("XS/2", 8, 2, 4) if run.tiny else ("XL/2", 32, 32, 50)
    model = build(run, size, sample_size, E).eval().to(torch.bfloat16)
    pipe = MPDiTPipeline(model, DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    samplers = make_samplers(pipe, batch_size, num_steps)
    times = take_turns(samplers, rounds_of(run, samplers, 15.0), warmup=0)
    table = (
        f"Sampling: E, {size}, {(sample_size // 2) ** 2} tokens, {batch_size} images, {num_steps} steps of DDIM, bf16"
    )
    names = {
        "everywhere": "guidance everywhere",
        "interval": f"at noise levels in ({INTERVAL[0]:g}, {INTERVAL[1]:g}]",
        "nowhere": "nowhere",
    }
    for name, what in names.items():
        rates = spread([batch_size / seconds for seconds in times[name]])
        run.row(table, what, images_a_second=rates, relative_time=ratio(times, name, "everywhere"))


# What is measured


def build(run, size: str, sample_size: int, name: str) -> nn.Module:
    return build_models(size, sample_size, torch.device(run.device), (name,), **overrides(run))[name]


def overrides(run) -> dict[str, int]:
    return TINY if run.tiny else {}


def training(run, size, sample_size, batch_size, name, mode, shard: Callable[[nn.Module], object] | None = None):
    """A training step of a new model, as a function that returns the loss."""
    model = trust_rows_(build(run, size, sample_size, name).train())
    if shard is not None:
        shard(model)
    inputs = build_inputs(sample_size, batch_size, torch.device(run.device), torch.float32)
    target = inputs["hidden_states"].repeat(1, 2, 1, 1)
    compile_blocks(run, model, mode)
    autocast = torch.autocast(run.device, torch.bfloat16)
    return training_step(model, lambda: model(**inputs, return_dict=False)[0], target, autocast)[0]


def inference(run, size, sample_size, batch_size, name, mode):
    """A forward pass of a new model in bf16, as a function."""
    model = build(run, size, sample_size, name).eval().to(torch.bfloat16)
    inputs = build_inputs(sample_size, batch_size, torch.device(run.device), torch.bfloat16)
    compile_blocks(run, model, mode)
    return without_gradient(lambda: model(**inputs, return_dict=False)[0])


def compile_blocks(run, model: nn.Module, mode: str) -> None:
    """As diffusers' `compile_repeated_blocks`, for which its own DiT has no list of blocks."""
    # A rehearsal leaves out the code generator.
    backend = "inductor" if run.device == "cuda" else "aot_eager"
    for block in model.transformer_blocks if mode == "compiled" else ():
        block.compile(fullgraph=True, dynamic=False, backend=backend)


def derivatives_of_rows() -> str:
    """How compiled training gets them: by hand, unless torch says that it exports whenever it compiles."""
    says_so = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")
    return "by autograd, as this torch takes compilation for an export" if says_so(torch.zeros(1)) else "by hand"


def shard(model: nn.Module, mesh) -> None:
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def forward_flops(config: Mapping[str, Any], num_tokens: int) -> float:
    """FLOPs of the matrix products of one image's forward pass, attention among them: two for a multiplication.

    Args:
        config (mapping): of an `MPDiTTransformer2DModel`, or of diffusers' DiT, each of whose blocks embeds time and
            class, and whose output does so again.
        num_tokens (int): of the image.
    """
    width, depth = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    pixels, is_ours = config["patch_size"] ** 2, "modulation" in config
    embedding = 256 * width + width**2
    kinds = config["modulation"] if is_ours else ("scale", "shift", "gate")
    in_block = 2 * sum(WIDTHS[kind] for kind in kinds)
    in_output = in_block / 2 - WIDTHS["gate"] * ("gate" in kinds)
    of_patches = (
        pixels * (config["in_channels"] + config["out_channels"]) + is_ours
    )  # the constant 1 of `MPPatchEmbed`
    of_tokens = num_tokens * (12 * depth * width**2 + of_patches * width) + 2 * depth * num_tokens**2 * width
    of_image = (1 if is_ours else depth + 1) * embedding + (depth * in_block + in_output) * width**2
    return 2 * (of_tokens + of_image)


# How


def matrix_rate(run) -> float:
    """FLOP/s of a large bf16 product; measured once, with a row for it and one for the rate of the memory."""
    if run.matrix_rate is None:
        size = 256 if run.tiny else 8192
        left, right = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.randn(8, size, size, device=run.device)
        target = torch.empty_like(source)
        functions = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
        times = take_turns(functions, rounds_of(run, functions, 1.0), warmup=0)
        rates = [2 * size**3 / seconds for seconds in times["product"]]
        run.matrix_rate = spread(rates)["median"]
        run.row("Rates", f"bf16 product, {size} cubed, TFLOP/s", rate=spread([rate / 1e12 for rate in rates]))
        moved = 2 * source.nbytes / 1e9
        run.row("Rates", f"copy, {moved:.2g} GB, GB/s", rate=spread([moved / seconds for seconds in times["copy"]]))
    return run.matrix_rate


def measure(
    run,
    table: str,
    makers: Mapping[str, Callable[[], Callable[[], object]]],
    ratios: list[tuple[str, str]],
    flops: Mapping[str, float] | None = None,
) -> None:
    """Rows of a table: functions that take turns, and ratios of their times.

    Each is made, and called twice, alone: that compiles it, and shows what it holds and takes. One that does not fit
    beside those before it, or fails, has a row that says so, and the others go on.

    Args:
        makers (mapping): name to what makes the function.
        ratios (list): pairs of names.
        flops (mapping, optional): of a call, by name.
    """
    functions, columns = {}, {}
    for name, make in makers.items():
        try:
            functions[name], columns[name] = alone(run, make)
        except torch.OutOfMemoryError:
            run.row(table, name, ms="out of memory")
        except Exception as error:
            run.row(table, name, ms="failed")
            run.failure(f"{table}: {name}", f"{type(error).__name__}: {error}")
        release(run)
    times = take_turns(functions, rounds_of(run, functions, 10.0), warmup=0) if functions else {}
    for name, of_name in times.items():
        shares = {}
        if flops is not None:
            shares["share_of_the_product"] = spread([flops[name] / seconds / matrix_rate(run) for seconds in of_name])
        run.row(table, name, ms=spread([1000 * seconds for seconds in of_name]), **shares, **columns[name])
    for name, over in ratios:
        if name in times and over in times:
            run.row(table, f"{name} / {over}", ratio=ratio(times, name, over))
    functions.clear()
    release(run)


def alone(run, make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], dict[str, float]]:
    """A new function, the seconds of its first call, and the GiB of what it holds with the most that a call adds."""
    before = allocated(run)
    function = make()
    start = time.perf_counter()
    function()
    if run.device == "cpu":
        return function, {"first_call_s": time.perf_counter() - start}
    torch.cuda.synchronize()
    seconds, held = time.perf_counter() - start, allocated(run)
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    return function, {"GiB": gib, "of_it_held": (held - before) / 2**30, "first_call_s": seconds}


def allocated(run) -> int:
    return torch.cuda.memory_allocated() if run.device == "cuda" else 0


def release(run) -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()


def rounds_of(run, functions: Mapping[str, Callable[[], object]], seconds: float) -> int:
    """How many rounds fit into so many seconds, from 5 to 31; of a tiny run 2. Three are played for it: a warm-up."""
    if run.tiny:
        return 2
    times = take_turns(functions, rounds=2, warmup=1)
    return max(5, min(31, int(seconds / sum(of_name[-1] for of_name in times.values()))))
