"""Tiny real transformers whose modulation is AdaLN-single: one map for all blocks, to which each adds a table."""

from tiny_transformers import LABELS


BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
TEXT = {**BLOCKS, "cross_attention_dim": 16, "caption_channels": 12}
WAN = {**BLOCKS, "attention_head_dim": 12, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32}
AUDIO = {
    **{"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_in_channels": 4},
    **{"audio_out_channels": 4, "audio_cross_attention_dim": 16},
}
SANA = {**TEXT, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "sample_size": 4}
# Class → config.
CONFIGS = {
    "AllegroTransformer3DModel": {
        **{**TEXT, "attention_head_dim": 24, "cross_attention_dim": 48},
        **{"sample_width": 4, "sample_height": 4, "sample_frames": 4},
    },
    "ChronoEditTransformer3DModel": WAN,
    "LTX2VideoTransformer3DModel": {**TEXT, **AUDIO},
    "LTXVideoTransformer3DModel": TEXT,
    "LatteTransformer3DModel": {**TEXT, "sample_size": 4, "patch_size": 2},
    "PixArtTransformer2DModel": {**TEXT, "sample_size": 4},
    "SanaTransformer2DModel": SANA,
    "SanaVideoTransformer3DModel": {
        **SANA,
        **{"attention_head_dim": 12, "cross_attention_head_dim": 12, "cross_attention_dim": 24},
    },
    "SkyReelsV2Transformer3DModel": WAN,
    "Transformer2DModel": {
        **LABELS,
        **{"norm_type": "ada_norm_single", "norm_num_groups": 2, "use_additional_conditions": False},
    },
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": {**WAN, "vace_layers": [0], "vace_in_channels": 8},
}
