"""Where diffusers' transformers keep the linear maps of their modulations, and what the rows of these are."""

from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
from diffusers.models import normalization
from diffusers.models.transformers import (
    auraflow_transformer_2d,
    hunyuan_transformer_2d,
    transformer_cogview4,
    transformer_easyanimate,
    transformer_glm_image,
    transformer_hidream_image,
    transformer_hunyuan_video,
    transformer_prx,
    transformer_qwenimage,
)
from torch import nn


SUBLAYERS = ("attention", "mlp", "final")

_ZERO_SINGLE = ("shift", "scale", "gate")
_ZERO = (("attention", _ZERO_SINGLE), ("mlp", _ZERO_SINGLE))
_CONTINUOUS = ("scale", "shift")
_FINAL = ("shift", "scale")
# For tokens of the image and of the text by turns.
_ZERO_PAIRS = tuple(kind for kind in _ZERO_SINGLE for _ in range(2))

# Class of the owner → path of the linear map in it → groups of rows by sublayer. A sublayer of None is told by the
# owner's name in the model, see `_SUBLAYER_OF_NAME`.
ROWS = {
    normalization.AdaLayerNormZero: {"linear": _ZERO},
    # The third part belongs to the second attention of SD3.5.
    normalization.SD35AdaLayerNormZeroX: {"linear": (*_ZERO, ("attention", _ZERO_SINGLE))},
    normalization.AdaLayerNormZeroSingle: {"linear": ((None, _ZERO_SINGLE),)},
    normalization.AdaLayerNormContinuous: {"linear": ((None, _CONTINUOUS),)},
    auraflow_transformer_2d.AuraFlowPreFinalBlock: {"linear": ((None, _CONTINUOUS),)},
    # Tokens of the image or video, then of the text.
    normalization.CogView3PlusAdaLayerNormZeroTextImage: {"linear": 2 * _ZERO},
    normalization.CogVideoXLayerNormZero: {"linear": ((None, _ZERO_SINGLE), (None, _ZERO_SINGLE))},
    transformer_easyanimate.EasyAnimateLayerNormZero: {"linear": ((None, _ZERO_SINGLE), (None, _ZERO_SINGLE))},
    transformer_cogview4.CogView4AdaLayerNormZero: {"linear": (("attention", _ZERO_PAIRS), ("mlp", _ZERO_PAIRS))},
    transformer_cogview4.CogView4AdaLayerNormContinuous: {"linear": ((None, _CONTINUOUS),)},
    transformer_glm_image.GlmImageAdaLayerNormZero: {"linear": (("attention", _ZERO_PAIRS), ("mlp", _ZERO_PAIRS))},
    transformer_glm_image.GlmImageAdaLayerNormContinuous: {"linear": ((None, _CONTINUOUS),)},
    normalization.AdaLayerNorm: {"linear": ((None, _FINAL),)},
    hunyuan_transformer_2d.AdaLayerNormShift: {"linear": ((None, ("shift",)),)},
    transformer_hunyuan_video.HunyuanVideoTokenReplaceAdaLayerNormZero: {"linear": _ZERO},
    transformer_hunyuan_video.HunyuanVideoTokenReplaceAdaLayerNormZeroSingle: {"linear": ((None, _ZERO_SINGLE),)},
    transformer_qwenimage.QwenImageTransformerBlock: {"img_mod.1": _ZERO, "txt_mod.1": _ZERO},
    # Tokens of the image, then of the text.
    transformer_hidream_image.HiDreamImageTransformerBlock: {"adaLN_modulation.1": 2 * _ZERO},
    transformer_hidream_image.HiDreamImageSingleTransformerBlock: {"adaLN_modulation.1": _ZERO},
    transformer_hidream_image.HiDreamImageOutEmbed: {"adaLN_modulation.1": (("final", _FINAL),)},
    transformer_prx.Modulation: {"lin": _ZERO},
    transformer_prx.FinalLayer: {"adaLN_modulation.1": (("final", _FINAL),)},
    # Their last modulation is in the model's own forward.
    diffusers.DiTTransformer2DModel: {"proj_out_1": (("final", _FINAL),)},
    diffusers.Transformer2DModel: {"proj_out_1": (("final", _FINAL),)},
}
# `norm` is that of blocks whose attention and MLP share one modulation.
_SUBLAYER_OF_NAME = {"norm_out": "final", "norm2": "mlp"}


@dataclass(frozen=True)
class Site:
    """A linear map to swap.

    Attributes:
        name (str): its path in the model.
        linear (nn.Module): the map.
        kinds (tuple of str): its groups of rows; "rotate" for a shift that becomes a rotation.
    """

    name: str
    linear: nn.Module
    kinds: tuple[str, ...]


def find_sites(model: nn.Module, sublayers: Sequence[str] = SUBLAYERS) -> list[Site]:
    """The linear maps of a model that have shifts to swap.

    Args:
        model (nn.Module): a supported transformer.
        sublayers (sequence of str): out of "attention", "mlp", "final"; shifts of others stay shifts. A block whose
            attention and MLP share one modulation counts as "attention".
    Returns:
        list of Site: in the order of the modules.
    """
    sites = []
    for owner_name, owner in model.named_modules():
        # A model that is being loaded as a swapped one is of a subclass.
        rows = next((ROWS[cls] for cls in type(owner).__mro__ if cls in ROWS), {})
        if isinstance(owner, normalization.AdaLayerNorm) and owner.chunk_dim == 0:
            continue  # That of `ada_norm`: other rows, and one condition for all samples.
        for path, parts in rows.items():
            try:
                linear = owner.get_submodule(path)
            except AttributeError:
                continue  # Transformer2DModel has its last modulation only with `ada_norm_zero`.
            told_by_name = _SUBLAYER_OF_NAME.get(owner_name.rpartition(".")[2], "attention")
            kinds = tuple(
                "rotate" if kind == "shift" and (sublayer or told_by_name) in sublayers else kind
                for sublayer, kinds_of_part in parts
                for kind in kinds_of_part
            )
            if "rotate" in kinds:
                sites.append(Site(f"{owner_name}.{path}".lstrip("."), linear, kinds))
    return sites
