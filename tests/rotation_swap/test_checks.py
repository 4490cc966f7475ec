"""What the swap refuses, and that it then leaves the model as it was."""

import math
import re

import diffusers
import peft
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from helpers import relative_error, tiny_model
from tiny_transformers import LABELS, make, run
from torch import nn

from diffusers_mp import (
    drop_shift_,
    set_shift_scale,
    swap_adaln_for_rotation,
    unswap_rotation,
)


def assert_refused(model, message, error=ValueError, **options):
    """The call raises, and leaves class, config, weights and modules of the model as they were."""
    state = {key: value.clone() if not value.is_meta else value for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    config = dict(getattr(model, "config", {}))
    model_class = type(model)
    with pytest.raises(error, match=message):
        swap_adaln_for_rotation(model, **options)
    assert type(model) is model_class
    assert dict(getattr(model, "config", {})) == config
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, state[key])
    assert not any(module._forward_hooks for name, module in model.named_modules() if "norm1.linear" in name)


@pytest.mark.parametrize("keep_shift", [False, True])
def test_already_swapped(keep_shift):
    model, _ = make("DiT")
    swap_adaln_for_rotation(model, keep_shift=keep_shift)
    assert_refused(model, "`model` must not be swapped already; `unswap_rotation` is the way back")


class QuantisedWeight(torch.Tensor):
    """As torchao does it: the weight of a plain nn.Linear is of a subclass."""


class QuantisedLinear(nn.Linear):
    """As bitsandbytes does it: a subclass of nn.Linear."""


def quantise(kind):
    model, _ = make("Flux")
    norm = model.single_transformer_blocks[0].norm
    if kind == "weight":
        norm.linear.weight = nn.Parameter(norm.linear.weight.data.as_subclass(QuantisedWeight))
    elif kind == "module":
        norm.linear.__class__ = QuantisedLinear
    else:
        norm.linear.weight = nn.Parameter((norm.linear.weight * 100).to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "kind, found",
    [
        ("weight", "torch.nn.modules.linear.Linear whose weight is a test_checks.QuantisedWeight"),
        ("module", "test_checks.QuantisedLinear whose weight is a torch.Tensor of torch.float32"),
        ("integers", "torch.nn.modules.linear.Linear whose weight is a torch.Tensor of torch.int8"),
    ],
)
def test_quantised_maps_cannot_be_cut(kind, found):
    assert_refused(
        quantise(kind),
        "must have plain linear maps for their shift rows to be cut out, single_transformer_blocks.0.norm.linear is a "
        f"{found}.*: swap before quantising or loading a LoRA, or keep the rows with `keep_shift=True`",
    )


@pytest.mark.parametrize("kind", ["weight", "module"])
def test_quantised_maps_are_used_whole_with_kept_shifts(kind):
    stock, model = quantise(kind), quantise(kind)
    inputs = make("Flux")[1]
    swap_adaln_for_rotation(model, keep_shift=True)
    assert torch.equal(run(model, inputs), run(stock, inputs))
    set_shift_scale(model, 0)
    with pytest.raises(ValueError, match="for their shift rows to be cut out"):
        drop_shift_(model)
    unswap_rotation(model)
    assert torch.equal(run(model, inputs), run(stock, inputs))


class IntegerLinear(nn.Linear):
    """As bitsandbytes does it: integers and a scale, multiplied in the dtype of the bias."""

    @classmethod
    def of(cls, linear):
        linear.__class__ = cls
        linear.scale = linear.weight.detach().abs().max() / 127
        linear.weight = nn.Parameter((linear.weight / linear.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, input):
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale, self.bias)


def test_rotations_beside_quantised_maps_compute_in_the_dtype_of_the_model():
    stock, model = make("Flux")[0].bfloat16(), make("Flux")[0].bfloat16()
    for each in (stock, model):
        for block in each.single_transformer_blocks:
            IntegerLinear.of(block.norm.linear)
    inputs = {
        name: value.bfloat16() if value.dtype == torch.float32 else value for name, value in make("Flux")[1].items()
    }
    swap_adaln_for_rotation(model, keep_shift=True)
    assert model.single_transformer_blocks[0].norm.linear.rotation.weight.dtype == torch.bfloat16
    assert torch.equal(run(model, inputs), run(stock, inputs))


def with_lora(targets):
    model, inputs = make("Flux")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model, inputs


