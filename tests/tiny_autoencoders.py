"""A small real autoencoder of each supported class, with statistics that are not trivial and of these images."""

import types

import diffusers
import torch


_CONV = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_CONV |= {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "mid_block_add_attention": False}
_QWEN = {"base_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True], "z_dim": 4}
_QWEN |= {"latents_mean": [0.5, -0.25, 0.0, 1.0], "latents_std": [0.5, 2.0, 1.5, 0.75]}
_RAE = {"encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1, "encoder_input_size": 8}
_RAE |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
_RAE |= {"decoder_intermediate_size": 16, "patch_size": 8, "scaling_factor": 1.1}
_TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
_TINY |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "scaling_factor": 0.6, "shift_factor": -0.3}
_CONSISTENCY = {"encoder_down_block_types": ("DownEncoderBlock2D",) * 2, "encoder_norm_num_groups": 4}
_CONSISTENCY |= {"encoder_block_out_channels": (8, 8), "encoder_layers_per_block": 1, "decoder_norm_num_groups": 4}
_CONSISTENCY |= {"decoder_block_out_channels": (8, 8), "decoder_layers_per_block": 1, "scaling_factor": 0.7}
_CONSISTENCY |= {"decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2}
_CONSISTENCY |= {"decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2}

# The class, its arguments, channels and factor of its latents. Images of RAE are 16 x 16, all others' of any size.
CASES = {
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            **{"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3},
            **{"down_block_out_channels": (8, 8, 8), "up_block_out_channels": (8, 8, 8), "norm_num_groups": 4},
            "scaling_factor": 0.3,
        },
        (4, 4),
    ),
    "consistency": ("ConsistencyDecoderVAE", _CONSISTENCY, (4, 2)),
    "dc": (
        "AutoencoderDC",
        {
            **{"encoder_block_out_channels": (8, 8, 16), "decoder_block_out_channels": (8, 8, 16)},
            **{"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1), "latent_channels": 8},
            **{"encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ())},
            "scaling_factor": 0.4,
        },
        (8, 4),
    ),
    "flux": ("AutoencoderKL", _CONV | {"scaling_factor": 0.36, "shift_factor": 0.12, "latent_channels": 16}, (16, 2)),
    "flux2": ("AutoencoderKLFlux2", _CONV | {"latent_channels": 4, "batch_norm_eps": 1e-2}, (16, 4)),
    "hunyuan_image": (
        "AutoencoderKLHunyuanImage",
        {
            **{"in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (32, 32)},
            **{"layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.75},
        },
        (16, 2),
    ),
    "kl": ("AutoencoderKL", _CONV | {"scaling_factor": 0.18215}, (4, 2)),
    "kvae": (
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1)},
        (4, 2),
    ),
    "qwen": ("AutoencoderKLQwenImage", _QWEN, (4, 2)),
    "qwen21": (
        "AutoencoderKLQwenImage21",
        _QWEN | {"decoder_base_dim": 4, "in_channels": 3, "out_channels": 3},
        (4, 2),
    ),
    "rae_dinov2": ("AutoencoderRAE", _RAE | {"encoder_type": "dinov2"}, (64, 8)),
    "rae_mae": ("AutoencoderRAE", _RAE | {"encoder_type": "mae"}, (64, 8)),
    "sdxl": (
        "AutoencoderKL",
        _CONV | {"scaling_factor": 0.5, "latents_mean": [1.0, -1.0, 0.5, 0.0], "latents_std": [2.0, 0.5, 1.0, 3.0]},
        (4, 2),
    ),
    "tiny": ("AutoencoderTiny", _TINY, (4, 2)),
    "vq": ("VQModel", _CONV | {"num_vq_embeddings": 16, "vq_embed_dim": 5, "scaling_factor": 0.8}, (5, 2)),
    "vq_spatial": (
        "VQModel",
        _CONV
        | {"num_vq_embeddings": 16, "latent_channels": 4, "norm_type": "spatial", "block_out_channels": (32, 32)},
        (4, 2),
    ),
}
# Those that bring statistics of their own.
STANDARDISED = ("flux2", "rae_dinov2", "rae_mae")


@torch.no_grad()
def make(case, images, seed=0, **overrides):
    """The autoencoder of a case; what it brings of statistics is that of `images`, in [-1, 1]."""
    name, config = CASES[case][0], CASES[case][1] | overrides
    torch.manual_seed(seed)
    vae = getattr(diffusers, name)(**config).eval()
    if case == "flux2":
        latents = packed(vae.encode(images).latent_dist.sample())
        vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
        vae.bn.running_var.copy_(latents.var((0, 2, 3)))
    if case.startswith("rae"):
        latents = vae.encode((images + 1) / 2).latent / config["scaling_factor"]
        # Of each channel and position.
        statistics = {"latents_mean": latents.mean(0), "latents_std": latents.std(0) * config["scaling_factor"]}
        weights = vae.state_dict() | {f"_{key}": value for key, value in statistics.items()}
        vae = type(vae)(**config, **statistics).eval()
        vae.load_state_dict(weights)
    return vae


def packed(latents):
    """Of FLUX.2: 2 x 2 positions in one."""
    return diffusers.Flux2Pipeline._patchify_latents(latents)


def random_images(count=12):
    """In [-1, 1], shape (count, 3, 16, 16)."""
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


# What diffusers' own pipelines do with these classes, for comparison.


@torch.no_grad()
def latents_of_diffusers(case, vae, images):
    """Mean and std of the latents, None of a point; as its pipelines encode images."""
    if case == "flux2":
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        pipe = types.SimpleNamespace(vae=vae, _patchify_latents=packed)
        mean = diffusers.Flux2Pipeline._encode_vae_image(pipe, images, None)
        return mean, packed(vae.encode(images).latent_dist.std) / std
    if case.startswith("qwen"):
        posterior = vae.encode(images.unsqueeze(2)).latent_dist
        return posterior.mean.squeeze(2), posterior.std.squeeze(2)
    if case.startswith("rae"):
        return vae.encode(images / 2 + 0.5).latent, None
    encoded = vae.encode(images)
    if "latent_dist" in encoded:
        return encoded.latent_dist.mean, encoded.latent_dist.std
    return encoded[0], None


@torch.no_grad()
def images_of_diffusers(case, vae, latents, generator=None):
    """Images in [-1, 1] of latents as `latents_of_diffusers` gives them; as its pipelines decode."""
    if case == "flux2":
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        latents = latents * std + vae.bn.running_mean.view(1, -1, 1, 1)
        return vae.decode(diffusers.Flux2Pipeline._unpatchify_latents(latents)).sample
    if case.startswith("qwen"):
        return vae.decode(latents[:, :, None]).sample[:, :, 0]
    if case.startswith("rae"):
        return vae.decode(latents).sample * 2 - 1
    if case == "consistency":
        return vae.decode(latents, generator=generator).sample
    if case == "vq_spatial":  # as Kandinsky's
        return vae.decode(latents, force_not_quantize=True).sample
    return vae.decode(latents).sample


def unscaled_by_diffusers(case, vae, latents):
    """Latents of standard deviation 1, as a pipeline without statistics of its data has them, before decoding."""
    config = vae.config
    if case.startswith(("qwen", "sdxl")):
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return latents * std / config.get("scaling_factor", 1.0) + mean
    if case in ("flux", "tiny"):
        return latents / config.scaling_factor + config.shift_factor
    if case in ("kvae", *STANDARDISED):
        return latents
    return latents / config.scaling_factor
