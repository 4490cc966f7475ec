"""What several test modules share: the golden files and small real models."""

import contextlib
import json
import math
import resource
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from diffusers_mp import (
    MPDiTPipeline,
    MPDiTTransformer2DModel,
    MPLinear,
    MPSiLU,
    PowerFunctionEMA,
    get_preset,
    normalize_weights_,
    presets,
)
from diffusers_mp.averages.snapshots import save_snapshots
from diffusers_mp.data.encoding import encode_dataset
from diffusers_mp.data.pixels import prepare_image
from diffusers_mp.data.settings import EncodingSettings


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"
FIXTURES = ROOT / "tests" / "fixtures"
GOLDEN = FIXTURES / "golden"
TINY = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "sample_size": 8, "num_classes": 10}
FLAGS = presets.SWITCHES
NOT_IN_DEV = "not in the dev extra: where it is installed, each import of diffusers prints a warning"


def tiny_config(configuration="E", modulation=("scale", "rotate", "gate"), **overrides):
    return get_preset("XS/2", configuration, modulation, **{**TINY, **overrides})


def tiny_model(configuration="E", modulation=("scale", "rotate", "gate"), open_gains=True, seed=0, **overrides):
    """A small real model; with `open_gains` nothing that starts at zero hides behind its zero."""
    torch.manual_seed(seed)
    model = MPDiTTransformer2DModel(**tiny_config(configuration, modulation, **overrides))
    if open_gains:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gain"):
                    parameter.normal_(0, 0.5)
                elif not parameter.any():
                    parameter.normal_(0, 0.05)
    return model


def tiny_inputs(batch_size=3, channels=4, size=8, num_classes=10, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch_size, channels, size, size, generator=generator).to(dtype),
        "timestep": torch.randint(0, 1000, (batch_size,), generator=generator),
        "class_labels": torch.randint(0, num_classes + 1, (batch_size,), generator=generator),
    }


def forward(model, inputs):
    return model(**inputs).sample


def write_table(dataset, folder):
    """The rows of an image folder as a parquet file with the images in it; what `--dataset_name` takes."""
    paths = [Path(row["image"]["path"]) for row in dataset]
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    rows = [row | {"image": cell} for row, cell in zip(dataset, cells, strict=True)]
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=dataset.features).to_parquet(folder / "train.parquet")
    return str(folder)


