"""DiT as it was published, for its checkpoints: diffusers' class, with the time features that they were trained on."""

import functools

from diffusers import DiTTransformer2DModel

from . import _registration  # noqa: F401


class OriginalDiTTransformer2DModel(DiTTransformer2DModel):
    """diffusers' `DiTTransformer2DModel` with time features of the frequencies `10000^(-i/128)`, i = 0..127.

    Source: arXiv 2212.09748, whose published code has these frequencies. diffusers' class has `10000^(-i/127)`, and no
    entry of its config or weight of its time embedding can tell it otherwise, so that a published checkpoint gives
    other predictions in it. Config, weights and everything else are those of the class of diffusers.

    Args:
        *args, **kwargs: as in `DiTTransformer2DModel`.
    """

    __module__ = "diffusers_mp"

    @functools.wraps(DiTTransformer2DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
