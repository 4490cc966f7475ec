"""The models that are compared, of one size, their inputs, and what they are timed at."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel

from diffusers_mp import MPDiTTransformer2DModel, PowerFunctionEMA, get_preset, normalize_weights_, parameter_groups


NUM_CLASSES = 1000
E, E_SHIFT, F_BOUND, A, STOCK = "E rotate", "E shift", "F rotate", "A", "diffusers"
E_FUSED, A_FUSED = "E rotate, fused q/k/v", "A, fused q/k/v"
CONFIGURATIONS = {
    E: ("E", ("scale", "rotate", "gate")),
    E_SHIFT: ("E", ("scale", "shift", "gate")),
    F_BOUND: ("F", ("scale", "rotate", "gate")),
    A: ("A", ("scale", "shift", "gate")),
}
LABELS = {
    **{E: "E", E_SHIFT: "E with shift", F_BOUND: "F", A: "A", STOCK: "diffusers' DiT"},
    **{E_FUSED: "E with fused q/k/v", A_FUSED: "A with fused q/k/v"},
}


def config_of(name: str, size: str, sample_size: int, **overrides: int) -> dict[str, Any]:
    """What a model is made with: a preset with `overrides`, and as much of it as diffusers' DiT knows."""
    overrides = {
        "sample_size": sample_size,
        "num_classes": NUM_CLASSES,
        "in_channels": 4,
        "out_channels": 8,
        **overrides,
    }
    config = get_preset(size, *CONFIGURATIONS[A if name == STOCK else name], **overrides)
    if name != STOCK:
        return config
    shared = ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size", "sample_size")
    config = {key: config[key] for key in (*shared, "in_channels", "out_channels")}
    return {**config, "num_embeds_ada_norm": NUM_CLASSES}


def build_models(
    size: str,
    sample_size: int,
    device: torch.device,
    names: Sequence[str] = (*CONFIGURATIONS, STOCK),
    **overrides: int,
) -> dict[str, torch.nn.Module]:
    """The named models, made on the device; `overrides` are of the preset."""
    torch.manual_seed(0)
    models = {}
    with torch.device(device):
        for name in names:
            model_class = DiTTransformer2DModel if name == STOCK else MPDiTTransformer2DModel
            models[name] = model_class(**config_of(name, size, sample_size, **overrides))
        for model in models.values():
            for name, parameter in model.named_parameters():
                if name.endswith("gain") or not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1 if name.endswith("gain") else 0.02)
    # Positions come from NumPy, whatever the device.
    return {name: model.to(device) for name, model in models.items()}


def build_inputs(sample_size: int, batch_size: int, device: torch.device, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch_size, 4, sample_size, sample_size, generator=generator).to(device, dtype),
        "timestep": torch.randint(0, 1000, (batch_size,), generator=generator).to(device),
        "class_labels": torch.randint(0, NUM_CLASSES, (batch_size,), generator=generator).to(device),
    }


def in_dtype_of(inputs, model):
    model, dtype = copy.deepcopy(model).eval(), inputs["hidden_states"].dtype
    return model if model.dtype == dtype else model.to(dtype)


def forward_of(model, inputs, compiled: bool) -> Callable[[], torch.Tensor]:
    function = torch.compile(model, fullgraph=True) if compiled else model
    return lambda: function(**inputs, return_dict=False)[0]


def without_gradient(function: Callable[[], object]) -> Callable[[], object]:
    def call():
        with torch.no_grad():
            return function()

    return call


def training_step(model, forward: Callable[[], torch.Tensor], target: torch.Tensor, autocast):
    """A function that updates a model in training, and one that does what follows the optimiser in it.

    The model's rows must be trusted, as they are normalised here.
    """
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-4), betas=(0.9, 0.99), fused=True)
    ema = PowerFunctionEMA(model, (0.05, 0.10))

    def maintain():
        normalize_weights_(model)
        ema.update(ema.step + 1)

    def step():
        with autocast:
            prediction = forward()
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        maintain()
        return loss.detach()

    return step, maintain
