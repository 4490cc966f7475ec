"""What a configuration of the model stands for: the rules of its values, and the parts that it makes a model of."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import nn

from .layers import MPEmbedding, MPLeakyReLU, MPLinear, MPSiLU
from .modulation import Modulation, check_kinds
from .presets import SWITCHES


ACTIVATIONS = {
    # activation_fn: (magnitude preserving, plain)
    "silu": (MPSiLU, nn.SiLU),
    "leaky_relu": (MPLeakyReLU, nn.LeakyReLU),
}
_COUNTS = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "sample_size", "patch_size")
_COUNTS_OR_NONE = ("out_channels", "num_classes", "pooled_projection_dim")
_NUMBERS = ("mlp_ratio", "class_dropout_prob", "residual_t")
_MEANING = "rows that are not normalised on use carry meaning in their norm"


def check_configuration(config: FrozenDict) -> dict[str, Any]:
    """Check the arguments of `MPDiTTransformer2DModel`.

    Args:
        config (FrozenDict): its config.
    Returns:
        dict: those of its entries that JSON would change, as it reads them back: a list, and integers not of NumPy.
    Raises:
        ValueError: if a value is outside of the rules.
    """
    for name in SWITCHES:
        if not isinstance(config[name], bool):
            raise ValueError(f"`{name}` must be True or False, got {config[name]!r}.")
    for name in _NUMBERS:
        value = config[name]
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
    limit = config.max_magnitude
    if limit is not None and (not isinstance(limit, Real) or isinstance(limit, bool) or not 0 < limit < math.inf):
        raise ValueError(f"`max_magnitude` must be a positive number, or None for no limit, got {limit!r}.")
    counts = {name: config[name] for name in (*_COUNTS, *_COUNTS_OR_NONE)}
    for name, count in counts.items():
        is_optional = name in _COUNTS_OR_NONE
        is_count = isinstance(count, Integral) and not isinstance(count, bool) and count >= 1
        if not is_count and not (is_optional and count is None):
            rule = "an integer of at least 1, or None" if is_optional else "an integer of at least 1"
            raise ValueError(f"`{name}` must be {rule}, got {count!r}.")
    check_kinds(config.modulation)

    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    if (heads * head_dim) % 4:
        raise ValueError(
            "`num_attention_heads * attention_head_dim` must be divisible by 4 for the position table, got "
            f"{heads} * {head_dim} = {heads * head_dim}."
        )
    weights_fit = config.weight_normalization or not config.forced_weight_normalization
    for name, fits, rule in (
        ("mlp_ratio", int(heads * head_dim * config.mlp_ratio) >= 1, "give the feed-forward a width of at least 1"),
        (
            "sample_size",
            not config.sample_size % config.patch_size,
            f"be divisible by `patch_size` ({config.patch_size})",
        ),
        ("activation_fn", config.activation_fn in ACTIVATIONS, f"be one of {list(ACTIVATIONS)}"),
        ("weight_normalization", weights_fit, f"be True with `forced_weight_normalization=True`: {_MEANING}"),
        ("class_dropout_prob", 0 <= config.class_dropout_prob < 1, "be in [0, 1)"),
        ("residual_t", 0 < config.residual_t < 1, "be in (0, 1)"),
    ):
        if not fits:
            raise ValueError(f"`{name}` must {rule}, got {config[name]!r}.")
    counts = {name: count if count is None else int(count) for name, count in counts.items()}
    return {"modulation": list(config.modulation), **counts}


def check_latent_statistics(
    latents_mean: Sequence[float] | None, latents_std: Sequence[float] | None, num_channels: int
) -> None:
    """Check mean and standard deviation of latents, one of each for a channel, or neither.

    Raises:
        ValueError: if only one is given, a length or a kind is wrong, or a deviation is not positive.
    """
    if (latents_mean is None) != (latents_std is None):
        raise ValueError(
            "`latents_mean` and `latents_std` must be given together, got "
            f"{'only `latents_std`' if latents_mean is None else 'only `latents_mean`'}."
        )
    for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
        if values is None:
            continue
        if isinstance(values, str) or len(values) != num_channels:
            raise ValueError(
                f"`{name}` must have one value for each of the {num_channels} input channels of the transformer, "
                f"got {values if isinstance(values, str) else len(values)}."
            )
        numbers = [value for value in values if isinstance(value, Real) and math.isfinite(value)]
        if len(numbers) < num_channels or name == "latents_std" and min(numbers) <= 0:
            rule = "positive numbers" if name == "latents_std" else "finite numbers"
            raise ValueError(f"`{name}` must hold {rule}, got {list(values)}.")


class Parts:
    """What a configuration makes a model of; each submodule takes what it needs.

    Args:
        config (FrozenDict): checked config of `MPDiTTransformer2DModel`.
    """

    def __init__(self, config: FrozenDict):
        self.config = config
        self.dim = config.num_attention_heads * config.attention_head_dim

    def linear(self, in_features: int, out_features: int) -> nn.Linear:
        """A map without bias: of unit rows, or DiT's."""
        if self.config.weight_normalization:
            forced = self.config.forced_weight_normalization
            return MPLinear(in_features, out_features, forced_weight_normalization=forced)
        layer = nn.Linear(in_features, out_features, bias=False)
        nn.init.xavier_uniform_(layer.weight)
        return layer

    def table(self, num_rows: int) -> nn.Embedding:
        """An embedding of the model's width: of rows at RMS 1, or plain."""
        if self.config.mp_embedding:
            forced = self.config.forced_weight_normalization
            return MPEmbedding(num_rows, self.dim, forced_weight_normalization=forced)
        return nn.Embedding(num_rows, self.dim)

    def activation(self) -> nn.Module:
        """An activation that keeps RMS 1, or the plain one."""
        magnitude_preserving, plain = ACTIVATIONS[self.config.activation_fn]
        return magnitude_preserving() if self.config.mp_silu else plain()

    def norm(self) -> nn.Module:
        """LayerNorm without parameters, or the identity."""
        return nn.LayerNorm(self.dim, eps=1e-6, elementwise_affine=False) if self.config.layer_norm else nn.Identity()

    def modulation(self, kinds: Sequence[str]) -> Modulation | None:
        """A site of these kinds, or None where there are none."""
        weight_normalization = self.config.weight_normalization
        forced = self.config.forced_weight_normalization
        return Modulation(self.dim, self.dim, kinds, weight_normalization, forced) if kinds else None
