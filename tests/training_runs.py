"""Small real runs of the trainer on the CPU, and what they leave."""

import io
import json

import torch
from helpers import reset_accelerate
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


MODEL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}


def arguments(data, output_dir, *more):
    return [
        *("--train_data_dir", str(data / "images")),
        *("--vae", str(data / "vae")),
        *("--model_config_name_or_path", str(data / "model.json")),
        *("--resolution", "16"),
        *("--total_batch_size", "4"),
        *("--max_train_steps", "6"),
        *("--checkpointing_steps", "2"),
        *("--validation_steps", "0"),
        *("--num_validation_images", "5"),
        *("--validation_inference_steps", "2"),
        *("--output_dir", str(output_dir)),
        *more,
    ]


def train(data, output_dir, *more):
    import train_mpdit

    train_mpdit.main(train_mpdit.parse_args(arguments(data, output_dir, *more)))
    reset_accelerate()
    return output_dir


def metrics(output_dir, name):
    lines = (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry[name] for entry in map(json.loads, lines) if name in entry}


def weights(folder, name="diffusion_pytorch_model.safetensors"):
    return load_file(folder / name)


def stored(checkpoint):
    """What a checkpoint holds of model, optimiser and averages, by name."""
    buffer = io.BytesIO()
    dcp_to_torch_save(checkpoint / "shards", buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def raw_weights(checkpoint):
    return stored(checkpoint)["model"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def damage(path):
    """Flip one byte in the middle of a file: its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