def test_lora_on_the_maps():
    model, inputs = with_lora(["norm1.linear"])
    expected = run(model, inputs)
    assert_refused(model, "norm1.linear is a peft.tuners.lora.layer.Linear .* loading a LoRA, or keep the rows")
    swap_adaln_for_rotation(model, keep_shift=True)
    assert torch.equal(run(model, inputs), expected)
    model.unload_lora()
    assert relative_error(run(model, inputs), expected) > 1e-3
    assert torch.equal(run(model, inputs), run(*make("Flux")))


def test_lora_elsewhere_does_not_matter():
    model, inputs = with_lora(["to_q", "to_k"])
    swap_adaln_for_rotation(model)
    value = run(model, inputs)
    model.disable_lora()
    assert relative_error(run(model, inputs), value) > 1e-3


def test_lora_loads_into_a_swapped_model(tmp_path):
    with_lora(["to_q", "to_k"])[0].save_lora_adapter(tmp_path)
    model, inputs = make("Flux")
    swap_adaln_for_rotation(model)
    before = run(model, inputs)
    model.load_lora_adapter(
        tmp_path, prefix=None, use_safetensors=True, weight_name="pytorch_lora_weights.safetensors"
    )
    assert relative_error(run(model, inputs), before) > 1e-3


def test_lora_that_targets_swapped_maps_is_refused_by_peft():
    model, inputs = make("Flux")
    swap_adaln_for_rotation(model)
    with pytest.raises(ValueError, match=re.compile("Target module RotationLinear.* is not supported", re.DOTALL)):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["norm1.linear"]))
    # The heads and the kept rows are plain linear maps, which may carry one.
    model, inputs = make("Flux")
    swap_adaln_for_rotation(model)
    before = run(model, inputs)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["rotation", "linear.linear"], init_lora_weights=False))
    assert relative_error(run(model, inputs), before) > 1e-3
    with pytest.raises(ValueError, match="to be put together again, .* is a peft.tuners.*merge or unload the LoRA"):
        unswap_rotation(model, make("Flux")[0])


def odd_model():
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=4,
        num_mmdit_layers=1,
        num_single_dit_layers=0,
        num_attention_heads=3,
        attention_head_dim=5,
        joint_attention_dim=12,
        caption_projection_dim=15,
        pos_embed_max_size=16,
    )


@pytest.mark.parametrize("keep_shift", [False, True])
def test_odd_width(keep_shift):
    message = "maps of even width, .*; joint_transformer_blocks.0.norm1.linear has 90 rows for 6 maps"
    assert_refused(odd_model(), message, keep_shift=keep_shift)


def test_meta_device():
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(**LABELS)
    assert_refused(model, "`model` must hold weights, some of its tensors are on the meta device: load it first")


@pytest.mark.parametrize(
    "attach",
    [
        # Its weights are on the meta device then: loading them is not what helps.
        lambda model: cpu_offload(model, execution_device="cpu"),
        lambda model: cpu_offload_with_hook(model, execution_device="cpu"),
        lambda model: model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        ),
        lambda model: model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, skip_modules_pattern=["norm"]
        ),
        lambda model: model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1)),
    ],
)
def test_hooks(attach):
    model, _ = make("Flux")
    attach(model)
    assert_refused(
        model,
        r"must be without hooks \(offloading, device_map, layerwise casting, caches\), .* has one: attach them "
        "afterwards",
    )


@pytest.mark.parametrize(
    "compile_",
    [lambda model: model.compile(backend="eager"), lambda model: model.compile_repeated_blocks(backend="eager")],
)
def test_compiled_in_place(compile_):
    model, _ = make("Flux")
    compile_(model)
    assert_refused(model, "`model` must not be compiled yet, .* is: swap first")


def test_compiled():
    model, _ = make("Flux")
    with pytest.raises(ValueError, match="`model` must not be compiled yet, it is: swap first"):
        swap_adaln_for_rotation(torch.compile(model, backend="eager"))
    assert type(model) is diffusers.FluxTransformer2DModel


def test_unsupported_class():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=4,
        caption_channels=8,
    )
    assert_refused(
        model,
        r"`model` must be one of AuraFlowTransformer2DModel, .*MPDiTTransformer2DModel, .*Transformer2DModel, got a "
        r"diffusers\.models\.transformers\.pixart_transformer_2d\.PixArtTransformer2DModel; "
        r"docs/rotation_swap_coverage\.md says what stands in the way of others",
        TypeError,
    )
    assert_refused(nn.Linear(2, 2), "got a torch.nn.modules.linear.Linear", TypeError)


