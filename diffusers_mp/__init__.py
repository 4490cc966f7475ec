"""Magnitude-preserving diffusion transformers and rotation modulation for Hugging Face Diffusers."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

_EXPORTS = {
    "layers": [
        "MPEmbedding",
        "MPLeakyReLU",
        "MPLinear",
        "MPPatchEmbed",
        "MPSiLU",
        "MPTimestepEmbedding",
        "normalize_weights_",
    ],
    "modulation": ["GateModulation", "RotationModulation", "ScaleModulation", "ShiftModulation"],
    "transformer_mpdit": ["MPDiTTransformer2DModel"],
    "pipeline_mpdit": ["MPDiTPipeline"],
    "presets": ["get_preset"],
    "ema": ["PowerFunctionEMA"],
    "reconstruction": ["reconstruct_ema"],
    "training": ["parameter_groups"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:
    from .ema import PowerFunctionEMA as PowerFunctionEMA
    from .layers import MPEmbedding as MPEmbedding
    from .layers import MPLeakyReLU as MPLeakyReLU
    from .layers import MPLinear as MPLinear
    from .layers import MPPatchEmbed as MPPatchEmbed
    from .layers import MPSiLU as MPSiLU
    from .layers import MPTimestepEmbedding as MPTimestepEmbedding
    from .layers import normalize_weights_ as normalize_weights_
    from .modulation import GateModulation as GateModulation
    from .modulation import RotationModulation as RotationModulation
    from .modulation import ScaleModulation as ScaleModulation
    from .modulation import ShiftModulation as ShiftModulation
    from .pipeline_mpdit import MPDiTPipeline as MPDiTPipeline
    from .presets import get_preset as get_preset
    from .reconstruction import reconstruct_ema as reconstruct_ema
    from .training import parameter_groups as parameter_groups
    from .transformer_mpdit import MPDiTTransformer2DModel as MPDiTTransformer2DModel


def __getattr__(name: str):
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value
    if name == "ModelMixin":
        # A pipeline's `model_index.json` names this package as the home of its transformer, and diffusers then looks
        # here for the base class that tells it how to load one. Not a public name.
        return importlib.import_module("diffusers").ModelMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
