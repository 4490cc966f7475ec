"""A tiny real instance of every transformer that the rotation swap supports, and inputs for it."""

import diffusers
import torch


BATCH = 2
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timestep():
    """Exact in bfloat16, as are their 1024th parts."""
    return torch.tensor([768.0, 16.0])


def label_inputs(channels=4, labels=10):
    return {
        "hidden_states": randn(BATCH, channels, 4, 4),
        "timestep": torch.tensor([900, 20]),
        "class_labels": torch.tensor([1, labels - 1]),
    }


def sd3_inputs():
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "pooled_projections": randn(BATCH, 6, seed=2),
        "timestep": timestep(),
    }


def packed_inputs(pooled=None, guidance=False, ids_dim=3):
    """Of the transformers that take packed tokens and their positions, as Flux does."""
    image_ids = torch.zeros(4, ids_dim)
    image_ids[:, 1], image_ids[:, 2] = torch.arange(4) // 2, torch.arange(4) % 2
    inputs = {
        "hidden_states": randn(BATCH, 4, 4),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "timestep": timestep() / 1024,
        "img_ids": image_ids,
        "txt_ids": torch.zeros(3, ids_dim),
    }
    if pooled:
        inputs["pooled_projections"] = randn(BATCH, pooled, seed=2)
    if guidance:
        inputs["guidance"] = torch.tensor([3.5, 1.0])
    return inputs


def fibo_inputs():
    return {**packed_inputs(), "text_encoder_layers": [randn(BATCH, 3, 6, seed=3 + layer) for layer in range(2)]}


def auraflow_inputs():
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "timestep": timestep() / 1024,
    }


def video_inputs():
    return {
        "hidden_states": randn(BATCH, 2, 4, 4, 4),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "timestep": torch.tensor([900, 20]),
    }


def consisid_inputs():
    vit_hidden = [randn(BATCH, 5, 16, seed=7 + scale) for scale in range(5)]
    return {**video_inputs(), "id_cond": randn(BATCH, 16, seed=6), "id_vit_hidden": vit_hidden}


def hunyuan_dit_inputs():
    ones = torch.ones(BATCH, 3, dtype=torch.long)
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "timestep": timestep(),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "text_embedding_mask": ones,
        "encoder_hidden_states_t5": randn(BATCH, 3, 16, seed=2),
        "text_embedding_mask_t5": ones,
        "image_meta_size": torch.tensor([[32.0, 32, 32, 32, 0, 0]] * BATCH),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": tuple(randn(4, 8, seed=seed) for seed in (3, 4)),
    }


def hunyuan_video_inputs(guidance=True):
    inputs = {
        "hidden_states": randn(BATCH, 4, 2, 4, 4),
        "timestep": torch.tensor([900, 20]),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "pooled_projections": randn(BATCH, 6, seed=2),
    }
    return {**inputs, "guidance": torch.tensor([6000.0, 1000.0])} if guidance else inputs


def framepack_inputs():
    return {
        **hunyuan_video_inputs(),
        "hidden_states": randn(BATCH, 4, 2, 8, 8),
        "image_embeds": randn(BATCH, 2, 6, seed=3),
        "indices_latents": torch.arange(2),
        "latents_clean": randn(BATCH, 4, 1, 8, 8, seed=4),
        "indices_latents_clean": torch.arange(1),
        "latents_history_2x": randn(BATCH, 4, 2, 8, 8, seed=5),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": randn(BATCH, 4, 4, 8, 8, seed=6),
        "indices_latents_history_4x": torch.arange(4),
    }


def hunyuan_video15_inputs():
    return {
        "hidden_states": randn(BATCH, 4, 2, 4, 4),
        "timestep": timestep(),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "encoder_attention_mask": torch.ones(BATCH, 3),
        "encoder_hidden_states_2": randn(BATCH, 2, 10, seed=2),
        "encoder_attention_mask_2": torch.ones(BATCH, 2),
        "image_embeds": randn(BATCH, 2, 6, seed=3),
    }


def hunyuan_image_inputs():
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "timestep": timestep(),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "encoder_attention_mask": torch.ones(BATCH, 3),
    }


def motif_inputs():
    return {
        "hidden_states": randn(BATCH, 4, 2, 4, 4),
        "timestep": timestep(),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
    }


def easyanimate_inputs():
    return {
        "hidden_states": randn(BATCH, 4, 2, 4, 4),
        "timestep": timestep(),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
    }


def cogview_inputs():
    sizes = {name: torch.tensor([[32.0, 32.0]] * BATCH) for name in ("original_size", "target_size", "crop_coords")}
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "timestep": torch.tensor([900, 20]),
        **sizes,
    }


def glm_inputs():
    inputs = cogview_inputs()
    del inputs["original_size"]
    return {
        **inputs,
        "prior_token_id": torch.tensor([[0, 1, 2, 3]] * BATCH),
        "prior_token_drop": torch.zeros(BATCH, 4, dtype=torch.bool),
    }


def qwen_inputs(edit=False):
    shapes = [(1, 2, 2), (1, 1, 2)] if edit else [(1, 2, 2)]
    return {
        "hidden_states": randn(BATCH, 6 if edit else 4, 4),
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "timestep": timestep() / 1024,
        "img_shapes": [shapes] * BATCH,
    }


def hidream_inputs():
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "timesteps": timestep(),
        "encoder_hidden_states_t5": randn(BATCH, 3, 12, seed=1),
        "encoder_hidden_states_llama3": randn(2, BATCH, 3, 10, seed=2),
        "pooled_embeds": randn(BATCH, 6, seed=3),
    }


def prx_inputs():
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "timestep": timestep() / 1024,
        "encoder_hidden_states": randn(BATCH, 3, 12, seed=1),
    }


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
            parameter.copy_(mean + torch.randn(parameter.shape, generator=generator) * std)
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
