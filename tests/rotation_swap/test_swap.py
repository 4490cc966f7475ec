"""The parts of the rotation swap, its options, and what it refuses."""

import copy
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
from torch.nn.functional import silu

import diffusers_mp
from diffusers_mp import (
    drop_shift_,
    functional,
    save_rotation_adapter,
    set_shift_scale,
    swap_adaln_for_rotation,
    unswap_rotation,
)
from diffusers_mp.rotation_swap import ModulationMaps, Rotation, RotationLinear
from diffusers_mp.rotation_swap.linear import rotation_linears
from diffusers_mp.rotation_swap.sites import find_sites


ZERO = ("rotate", "scale", "gate", "rotate", "scale", "gate")


# Values


def rotation(batch=2, dim=6, shift=False):
    return Rotation(torch.randn(batch, dim // 2), torch.randn(batch, dim) if shift else None)


@pytest.mark.parametrize("shift", [False, True])
def test_addition_shifts_and_then_rotates(shift):
    value, tokens = rotation(shift=shift), torch.randn(2, 4, 6)
    shifted = tokens + value.shift[:, None] if shift else tokens
    expected = functional.rotate(shifted, value.angle)
    for indexed in (value[:, None], value[:, None, :], value.unsqueeze(1), value.unsqueeze(dim=1)):
        assert torch.equal(tokens + indexed, expected)
        assert torch.equal(tokens.add(indexed), expected)
    assert torch.equal(value[:, None].added_to(tokens), expected)
    if not shift:
        torch.testing.assert_close(expected.norm(dim=-1), tokens.norm(dim=-1))


def test_gradients_flow_through_addition():
    angle, shift = torch.randn(2, 3, requires_grad=True).double(), torch.randn(2, 6, requires_grad=True).double()
    tokens = torch.randn(2, 4, 6, requires_grad=True).double()
    assert torch.autograd.gradcheck(lambda x, a, h: x + Rotation(a, h)[:, None], (tokens, angle, shift))


@pytest.mark.parametrize("shift", [False, True])
def test_samples_and_choices(shift):
    value = rotation(batch=4, shift=shift)
    assert value.size(0) == 4
    first, second = value[:2], value[2:]
    assert torch.equal(second.angle, value.angle[2:])
    index = torch.tensor([[0, 1, 0], [1, 1, 0]])[..., None]
    chosen = torch.where(index == 0, first.unsqueeze(1), second.unsqueeze(1))
    tokens = torch.randn(2, 3, 6)
    result = tokens + chosen
    for batch in range(2):
        for place in range(3):
            one = (first, second)[index[batch, place, 0]][batch]
            expected = one.added_to(tokens[batch, place])
            torch.testing.assert_close(result[batch, place], expected)


@pytest.mark.parametrize(
    "operation, message",
    [
        (lambda x, r: x * r, "unsupported operand"),
        (lambda x, r: x.sub(r), "can only be added to tokens, got it as an argument of `sub`"),
        (lambda x, r: torch.mul(r, x), "can only be added to tokens, got it as an argument of `mul`"),
        (lambda x, r: torch.cat([x, r]), "can only be added to tokens, got it as an argument of `cat`"),
        (lambda x, r: torch.add(x, r, alpha=2), "can only be added to tokens, got it as an argument of `add`"),
        (lambda x, r: torch.where(x > 0, r, r, out=x), "can only be added to tokens"),
        # In the place of a scale.
        (lambda x, r: x * (1 + r), "unsupported operand"),
        (lambda x, r: torch.cat([ModulationMaps([x, r])]), "must be chunked first, got them as an argument of `cat`"),
        (lambda x, r: x + ModulationMaps([x, r]), "unsupported operand"),
    ],
)
def test_anything_else_is_refused(operation, message):
    with pytest.raises(TypeError, match=message):
        operation(torch.randn(2, 4, 6), rotation()[:, None])


def test_maps_chunk_like_a_tensor():
    rows = torch.randn(2, 24)
    maps = list(rows.chunk(6, dim=-1))
    maps[0], maps[3] = rotation(), rotation()
    value = ModulationMaps(maps)
    assert value.chunk(6, dim=1) == tuple(maps)
    assert torch.chunk(value, 6, dim=1) == tuple(maps)
    assert torch.chunk(value, chunks=6, dim=-1) == tuple(maps)
    halves = value.chunk(2, dim=-1)
    assert halves[1].chunk(3, dim=-1) == tuple(maps[3:])
    shift, scale, _ = value[:, None].chunk(6, dim=-1)[:3]
    assert shift.angle.shape == (2, 1, 3)
    assert torch.equal(scale, maps[1][:, None])


@pytest.mark.parametrize("chunks, dim", [(4, 1), (9, 1), (6, 0), (2, 0)])
def test_maps_chunk_into_equal_groups_of_rows_only(chunks, dim):
    with pytest.raises(ValueError, match=f"`chunks` must divide the 6 maps .* got {chunks} and `dim` {dim}"):
        ModulationMaps([rotation()] * 6).chunk(chunks, dim)


# The linear map


def stock_linear(kinds=ZERO, dim=6, conditioning_dim=5, bias=True):
    return nn.Linear(conditioning_dim, len(kinds) * dim, bias=bias)


@torch.no_grad()
def open_(linear):
    for parameter in linear.rotation.parameters():
        parameter.normal_()
    return linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kinds", [ZERO, ("scale", "rotate"), ("rotate",), ("rotate", "scale", "gate", "shift", "scale")]
)
def test_rows_are_the_stock_ones(kinds, bias):
    stock = stock_linear(kinds, bias=bias)
    linear = open_(RotationLinear(stock, kinds))
    conditioning = torch.randn(2, 5)
    expected = stock(conditioning).chunk(len(kinds), dim=-1)
    value = linear(conditioning)
    value = value.chunk(len(kinds), dim=-1) if len(kinds) > 1 else [value]
    angles = iter(linear.rotation(conditioning).chunk(kinds.count("rotate"), dim=-1))
    for kind, ours, theirs in zip(kinds, value, expected, strict=True):
        if kind == "rotate":
            assert torch.equal(ours.angle, next(angles))
            assert ours.shift is None
        else:
            torch.testing.assert_close(ours, theirs)


def test_norm_of_tokens_is_kept():
    angle = open_(RotationLinear(stock_linear(("rotate",)), ("rotate",)))(torch.randn(2, 5))
    tokens = torch.randn(2, 4, 6)
    turned = tokens + angle[:, None]
    torch.testing.assert_close(turned.norm(dim=-1), tokens.norm(dim=-1))
    assert relative_error(turned, tokens) > 0.1


def test_starts_at_angle_zero_with_a_gradient():
    for rank in (None, 2):
        linear = RotationLinear(stock_linear(("rotate",)), ("rotate",), rank=rank)
        tokens = torch.randn(2, 4, 6)
        turned = tokens + linear(torch.randn(2, 5))[:, None]
        assert torch.equal(turned, tokens)
        turned.mul(torch.randn(6)).sum().backward()
        last = linear.rotation if rank is None else linear.rotation[-1]
        assert last.weight.grad.any()
        assert last.bias.grad.any()


@pytest.mark.parametrize("mean_shift", [False, True])
@pytest.mark.parametrize("shift_scale", [0.0, 0.3, 1.0])
def test_annealing_formula(mean_shift, shift_scale):
    stock = stock_linear()
    linear = RotationLinear(stock, ZERO, keep_shift=True, mean_shift=mean_shift)
    assert linear.linear is stock
    linear.shift_scale.fill_(shift_scale)
    means = torch.zeros(2, 6)
    if mean_shift:
        nn.init.normal_(linear.mean_shift)
        means = linear.mean_shift
    conditioning = torch.randn(2, 5)
    shifts = [stock(conditioning).chunk(6, dim=-1)[place] for place in (0, 3)]
    maps = linear(conditioning).chunk(6, dim=-1)
    for rotation_map, shift, mean in zip((maps[0], maps[3]), shifts, means, strict=True):
        torch.testing.assert_close(rotation_map.shift, shift_scale * shift + (1 - shift_scale) * mean)


@pytest.mark.parametrize("mean_shift", [False, True])
def test_dropped_shift_is_that_of_scale_zero(mean_shift):
    linear = open_(RotationLinear(stock_linear(), ZERO, keep_shift=True, mean_shift=mean_shift))
    if mean_shift:
        nn.init.normal_(linear.mean_shift)
    linear.shift_scale.fill_(0)
    conditioning, tokens = torch.randn(2, 5), torch.randn(2, 4, 6)
    before = [tokens + value[:, None] for value in linear(conditioning).chunk(6, dim=-1)]
    linear.drop_shift_()
    assert linear.linear.out_features == 4 * 6
    assert "shift_scale" not in linear.state_dict()
    after = [tokens + value[:, None] for value in linear(conditioning).chunk(6, dim=-1)]
    for value, expected in zip(after, before, strict=True):
        torch.testing.assert_close(value, expected)
    linear.drop_shift_()
    assert linear.linear.out_features == 4 * 6


def test_constant_shift_without_rows():
    linear = RotationLinear(stock_linear(), ZERO, mean_shift=True)
    assert linear.mean_shift.shape == (2, 6)
    nn.init.normal_(linear.mean_shift)
    maps = linear(torch.randn(3, 5)).chunk(6, dim=-1)
    assert torch.equal(maps[3].shift, linear.mean_shift[1].expand(3, -1))


def test_low_rank_heads():
    linear = RotationLinear(stock_linear(), ZERO, rank=2)
    assert [tuple(parameter.shape) for parameter in linear.rotation.parameters()] == [(2, 5), (6, 2), (6,)]
    assert linear.rotation[0].weight.any()


@pytest.mark.parametrize("keep_shift", [False, True])
def test_stock_linear_is_put_together_again(keep_shift):
    stock = stock_linear()
    linear = open_(RotationLinear(copy.deepcopy(stock), ZERO, keep_shift=keep_shift))
    again = linear.stock_linear(None if keep_shift else stock)
    assert type(again) is nn.Linear
    assert torch.equal(again.weight, stock.weight)
    assert torch.equal(again.bias, stock.bias)


def test_modes_dtypes_and_flags_carry_over():
    stock = stock_linear().to(torch.float64).eval().requires_grad_(False)
    linear = RotationLinear(stock, ZERO)
    assert {parameter.dtype for parameter in linear.parameters()} == {torch.float64}
    assert not linear.training
    assert not linear.linear.training
    assert not linear.linear.weight.requires_grad
    assert linear.rotation.weight.requires_grad


@pytest.mark.parametrize("kinds", [("rotate",), ZERO])
def test_odd_width_is_refused(kinds):
    with pytest.raises(ValueError, match="`linear` must have maps of even width, .* got 5"):
        RotationLinear(stock_linear(kinds, dim=5), kinds)


# Options of the swap


@pytest.mark.parametrize(
    "case, sublayers, expected",
    [
        ("DiT", ["attention"], {"norm1.linear": "rotate scale gate shift scale gate"}),
        ("DiT", ["mlp"], {"norm1.linear": "shift scale gate rotate scale gate"}),
        ("DiT", ["final"], {"proj_out_1": "rotate scale"}),
        ("CogVideoX", ["mlp"], {"norm2.linear": "rotate scale gate rotate scale gate"}),
        ("CogVideoX", ["final"], {"norm_out.linear": "rotate scale"}),
        ("SD3.5", ["mlp"], {"norm1.linear": "shift scale gate rotate scale gate shift scale gate"}),
        ("Flux", ["final"], {"norm_out.linear": "scale rotate"}),
        (
            "CogView4",
            ["mlp"],
            {"norm1.linear": "shift shift scale scale gate gate rotate rotate scale scale gate gate"},
        ),
        ("QwenImage", ["mlp", "final"], {"img_mod.1": "shift scale gate rotate scale gate"}),
    ],
)
def test_sublayers(case, sublayers, expected):
    stock, inputs = make(case)
    model, _ = make(case)
    report = swap_adaln_for_rotation(model, sublayers=sublayers)
    for end, kinds in expected.items():
        found = [kinds_of_map for name, kinds_of_map in report.replaced.items() if name.endswith(end)]
        assert tuple(kinds.split()) in found
    if sublayers == ["final"]:
        assert len(report.replaced) == 1
    assert report.replaced.keys() == rotation_linears(model).keys()
    assert model.config.rotation_modulation["sublayers"] == sublayers
    # Shifts of other sublayers are still there.
    model, _ = make(case)
    swap_adaln_for_rotation(model, sublayers=sublayers, keep_shift=True)
    torch.testing.assert_close(run(model, inputs), run(stock, inputs), rtol=1e-5, atol=1e-5)
    unswap_rotation(model)
    assert list(model.state_dict()) == list(stock.state_dict())


@torch.no_grad()
def test_shift_scale_runs_from_the_stock_model_to_none():
    stock, inputs = make("DiT")
    expected = {1.0: run(stock, inputs)}
    for site in find_sites(stock):
        groups = (
            site.linear.weight.unflatten(0, (len(site.kinds), -1)),
            site.linear.bias.unflatten(0, (len(site.kinds), -1)),
        )
        for rows in groups:
            rows[[place for place, kind in enumerate(site.kinds) if kind == "rotate"]] = 0
    expected[0.0] = run(stock, inputs)
    for shift_scale, value in expected.items():
        model, _ = make("DiT")
        swap_adaln_for_rotation(model, keep_shift=True, shift_scale=shift_scale)
        torch.testing.assert_close(run(model, inputs), value, rtol=1e-5, atol=1e-5)
    set_shift_scale(model, 1)
    torch.testing.assert_close(run(model, inputs), expected[1.0], rtol=1e-5, atol=1e-5)
    set_shift_scale(model, 0)
    drop_shift_(model)
    torch.testing.assert_close(run(model, inputs), expected[0.0], rtol=1e-5, atol=1e-5)
    sliced, _ = make("DiT")
    swap_adaln_for_rotation(sliced)
    assert torch.equal(run(sliced, inputs), run(model, inputs))
    assert dict(sliced.config) == dict(model.config)
    assert sliced.state_dict().keys() == model.state_dict().keys()


def calibration_batches():
    return [{**make("DiT")[1], "timestep": torch.tensor([t, t // 2])} for t in (10, 400, 990)]


@torch.no_grad()
def test_calibration_is_the_mean_shift_in_the_consumers_bias():
    """b += W E[h], by hand, for the maps behind every modulation of a DiT."""
    stock, inputs = make("DiT")
    for block in [*stock.transformer_blocks, None]:
        # The last modulation takes its conditioning from the first block.
        norm = (block or stock.transformer_blocks[0]).norm1
        linear, num_maps = (norm.linear, 6) if block is not None else (stock.proj_out_1, 2)
        conditionings = [
            silu(norm.emb(batch["timestep"], batch["class_labels"], hidden_dtype=torch.float32))
            for batch in calibration_batches()
        ]
        means = linear(torch.cat(conditionings)).mean(dim=0).unflatten(0, (num_maps, -1))
        weight, bias = linear.weight.unflatten(0, (num_maps, -1)), linear.bias.unflatten(0, (num_maps, -1))
        for place in range(0, num_maps, 3):
            if block is None:
                consumers = [stock.proj_out_2]
            elif place == 0:
                consumers = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
            else:
                consumers = [block.ff.net[0].proj]
            for consumer in consumers:
                consumer.bias += consumer.weight @ means[place]
            weight[place], bias[place] = 0, 0
    expected = run(stock, inputs)
    model, _ = make("DiT")
    swap_adaln_for_rotation(model, calibration=iter(calibration_batches()))
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    without, _ = make("DiT")
    swap_adaln_for_rotation(without)
    assert relative_error(run(without, inputs), expected) > 0.05


def test_calibration_leaves_modes_hooks_and_gradients_as_they_were():
    model, inputs = make("DiT")
    model.train()
    model.transformer_blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calls = []
    handle = model.transformer_blocks[1].register_forward_hook(lambda *args: calls.append(1))
    swap_adaln_for_rotation(model, calibration=[inputs, inputs])
    assert len(calls) == 2
    assert {name: model.get_submodule(name).training for name in modes} == modes
    hooks = {name: module._forward_hooks for name, module in model.named_modules() if module._forward_hooks}
    assert list(hooks) == ["transformer_blocks.1"]
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_report():
    model, _ = make("DiT")
    before = sum(parameter.numel() for parameter in model.parameters())
    report = swap_adaln_for_rotation(model)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (report.num_parameters_before, report.num_parameters_after) == (before, after)
    # Half of the shift rows: two of a block's six maps, and one of the last two.
    assert before - after == (2 * 2 + 1) * (16 * 16 + 16) // 2
    assert report.replaced == {
        "transformer_blocks.0.norm1.linear": ZERO,
        "transformer_blocks.1.norm1.linear": ZERO,
        "proj_out_1": ("rotate", "scale"),
    }
    share = (after - before) / before
    assert str(report) == (
        f"5 shifts of 3 maps became rotations; {before:,} parameters before, {after:,} after ({share:+.1%})"
    )


def test_frozen_models_stay_frozen_but_for_the_heads():
    model, _ = make("Flux")
    model.requires_grad_(False)
    swap_adaln_for_rotation(model, calibration=[make("Flux")[1]])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".rotation." in name or name.endswith("mean_shift") for name in trainable)
    unswap_rotation(model, make("Flux")[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("trained", [False, True])
def test_maps_of_shifts_alone_are_trained_after_the_way_back_if_the_base_s_are(trained):
    model, base = make("HunyuanDiT")[0], make("HunyuanDiT")[0].requires_grad_(trained)
    swap_adaln_for_rotation(model)
    (name, *_) = [name for name, linear in rotation_linears(model).items() if linear.kinds == ["rotate"]]
    unswap_rotation(model, base)
    assert model.get_submodule(name).weight.requires_grad is trained


# What it refuses


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
        ("weight", "torch.nn.modules.linear.Linear whose weight is a test_rotation_swap.QuantisedWeight"),
        ("module", "test_rotation_swap.QuantisedLinear whose weight is a torch.Tensor of torch.float32"),
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
    assert_refused(model, "`model` must be one of .* got a test_rotation_swap.FluxTransformer2DModel", TypeError)


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


# The other calls


def test_set_shift_scale_refuses():
    model, _ = make("DiT")
    for kept in (model, copy.deepcopy(model)):
        if kept is not model:
            swap_adaln_for_rotation(kept)
        with pytest.raises(ValueError, match="must be swapped with `keep_shift=True` for its shifts to be scaled"):
            set_shift_scale(kept, 0.5)
    with pytest.raises(ValueError, match=r"`shift_scale` must be in \[0, 1\], got 2"):
        set_shift_scale(model, 2)


def test_drop_shift_refuses():
    model, _ = make("DiT")
    with pytest.raises(
        ValueError, match="`model` must be swapped by `swap_adaln_for_rotation`, got a DiTTransformer2DM"
    ):
        drop_shift_(model)
    sliced = copy.deepcopy(model)
    swap_adaln_for_rotation(sliced)
    with pytest.raises(ValueError, match="must be swapped with `keep_shift=True`, its shifts are gone already"):
        drop_shift_(sliced)
    swap_adaln_for_rotation(model, keep_shift=True, shift_scale=0.25)
    with pytest.raises(
        ValueError, match=r"annealed to 0 first, transformer_blocks.0.norm1.linear has 0.25: `set_shift"
    ):
        drop_shift_(model)
    assert model.config.rotation_modulation["keep_shift"]


def test_unswap_refuses():
    stock, _ = make("DiT")
    with pytest.raises(
        ValueError, match="`model` must be swapped by `swap_adaln_for_rotation`, got a DiTTransformer2DM"
    ):
        unswap_rotation(stock)
    model = copy.deepcopy(stock)
    swap_adaln_for_rotation(model)
    state = model.state_dict()
    wider = diffusers.DiTTransformer2DModel(**{**LABELS, "attention_head_dim": 16})
    offloaded, not_loaded, with_integers = copy.deepcopy(stock), copy.deepcopy(stock).to("meta"), copy.deepcopy(stock)
    cpu_offload(offloaded, execution_device="cpu")
    weight = with_integers.transformer_blocks[0].norm1.linear.weight
    weight.requires_grad_(False).data = weight.data.to(torch.int8)
    for base, message in (
        (None, "`base` must be the stock model: transformer_blocks.0.norm1.linear no longer has its shift rows"),
        (make("Flux")[0], "`base` must be a DiTTransformer2DModel, got a FluxTransformer2DModel"),
        (model, "`base` must be a DiTTransformer2DModel, got a RotationDiTTransformer2DModel"),
        (wider, "`base` must have 96 rows in transformer_blocks.0.norm1.linear, got 192"),
        (offloaded, r"`base` must be without hooks .*, it has one: attach them afterwards"),
        (not_loaded, "`base` must hold weights, some of its tensors are on the meta device: load it first"),
        (with_integers, "`base` must have plain linear maps to take shift rows from, .* of torch.int8: load it"),
    ):
        with pytest.raises(ValueError, match=message):
            unswap_rotation(model, base)
    assert type(model).__name__ == "RotationDiTTransformer2DModel"
    assert model.state_dict().keys() == state.keys()


OTHER_CALLS = {
    "set_shift_scale": lambda model, folder: set_shift_scale(model, 0.5),
    "drop_shift_": lambda model, folder: drop_shift_(model),
    "unswap_rotation": lambda model, folder: unswap_rotation(model, make("DiT")[0]),
    "save_rotation_adapter": lambda model, folder: save_rotation_adapter(model, folder / "adapter"),
}


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_offloaded_models_are_refused_and_still_run(call, tmp_path):
    model, inputs = make("DiT")
    swap_adaln_for_rotation(model, keep_shift=True, shift_scale=0.0)
    expected = run(model, inputs)
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match=r"must be without hooks .*, it has one: attach them afterwards"):
        OTHER_CALLS[call](model, tmp_path)
    assert torch.equal(run(model, inputs), expected)
    assert model.config.rotation_modulation["keep_shift"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["unswap_rotation", "save_rotation_adapter"])
def test_offloaded_models_without_shifts_are_refused_and_still_run(call, tmp_path):
    model, inputs = make("DiT")
    swap_adaln_for_rotation(model)
    expected = run(model, inputs)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"must be without hooks .*, it has one: attach them afterwards"):
        OTHER_CALLS[call](model, tmp_path)
    assert torch.equal(run(model, inputs), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_swapped_models_on_the_meta_device_are_refused(call, tmp_path):
    model, _ = make("DiT")
    swap_adaln_for_rotation(model, keep_shift=True)
    model.to("meta")
    with pytest.raises(ValueError, match="must hold weights, some of its tensors are on the meta device: load it"):
        OTHER_CALLS[call](model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scale_that_is_not_offloaded_is_set():
    model, inputs = make("DiT")
    swap_adaln_for_rotation(model, keep_shift=True, shift_scale=0.25)
    expected = run(model, inputs)
    set_shift_scale(model, 1)
    cpu_offload(model, execution_device="cpu")
    assert relative_error(run(model, inputs), expected) > 1e-3
    set_shift_scale(model, 0.25)
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_the_native_swap_has_none_of_these(call, tmp_path):
    model = tiny_model("E", ["scale", "shift", "gate"])
    swap_adaln_for_rotation(model, keep_shift=True)
    with pytest.raises(ValueError, match="is not available for MPDiTTransformer2DModel: its swap is another conf"):
        OTHER_CALLS[call](model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_swapped_class_needs_its_options():
    with pytest.raises(
        ValueError, match="`rotation_modulation` must hold the options of the swap: make a DiTTransformer"
    ):
        diffusers_mp.RotationDiTTransformer2DModel(**LABELS)


def test_no_rotation_class_of_other_names():
    for name in ("RotationPixArtTransformer2DModel", "RotationNothing", "Rotation"):
        with pytest.raises(AttributeError, match=f"module 'diffusers_mp' has no attribute '{name}'"):
            getattr(diffusers_mp, name)
