"""Inputs of the tiny transformers that the rotation swap is tried on."""

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