def gradients(model, inputs):
    """Gradient of every parameter for a loss that leaves none of them out."""
    weights = torch.randn(forward(model, inputs).shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (forward(model, inputs).float() * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def one_flag_changed():
    """Every flag alone: on in A, off in E, where that is legal."""
    for flag in FLAGS:
        if flag == "layer_norm":
            yield "A", {flag: False}
            yield "E", {flag: True}
        elif flag == "forced_weight_normalization":
            yield "E", {flag: False}
        else:
            yield "A", {flag: True}
            yield (
                "E",
                {flag: False} | ({"forced_weight_normalization": False} if flag == "weight_normalization" else {}),
            )


CONFIGURATIONS = [(name, {}) for name in "ABCDEF"] + list(one_flag_changed())


def golden_names():
    return sorted(path.stem.removeprefix("forward_") for path in GOLDEN.glob("forward_*.safetensors"))


def golden_config(name):
    """Configuration of the model behind `forward_<name>.safetensors`."""
    overrides = {"out_channels": 8, **TINY}
    modulation = ("scale", "shift", "gate")
    if name.startswith("A_plus_"):
        overrides[name.removeprefix("A_plus_")] = True
    elif name == "A_without_layer_norm":
        overrides["layer_norm"] = False
    else:
        kinds = name[2:].split("_")
        if kinds[-1] == "patch4":
            overrides["patch_size"] = 4
        modulation = tuple(kind for kind in kinds if kind not in ("patch4", "nonsquare"))
    return get_preset("XS/2", name[0], modulation, **overrides)


def load_golden(file_name):
    return load_file(GOLDEN / f"{file_name}.safetensors")


def from_golden(tensors, prefix):
    """Rename golden weights to those of `MPDiTTransformer2DModel`, joining the maps and gains of each modulation."""
    golden = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    weights = {
        "patch_embed.proj.weight": golden["patch"],
        "conditioning_embedder.time_embedder.linear_1.weight": golden["time.1"],
        "conditioning_embedder.time_embedder.linear_2.weight": golden["time.2"],
        "conditioning_embedder.class_embedder.weight": golden["label"],
        "output.proj.weight": golden["out"],
    }
    if "out.gain" in golden:
        weights["output.gain"] = golden["out.gain"].reshape(1)
    sites = {"output.modulation": "final"}
    for index in range(2):
        block, theirs = f"transformer_blocks.{index}", f"block.{index}"
        for ours, name in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}.items():
            weights[f"{block}.attn.{ours}.weight"] = golden[f"{theirs}.attn.{name}"]
        weights[f"{block}.ff.linear_1.weight"] = golden[f"{theirs}.mlp.1"]
        weights[f"{block}.ff.linear_2.weight"] = golden[f"{theirs}.mlp.2"]
        sites[f"{block}.attn_modulation"] = f"{theirs}.attn"
        sites[f"{block}.ff_modulation"] = f"{theirs}.mlp"
    for ours, theirs in sites.items():
        kinds = [kind for kind in ("scale", "shift", "rotate", "gate") if f"{theirs}.{kind}" in golden]
        weights[f"{ours}.proj.weight"] = torch.cat([golden[f"{theirs}.{kind}"] for kind in kinds])
        if f"{theirs}.{kinds[0]}.gain" in golden:
            weights[f"{ours}.gain"] = torch.stack([golden[f"{theirs}.{kind}.gain"] for kind in kinds])
    return weights


def assert_magnitude(x, expected=1.0, num_independent=None):
    """RMS is `expected` within five standard errors of `num_independent` samples (all entries, if left out)."""
    squares = x.detach().double().square().flatten()
    # M^2 has the standard error std(x^2) / sqrt(n); M = sqrt(M^2) has half of that, relatively.
    error = squares.std() / squares.mean() / 2 / math.sqrt(num_independent or squares.numel())
    assert 5 * error < 0.2, "too few samples to tell anything"
    assert abs(squares.mean().sqrt() / expected - 1) < 5 * error


def relative_error(value, reference):
    """Norm of the difference relative to the norm of the reference."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def row_norms(weight):
    return torch.linalg.vector_norm(weight.detach().double(), dim=-1)


@torch.no_grad()
def rescale_rows(layer, low=0.1, high=10.0):
    """Give every stored row a norm of its own; returns the factors."""
    factors = torch.empty(layer.weight.shape[0], 1, dtype=layer.weight.dtype).uniform_(low, high)
    layer.weight.mul_(factors)
    return factors


def unit(weight):
    return weight.detach() / torch.linalg.vector_norm(weight.detach(), dim=-1, keepdim=True)


def small_network(dtype=torch.float64, forced=True):
    return nn.Sequential(
        MPLinear(12, 16, dtype=dtype, forced_weight_normalization=forced),
        MPSiLU(),
        MPLinear(16, 4, dtype=dtype, forced_weight_normalization=forced),
    )


def tiny_vae(in_channels=3, latent_channels=4, seed=0):
    """A real AutoencoderKL of factor 4."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=in_channels,
        out_channels=in_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
    ).eval()


def encode(dataset, folder, *, vae=None, id2label=None, num_processes=1, process_index=0, resolution=16, **settings):
    """`encode_dataset`, of pixels if there is no VAE."""
    processes = {"num_processes": num_processes, "process_index": process_index}
    settings = EncodingSettings(resolution, **settings)
    return encode_dataset(dataset, folder, settings, vae=vae, id2label=id2label, **processes)


def pixels_of(dataset, num_channels=3):
    """A data set as `encode` takes it in: 16x16, in [-1, 1]."""
    prepared = []
    for row in dataset:
        with Image.open(row["image"]["path"]) as image:
            prepared.append(prepare_image(image, 16, num_channels))
    return torch.stack(prepared).float() / 127.5 - 1


def content_of(folder, *without):
    """What the files of a folder hold, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


def content_without_source(folder):
    """What an encoding holds, but for the state of the source, which a stream has not."""
    content = content_of(folder)
    for name in [name for name in content if name.startswith("shard-") and name.endswith(".json")]:
        content[name] = json.loads(content[name])
        del content[name]["source_state"]
    return content


def means_of_blocks(images):
    """Features of a function of one's own: 48 for RGB."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 255


def normal_rows(count, size, seed=0, scale=1.0, offset=0.0):
    """Points of a normal distribution, float64."""
    return (
        torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + offset
    )


def vector(tensors):
    """All of them as one, float64."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def small_run(directory, num_steps=4, vae=None, stds=(0.05, 0.10), **overrides):
    """Snapshots of each step of a model whose weights walk at random; its averages and pipeline."""
    model = tiny_model(**overrides)
    pipeline = MPDiTPipeline(model, DDPMScheduler(), vae, latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    ema = PowerFunctionEMA(model, stds)
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        normalize_weights_(model)
        ema.update(step)
        save_snapshots(ema, directory, pipeline)
    return ema, pipeline


def random_image(rng, width=20, height=18):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reset_accelerate():
    """As in a new process: Accelerate keeps what it was first told."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def full_disk(num_bytes=0):
    """No file may grow beyond so many bytes: writes fail in the kernel, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
