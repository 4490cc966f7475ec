"""Memory that a run will need, by the arithmetic of docs/scale_out.md; nothing is measured."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..optimization import hidden_matrices


FLOAT32 = 4  # bytes


def state_bytes(
    model: nn.Module, num_averages: int, num_shards: int = 1, optimizer: str = "adam", use_8bit_adam: bool = False
) -> int:
    """Weights, their gradients, the optimiser's moments and the averages of one process, in float32 but for 8 bits.

    Args:
        model (nn.Module): whole, on any device.
        num_averages (int): how many of the weights are tracked.
        num_shards (int): processes among which `fully_shard` divides it.
        optimizer (str), use_8bit_adam (bool): as the trainer's flags. Adam has two moments, Muon one of hidden
            matrices; in 8 bits are those of parameters of 4096 numbers or more.
    """
    matrices, num_bytes = hidden_matrices(model) if optimizer == "muon" else set(), 0
    for parameter in model.parameters():
        moments = 2 if use_8bit_adam and parameter.numel() >= 4096 else 2 * FLOAT32
        if id(parameter) in matrices:
            moments = FLOAT32
        of_training = (FLOAT32 + moments) * parameter.requires_grad
        num_bytes += parameter.numel() * (FLOAT32 * (1 + num_averages) + of_training)
    return num_bytes // num_shards


def activation_bytes(config: Mapping[str, Any], num_images: int, gradient_checkpointing: bool = False) -> int:
    """What the blocks keep for the backward pass, in float32: an estimate, counted in configuration E on the CPU.

    On CUDA queries and keys are kept before their RMS norm as well, which makes 20 of 18 (not measured).

        layers x tokens x (18 width + 3 heads)            with checkpointing: layers x tokens x width, and one block

    Args:
        config (mapping): of an `MPDiTTransformer2DModel`.
        num_images (int): of a micro batch.
        gradient_checkpointing (bool): whether activations are computed anew in the backward pass.
    """
    heads, layers = config["num_attention_heads"], config["num_layers"]
    width, tokens = heads * config["attention_head_dim"], (config["sample_size"] // config["patch_size"]) ** 2
    of_block = tokens * (18 * width + 3 * heads)
    kept = layers * tokens * width + of_block if gradient_checkpointing else layers * of_block
    return FLOAT32 * num_images * kept
