"""Tiny real transformers whose modulation is AdaLN-single: one map for all blocks, to which each adds a table."""

from tiny_transformers import LABELS


BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
TEXT = {**BLOCKS, "cross_attention_dim": 16, "caption_channels": 12}
WAN = {**BLOCKS, "attention_head_dim": 12, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32}
AUDIO = {
    **{"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_in_channels": 4},
    **{"audio_out_channels": 4, "audio_cross_attention_dim": 16},
}
JOY = {
    **{"in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "text_dim": 12, "mlp_width_ratio": 2.0},
    **{"num_layers": 2, "rope_dim_list": [4, 2, 2]},
}
SANA = {**TEXT, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "sample_size": 4}
# Class → config.
CONFIGS = {
    "AceStepTransformer1DModel": {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4},
    },
    "AllegroTransformer3DModel": {
        **{**TEXT, "attention_head_dim": 24, "cross_attention_dim": 48},
        **{"sample_width": 4, "sample_height": 4, "sample_frames": 4},
    },
    "AnyFlowFARTransformer3DModel": WAN,
    "AnyFlowTransformer3DModel": WAN,
    "ChronoEditTransformer3DModel": WAN,
    "HeliosTransformer3DModel": {**WAN, "rope_dim": [4, 4, 4]},
    "JoyImageEditPlusTransformer3DModel": JOY,
    "JoyImageEditTransformer3DModel": JOY,
    "Krea2Transformer2DModel": {
        **{"in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 16, "axes_dims_rope": [4, 2, 2]},
        **{"text_hidden_dim": 12, "num_text_layers": 3, "text_num_attention_heads": 2},
        **{"text_num_key_value_heads": 1, "text_intermediate_size": 24},
    },
    "LTX2VideoTransformer3DModel": {**TEXT, **AUDIO},
    "LTXVideoTransformer3DModel": TEXT,
    "LatteTransformer3DModel": {**TEXT, "sample_size": 4, "patch_size": 2, "norm_type": "ada_norm_single"},
    "LongCatAudioDiTTransformer": {"dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4},
    "PixArtTransformer2DModel": {**TEXT, "sample_size": 4},
    "SanaTransformer2DModel": SANA,
    "SanaVideoTransformer3DModel": {
        **SANA,
        **{"attention_head_dim": 12, "cross_attention_head_dim": 12, "cross_attention_dim": 24},
    },
    "SanaWMLTX2RefinerTransformer3DModel": {**TEXT, **AUDIO},
    "SanaWMTransformer3DModel": {
        **{"in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16},
        **{"softmax_every_n": 2, "chunk_plucker_channels": 6, "caption_channels": 12},
    },
    "SkyReelsV2Transformer3DModel": WAN,
    "StableAudio3DiTModel": {
        **{"io_channels": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "cond_token_dim": 12},
        **{"global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 16, "num_memory_tokens": 3},
    },
    "Transformer2DModel": {
        **LABELS,
        **{"norm_type": "ada_norm_single", "norm_num_groups": 2, "use_additional_conditions": False},
    },
    "WanAnimate2Transformer3DModel": {
        **{"in_dim": 12, "dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 12, "out_dim": 4, "num_heads": 2},
        # Or there are maps of width 1280.
        **{"num_layers": 2, "use_img_emb": False},
    },
    "WanAnimateTransformer3DModel": {
        **{**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 10, "added_kv_proj_dim": 24},
        **{"motion_encoder_channel_sizes": {"4": 6, "8": 5}, "motion_encoder_size": 8, "motion_style_dim": 6},
        **{"motion_dim": 3, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2},
        "inject_face_latents_blocks": 2,
    },
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": {**WAN, "vace_layers": [0], "vace_in_channels": 8},
}
