"""Rotation modulation in the place of AdaLN's shifts, in transformers of diffusers."""

from .adapter import load_rotation_adapter, save_rotation_adapter
from .linear import RotationLinear
from .swap import SwapReport, drop_shift_, set_shift_scale, swap_adaln_for_rotation, unswap_rotation
from .values import ModulationMaps, Rotation


__all__ = [
    "ModulationMaps",
    "Rotation",
    "RotationLinear",
    "SwapReport",
    "drop_shift_",
    "load_rotation_adapter",
    "save_rotation_adapter",
    "set_shift_scale",
    "swap_adaln_for_rotation",
    "unswap_rotation",
]
