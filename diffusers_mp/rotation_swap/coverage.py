"""Which transformers of diffusers the swap covers, and what stands in the way of the others."""

SUPPORTED = "supported"
NO_SHIFT = "no AdaLN shift: nothing to swap"
TABLES = "AdaLN-single: one shared map and a table per block, about 0.2 % of the weights to save"
OWN_LINEAR = "modulation in the forward of blocks of its own; no one has asked for it yet"
NOT_YET = "the swap's patterns fit, nobody has tested it yet"

# Every `ModelMixin` of `diffusers.models.transformers`.
COVERAGE = {
    "AuraFlowTransformer2DModel": SUPPORTED,
    "CogVideoXTransformer3DModel": SUPPORTED,
    "DiTTransformer2DModel": SUPPORTED,
    "FluxTransformer2DModel": SUPPORTED,
    "HunyuanDiT2DModel": SUPPORTED,
    "HunyuanVideoTransformer3DModel": SUPPORTED,
    "QwenImageTransformer2DModel": SUPPORTED,
    "SD3Transformer2DModel": SUPPORTED,
    "Transformer2DModel": SUPPORTED,
}
# Of this package.
NATIVE = "MPDiTTransformer2DModel"


def supported_names() -> list[str]:
    """Class names of models that `swap_adaln_for_rotation` accepts."""
    return sorted([NATIVE, *(name for name, state in COVERAGE.items() if state == SUPPORTED)])
