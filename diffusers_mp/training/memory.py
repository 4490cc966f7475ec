"""Memory that a run will need, by the arithmetic of docs/scale_out.md; nothing is measured."""

from collections.abc import Mapping
from typing import Any

from torch import nn


FLOAT32 = 4  # bytes


def state_bytes(model: nn.Module, num_averages: int, num_shards: int = 1) -> int:
    """Weights, their gradients, Adam's two moments and the averages, all in float32, of one process.

    Args:
        model (nn.Module): whole, on any device.
        num_averages (int): how many of the weights are tracked.
        num_shards (int): processes among which `fully_shard` divides it.
    """
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_all = sum(parameter.numel() for parameter in model.parameters())
    return FLOAT32 * ((1 + num_averages) * num_all + 3 * num_trained) // num_shards


def activation_bytes(config: Mapping[str, Any], num_images: int, gradient_checkpointing: bool = False) -> int:
    """What the blocks keep for the backward pass, in float32: an estimate, counted in configuration E.

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