def test_own_class_of_a_supported_name():
    model, _ = make("Flux")
    model.__class__ = type("FluxTransformer2DModel", (diffusers.FluxTransformer2DModel,), {})
    assert_refused(model, "`model` must be one of .* got a test_checks.FluxTransformer2DModel", TypeError)


@pytest.mark.parametrize("norm_type", ["ada_norm", "layer_norm", "ada_norm_single"])
def test_transformer_2d_without_such_shifts(norm_type):
    config = {key: value for key, value in LABELS.items() if key != "patch_size" or norm_type == "ada_norm_single"}
    if norm_type == "layer_norm":
        del config["num_embeds_ada_norm"]
    if norm_type == "ada_norm_single":
        config["use_additional_conditions"] = False
    model = diffusers.Transformer2DModel(**config, norm_type=norm_type, norm_num_groups=2)
    assert_refused(
        model,
        "`model` must have AdaLN shifts in the chosen sublayers, this Transformer2DModel has none "
        rf"\(its `norm_type` is '{norm_type}'\)",
    )


def test_sublayer_that_a_model_lacks():
    model, _ = make("HunyuanDiT")
    assert_refused(model, "AdaLN shifts in the chosen sublayers, this HunyuanDiT2DModel has none", sublayers=["mlp"])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"sublayers": "mlp"},
            r"`sublayers` must be a non-empty list out of \['attention', 'mlp', 'final'\], got 'mlp'",
        ),
        ({"sublayers": []}, r"`sublayers` must be a non-empty list .* got \[\]"),
        ({"sublayers": ["mlp", "head"]}, r"`sublayers` must be .* got \['mlp', 'head'\]"),
        ({"keep_shift": True, "shift_scale": 1.5}, r"`shift_scale` must be in \[0, 1\], got 1.5"),
        ({"keep_shift": True, "shift_scale": -0.1}, r"`shift_scale` must be in \[0, 1\], got -0.1"),
        ({"keep_shift": True, "shift_scale": math.nan}, r"`shift_scale` must be in \[0, 1\], got nan"),
        ({"shift_scale": 0.5}, "`shift_scale` must be left at 1 without `keep_shift`, got 0.5"),
        ({"rank": 0}, "`rank` must be a positive integer or None, got 0"),
        ({"rank": 1.5}, "`rank` must be a positive integer or None, got 1.5"),
        ({"rank": True}, "`rank` must be a positive integer or None, got True"),
        ({"calibration": []}, "`calibration` must run every modulation of the model at least once, it did not run"),
        ({"calibration": make("DiT")[1]}, "`calibration` must be an iterable of mappings, got a dict"),
        (
            {"calibration": [make("DiT")[1], (1, 2)]},
            "`calibration` must be an iterable of mappings, got a tuple in it",
        ),
        ({"calibration": torch.zeros(2, 4)}, "`calibration` must be an iterable of mappings, got a Tensor in it"),
    ],
)
def test_arguments(options, message):
    assert_refused(make("DiT")[0], message, **options)


def test_calibration_that_fails_midway():
    model, inputs = make("DiT")
    model.train()
    wrong = {**inputs, "hidden_states": torch.randn(2, 3, 4, 4)}
    assert_refused(model, "channels", RuntimeError, calibration=[inputs, wrong])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "options",
    [{"sublayers": ["mlp"]}, {"keep_shift": True, "shift_scale": 0.5}, {"calibration": [{}]}, {"rank": 2}],
)
def test_options_that_the_native_swap_lacks(options):
    assert_refused(
        tiny_model("E", ["scale", "shift", "gate"]),
        "`sublayers`, `shift_scale`, `calibration` and `rank` must be left out for MPDiTTransformer2DModel",
        **options,
    )


@pytest.mark.parametrize("modulation", [["scale", "gate"], ["scale", "rotate", "gate"], ["scale", "shift", "rotate"]])
def test_native_without_shift_or_with_rotation(modulation):
    message = "`model` must have shift and no rotation among its modulations, it has"
    assert_refused(tiny_model("E", modulation), message)


def test_native_with_a_lora_in_the_maps():
    model = tiny_model("E", ["scale", "shift", "gate"])
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["attn_modulation.proj"]))
    assert_refused(model, "must have plain modulation maps: .* is a Linear of Tensor")


def test_native_swapped_twice():
    model = tiny_model("E", ["scale", "shift", "gate"])
    swap_adaln_for_rotation(model)
    assert_refused(model, r"must have shift and no rotation .*, it has \['scale', 'gate', 'rotate'\]")
