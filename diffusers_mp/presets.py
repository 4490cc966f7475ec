"""Model sizes and configurations, the paper's and ours, as plain data."""

from collections.abc import Sequence
from typing import Any


# depth, width, heads; DiT's sizes (arXiv 2212.09748) and the paper's XS.
SIZES = {
    "XS": (6, 256, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (1, 2, 4, 8)

_MAGNITUDE_PRESERVING = {
    "cosine_attention": True,
    "weight_normalization": True,
    "mp_residual": True,
    "mp_silu": True,
    "mp_pos_embed": True,
    "mp_embedding": True,
}
_PLAIN = dict.fromkeys(_MAGNITUDE_PRESERVING, False)
# Table 1 of arXiv 2505.19122. What B adds to A is inferred from the flags of the paper's research code.
CONFIGURATIONS = {
    "A": {**_PLAIN, "forced_weight_normalization": False, "layer_norm": True},
    "B": {**_PLAIN, "cosine_attention": True, "forced_weight_normalization": False, "layer_norm": True},
    "C": {**_MAGNITUDE_PRESERVING, "forced_weight_normalization": False, "layer_norm": True},
    "D": {**_MAGNITUDE_PRESERVING, "forced_weight_normalization": True, "layer_norm": True},
    "E": {**_MAGNITUDE_PRESERVING, "forced_weight_normalization": True, "layer_norm": False},
}
SWITCHES = tuple(CONFIGURATIONS["E"])
# Ours: E with a bound on tokens; benchmarks/quality/bound.py says where and at what.
CONFIGURATIONS["F"] = {**CONFIGURATIONS["E"], "max_magnitude": 2.0}


def get_preset(
    size: str,
    configuration: str = "E",
    modulation: Sequence[str] = ("scale", "rotate", "gate"),
    **overrides: Any,
) -> dict[str, Any]:
    """Keyword arguments of `MPDiTTransformer2DModel` for a named size and configuration.

    Args:
        size (str): "XS", "S", "B", "L" or "XL", a slash, and a patch size of 1, 2, 4 or 8, as in "S/2"; 1 is for
            latents of an autoencoder of factor 16 or 32.
        configuration (str): "A" (DiT's norms and plain weights; with `modulation` "scale", "shift" and "gate", DiT) to
            "E" (magnitude preserving, no normalisation layer), Table 1 of arXiv 2505.19122; "F" is E with a bound on
            the magnitude of tokens, the default of the trainer.
        modulation (sequence of str): kinds, a subset of `modulation.MODULATION_KINDS`.
        **overrides: any other argument of the model, such as `sample_size` or `num_classes`; wins over the preset.
    Returns:
        dict: a new, JSON-serialisable dict.
    Raises:
        ValueError: if the size or the configuration is unknown.
    """
    name, _, patch_size = str(size).partition("/")
    if name not in SIZES or patch_size not in map(str, PATCH_SIZES):
        raise ValueError(
            f"`size` must be one of {list(SIZES)}, a slash and one of {list(PATCH_SIZES)}, as in 'S/2', got {size!r}."
        )
    if configuration not in CONFIGURATIONS:
        raise ValueError(f"`configuration` must be one of {list(CONFIGURATIONS)}, got {configuration!r}.")
    num_layers, width, num_attention_heads = SIZES[name]
    return {
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": width // num_attention_heads,
        "patch_size": int(patch_size),
        # A string is left for the model to refuse.
        "modulation": modulation if isinstance(modulation, str) else list(modulation),
        **CONFIGURATIONS[configuration],
        **overrides,
    }
