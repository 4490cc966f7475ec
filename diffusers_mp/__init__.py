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
    ],
    "rows": ["normalize_weights_", "trust_rows_"],
    "pinned_norms": ["load_weight_norms", "pin_weight_norms_", "save_weight_norms"],
    "modulation": ["GateModulation", "RotationModulation", "ScaleModulation", "ShiftModulation"],
    "transformer_mpdit": ["MPDiTTransformer2DModel"],
    "pipeline_mpdit": ["MPDiTPipeline"],
    "presets": ["get_preset"],
    "original_dit": ["OriginalDiTTransformer2DModel"],
    "class_embeddings": ["resize_class_embeddings_"],
    "averages.ema": ["PowerFunctionEMA"],
    "averages.reconstruction": ["reconstruct_ema"],
    "evaluation.frechet": ["frechet_distance"],
    "rotation_swap": [
        "drop_shift_",
        "load_rotation_adapter",
        "save_rotation_adapter",
        "set_shift_scale",
        "swap_adaln_for_rotation",
        "unswap_rotation",
    ],
    "optimization": ["parameter_groups"],
    "diagnostics.norm_watch": ["NormWatch"],
    "diagnostics.recorder": ["MagnitudeRecorder"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:
    from .averages.ema import PowerFunctionEMA as PowerFunctionEMA
    from .averages.reconstruction import reconstruct_ema as reconstruct_ema
    from .class_embeddings import resize_class_embeddings_ as resize_class_embeddings_
    from .diagnostics.norm_watch import NormWatch as NormWatch
    from .diagnostics.recorder import MagnitudeRecorder as MagnitudeRecorder
    from .evaluation.frechet import frechet_distance as frechet_distance
    from .layers import MPEmbedding as MPEmbedding
    from .layers import MPLeakyReLU as MPLeakyReLU
    from .layers import MPLinear as MPLinear
    from .layers import MPPatchEmbed as MPPatchEmbed
    from .layers import MPSiLU as MPSiLU
    from .layers import MPTimestepEmbedding as MPTimestepEmbedding
    from .modulation import GateModulation as GateModulation
    from .modulation import RotationModulation as RotationModulation
    from .modulation import ScaleModulation as ScaleModulation
    from .modulation import ShiftModulation as ShiftModulation
    from .optimization import parameter_groups as parameter_groups
    from .original_dit import OriginalDiTTransformer2DModel as OriginalDiTTransformer2DModel
    from .pinned_norms import load_weight_norms as load_weight_norms
    from .pinned_norms import pin_weight_norms_ as pin_weight_norms_
    from .pinned_norms import save_weight_norms as save_weight_norms
    from .pipeline_mpdit import MPDiTPipeline as MPDiTPipeline
    from .presets import get_preset as get_preset
    from .rotation_swap import drop_shift_ as drop_shift_
    from .rotation_swap import load_rotation_adapter as load_rotation_adapter
    from .rotation_swap import save_rotation_adapter as save_rotation_adapter
    from .rotation_swap import set_shift_scale as set_shift_scale
    from .rotation_swap import swap_adaln_for_rotation as swap_adaln_for_rotation
    from .rotation_swap import unswap_rotation as unswap_rotation
    from .rows import normalize_weights_ as normalize_weights_
    from .rows import trust_rows_ as trust_rows_
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
    if name.startswith("Rotation"):
        # Classes of swapped models, RotationFluxTransformer2DModel and the like, under which they are saved.
        model_class = importlib.import_module(".rotation_swap.model_class", __name__).rotation_class_of_name(name)
        if model_class is not None:
            return model_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
