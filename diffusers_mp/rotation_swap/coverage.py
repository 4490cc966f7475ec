"""Which transformers of diffusers the swap covers, and what stands in the way of the others."""

SUPPORTED = "supported"
NO_ADALN = "no adaptive norm by default"
NO_SHIFT = "scales and gates only, no shift"
LAST_ONLY = "scales and gates only, but for one shift in the last norm"
TABLES = "AdaLN-single: one map for all blocks, to which each adds a table; little to save"
SHARED = "one map for all blocks, which reshape it; little to save"
SUMMED = "each norm adds a map for all blocks to its own"
CAST = "blocks cast and reshape each map"
SELECTED = "maps of three modalities in one, which become rows of a table that tokens select from"
NO_MAPS = "no linear maps in the norms: one network gives the modulation of all blocks"
FILM = "FiLM in a decoder of spectrograms"
OTHER_NORM = "an adaptive norm of its own: scale between 0 and 1, and a mask"

# Every `ModelMixin` of `diffusers.models.transformers`.
COVERAGE = {
    "AceStepTransformer1DModel": TABLES,
    "AllegroTransformer3DModel": TABLES,
    "AnyFlowFARTransformer3DModel": TABLES,
    "AnyFlowTransformer3DModel": TABLES,
    "AuraFlowTransformer2DModel": SUPPORTED,
    "BriaFibo2Transformer2DModel": NO_SHIFT,
    "BriaFiboTransformer2DModel": SUPPORTED,
    "BriaTransformer2DModel": SUPPORTED,
    "ChromaTransformer2DModel": NO_MAPS,
    "ChronoEditTransformer3DModel": TABLES,
    "CogVideoXTransformer3DModel": SUPPORTED,
    "CogView3PlusTransformer2DModel": SUPPORTED,
    "CogView4Transformer2DModel": SUPPORTED,
    "ConsisIDTransformer3DModel": SUPPORTED,
    "Cosmos3OmniTransformer": NO_ADALN,
    "CosmosTransformer3DModel": SUMMED,
    "DiTTransformer2DModel": SUPPORTED,
    "DreamLiteTransformer2DModel": NO_ADALN,
    "EasyAnimateTransformer3DModel": SUPPORTED,
    "ErnieImageTransformer2DModel": SHARED,
    "Flux2Transformer2DModel": SHARED,
    "Flux3Transformer2DModel": SHARED,
    "FluxTransformer2DModel": SUPPORTED,
    "GlmImageTransformer2DModel": SUPPORTED,
    "HeliosTransformer3DModel": TABLES,
    "HiDreamImageTransformer2DModel": SUPPORTED,
    "HunyuanDiT2DModel": SUPPORTED,
    "HunyuanImageTransformer2DModel": SUPPORTED,
    "HunyuanVideo15Transformer3DModel": SUPPORTED,
    "HunyuanVideoFramepackTransformer3DModel": SUPPORTED,
    "HunyuanVideoTransformer3DModel": SUPPORTED,
    "Ideogram4Transformer2DModel": NO_SHIFT,
    "JoyImageEditPlusTransformer3DModel": TABLES,
    "JoyImageEditTransformer3DModel": TABLES,
    "Kandinsky5Transformer3DModel": CAST,
    "Kandinsky6SRTransformer3DModel": CAST,
    "Kandinsky6Transformer3DModel": CAST,
    "Krea2Transformer2DModel": TABLES,
    "LTX2VideoTransformer3DModel": TABLES,
    "LTXVideoTransformer3DModel": TABLES,
    "LatteTransformer3DModel": TABLES,
    "LongCatAudioDiTTransformer": TABLES,
    "LongCatImageTransformer2DModel": SUPPORTED,
    "Lumina2Transformer2DModel": NO_SHIFT,
    "LuminaNextDiT2DModel": NO_SHIFT,
    "MiniMaxH3Transformer3DModel": SELECTED,
    "MiniMaxMusic3RVQDepthDecoder": NO_ADALN,
    "MiniMaxMusic3Transformer1DModel": NO_ADALN,
    "MochiTransformer3DModel": LAST_ONLY,
    "MotifVideoTransformer3DModel": SUPPORTED,
    "NucleusMoEImageTransformer2DModel": LAST_ONLY,
    "OmniGenTransformer2DModel": LAST_ONLY,
    "OvisImageTransformer2DModel": SUPPORTED,
    "PRXTransformer2DModel": SUPPORTED,
    "PixArtTransformer2DModel": TABLES,
    "PriorTransformer": NO_ADALN,
    "QwenImage21Transformer2DModel": NO_SHIFT,
    "QwenImageTransformer2DModel": SUPPORTED,
    "RFD4ProteinaTransformer": OTHER_NORM,
    "SD3Transformer2DModel": SUPPORTED,
    "SanaTransformer2DModel": TABLES,
    "SanaVideoTransformer3DModel": TABLES,
    "SanaWMLTX2RefinerTransformer3DModel": TABLES,
    "SanaWMTransformer3DModel": TABLES,
    "SkyReelsV2Transformer3DModel": TABLES,
    "StableAudio3DiTModel": TABLES,
    "StableAudioDiTModel": NO_ADALN,
    "T5FilmDecoder": FILM,
    "Transformer2DModel": SUPPORTED,
    "TransformerTemporalModel": NO_ADALN,
    "WanAnimate2Transformer3DModel": TABLES,
    "WanAnimateTransformer3DModel": TABLES,
    "WanTransformer3DModel": TABLES,
    "WanVACETransformer3DModel": TABLES,
    "ZImageTransformer2DModel": NO_SHIFT,
}
# Of this package.
NATIVE = "MPDiTTransformer2DModel"


def supported_names() -> list[str]:
    """Class names of models that `swap_adaln_for_rotation` accepts."""
    return sorted([NATIVE, *(name for name, state in COVERAGE.items() if state == SUPPORTED)])
