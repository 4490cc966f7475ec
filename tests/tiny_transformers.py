"""A tiny real instance of every transformer that the rotation swap supports."""

import diffusers
import torch
from tiny_inputs_of_transformers import (
    HEADS,
    auraflow_inputs,
    cogview_inputs,
    consisid_inputs,
    easyanimate_inputs,
    fibo_inputs,
    framepack_inputs,
    glm_inputs,
    hidream_inputs,
    hunyuan_dit_inputs,
    hunyuan_image_inputs,
    hunyuan_video15_inputs,
    hunyuan_video_inputs,
    label_inputs,
    motif_inputs,
    packed_inputs,
    prx_inputs,
    qwen_inputs,
    sd3_inputs,
    video_inputs,
)


LABELS = {**HEADS, "in_channels": 4, "num_layers": 2, "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 10}
SD3 = {
    **HEADS,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 4,
}
PACKED = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 12,
    "axes_dims_rope": [4, 2, 2],
}
VIDEO = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 6,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 3,
}
HUNYUAN_VIDEO = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "pooled_projection_dim": 6,
    "rope_axes_dim": [4, 2, 2],
}
QWEN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 1,
    "num_layers": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": [4, 2, 2],
}
COGVIEW = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 12,
    "time_embed_dim": 6,
    "condition_dim": 4,
}

# Name of the case → class, config, inputs.
CASES = {
    "DiT": ("DiTTransformer2DModel", LABELS, label_inputs),
    "Transformer2D": (
        "Transformer2DModel",
        {**LABELS, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "attention_bias": True},
        label_inputs,
    ),
    "SD3": ("SD3Transformer2DModel", SD3, sd3_inputs),
    "SD3.5": ("SD3Transformer2DModel", {**SD3, "dual_attention_layers": [0], "qk_norm": "rms_norm"}, sd3_inputs),
    "Flux": (
        "FluxTransformer2DModel",
        {**PACKED, "pooled_projection_dim": 6},
        lambda: packed_inputs(pooled=6),
    ),
    "Flux guided": (
        "FluxTransformer2DModel",
        {**PACKED, "pooled_projection_dim": 6, "guidance_embeds": True},
        lambda: packed_inputs(pooled=6, guidance=True),
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        {
            **HEADS,
            "sample_size": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        auraflow_inputs,
    ),
    "CogVideoX": ("CogVideoXTransformer3DModel", VIDEO, video_inputs),
    "HunyuanDiT": (
        "HunyuanDiT2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 4,
            "hidden_size": 16,
            "num_layers": 4,
            "mlp_ratio": 2.0,
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 6,
            "text_len": 3,
            "text_len_t5": 3,
        },
        hunyuan_dit_inputs,
    ),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", HUNYUAN_VIDEO, hunyuan_video_inputs),
    "HunyuanVideo token_replace": (
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN_VIDEO, "image_condition_type": "token_replace"},
        hunyuan_video_inputs,
    ),
    "QwenImage": ("QwenImageTransformer2DModel", QWEN, qwen_inputs),
    "QwenImage edit plus": (
        "QwenImageTransformer2DModel",
        {**QWEN, "zero_cond_t": True},
        lambda: qwen_inputs(edit=True),
    ),
    "Bria": ("BriaTransformer2DModel", {**PACKED, "pooled_projection_dim": None}, packed_inputs),
    "BriaFibo": ("BriaFiboTransformer2DModel", {**PACKED, "text_encoder_dim": 6}, fibo_inputs),
    "LongCatImage": ("LongCatImageTransformer2DModel", {**PACKED, "pooled_projection_dim": 6}, packed_inputs),
    "OvisImage": ("OvisImageTransformer2DModel", {**PACKED, "out_channels": 4}, packed_inputs),
    "HunyuanImage": (
        "HunyuanImageTransformer2DModel",
        {
            **{key: value for key, value in HUNYUAN_VIDEO.items() if key != "pooled_projection_dim"},
            "patch_size": [1, 1],
            "rope_axes_dim": [4, 4],
        },
        hunyuan_image_inputs,
    ),
    "HunyuanVideoFramepack": (
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN_VIDEO, "has_image_proj": True, "image_proj_dim": 6, "has_clean_x_embedder": True},
        framepack_inputs,
    ),
    "HunyuanVideo15": (
        "HunyuanVideo15Transformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 12,
            "text_embed_2_dim": 10,
            "image_embed_dim": 6,
            "rope_axes_dim": [4, 2, 2],
        },
        hunyuan_video15_inputs,
    ),
    "MotifVideo": (
        "MotifVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 12,
            "rope_axes_dim": [4, 2, 2],
        },
        motif_inputs,
    ),
    "ConsisID": (
        "ConsisIDTransformer3DModel",
        {
            **VIDEO,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 16,
            "LFE_vit_dim": 16,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 3,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
        },
        consisid_inputs,
    ),
    "EasyAnimate": (
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 4,
            "sample_height": 4,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 6,
            "text_embed_dim": 12,
        },
        easyanimate_inputs,
    ),
    "CogView3Plus": (
        "CogView3PlusTransformer2DModel",
        {**COGVIEW, "pos_embed_max_size": 4, "sample_size": 4},
        cogview_inputs,
    ),
    "CogView4": (
        "CogView4Transformer2DModel",
        {**COGVIEW, "pos_embed_max_size": 4, "sample_size": 4, "rope_axes_dim": [4, 4]},
        cogview_inputs,
    ),
    "GlmImage": (
        "GlmImageTransformer2DModel",
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 8},
        glm_inputs,
    ),
    "HiDream": (
        "HiDreamImageTransformer2DModel",
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [12, 10],
            "text_emb_dim": 6,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": [4, 2, 2],
            "max_resolution": [4, 4],
            "llama_layers": [0, 1],
            # Or experts sample their loss in training mode.
            "force_inference_output": True,
        },
        hidream_inputs,
    ),
    "PRX": (
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 12,
            "hidden_size": 16,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        prx_inputs,
    ),
}


def fill_(model, seed=0):
    """Make every parameter random, so that nothing that starts at zero or one hides behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            std = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            mean = float(parameter.ndim == 1 and name.endswith("weight"))  # of a norm
            parameter.normal_(mean, std, generator=generator)
    return model


def make(case, dtype=torch.float32):
    """Model of a case, in evaluation mode, and inputs."""
    class_name, config, inputs = CASES[case]
    model = fill_(getattr(diffusers, class_name)(**config)).eval()
    if dtype != torch.float32:
        model.to(dtype)
    return model, cast(inputs(), dtype)


def cast(inputs, dtype):
    """Inputs with their floating-point tensors in another type."""

    def convert(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return type(value)(convert(item) for item in value)
        return value

    return {name: convert(value) for name, value in inputs.items()}


def run(model, inputs):
    return model(**inputs, return_dict=False)[0]
