"""The rotation swap in a tiny real instance of every transformer it supports."""

import functools
import math

import diffusers
import pytest
import torch
from helpers import relative_error
from swapped_transformers import CLASSES, gradients, swapped, turn_
from tiny_transformers import CASES, cast, make, run

from diffusers_mp import swap_adaln_for_rotation, unswap_rotation
from diffusers_mp.rotation_swap.coverage import COVERAGE, SUPPORTED
from diffusers_mp.rotation_swap.linear import rotation_linears


# Rows of a stock map by the class of its owner, written from diffusers' sources: shift h, scale s, gate g.
LAYOUTS = {
    "AdaLayerNormZero": "hsg hsg",
    "SD35AdaLayerNormZeroX": "hsg hsg hsg",
    "AdaLayerNormZeroSingle": "hsg",
    "AdaLayerNormContinuous": "sh",
    "AuraFlowPreFinalBlock": "sh",
    "CogVideoXLayerNormZero": "hsg hsg",
    "EasyAnimateLayerNormZero": "hsg hsg",
    "CogView3PlusAdaLayerNormZeroTextImage": "hsg hsg hsg hsg",
    "CogView4AdaLayerNormZero": "hhssgg hhssgg",
    "CogView4AdaLayerNormContinuous": "sh",
    "GlmImageAdaLayerNormZero": "hhssgg hhssgg",
    "GlmImageAdaLayerNormContinuous": "sh",
    "AdaLayerNorm": "hs",
    "AdaLayerNormShift": "h",
    "HunyuanVideoTokenReplaceAdaLayerNormZero": "hsg hsg",
    "HunyuanVideoTokenReplaceAdaLayerNormZeroSingle": "hsg",
    "QwenImageTransformerBlock": "hsg hsg",
    "HiDreamImageTransformerBlock": "hsg hsg hsg hsg",
    "HiDreamImageSingleTransformerBlock": "hsg hsg",
    "HiDreamImageOutEmbed": "hs",
    "Modulation": "hsg hsg",
    "FinalLayer": "hs",
    "DiTTransformer2DModel": "hs",
    "Transformer2DModel": "hs",
}
# Where the maps are in those whose map is not called `linear`.
PATHS = {
    "QwenImageTransformerBlock": ["img_mod.1", "txt_mod.1"],
    "HiDreamImageTransformerBlock": ["adaLN_modulation.1"],
    "HiDreamImageSingleTransformerBlock": ["adaLN_modulation.1"],
    "HiDreamImageOutEmbed": ["adaLN_modulation.1"],
    "Modulation": ["lin"],
    "FinalLayer": ["adaLN_modulation.1"],
    "DiTTransformer2DModel": ["proj_out_1"],
    "Transformer2DModel": ["proj_out_1"],
}


def stock_maps(model):
    """Path of each map of a stock model → its owner and its layout."""
    return {
        f"{name}.{path}".lstrip("."): (owner, LAYOUTS[type(owner).__name__].replace(" ", ""))
        for name, owner in model.named_modules()
        if type(owner).__name__ in LAYOUTS
        for path in PATHS.get(type(owner).__name__, ["linear"])
    }


def test_every_supported_class_has_a_case():
    assert {name for name, *_ in CASES.values()} == {name for name, state in COVERAGE.items() if state == SUPPORTED}


# Value


@pytest.mark.parametrize("case", CASES)
def test_kept_shifts_and_zero_angles_are_the_stock_model(case):
    stock, inputs = make(case)
    model, _ = swapped(case, keep_shift=True)
    torch.testing.assert_close(run(model, inputs), run(stock, inputs), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("keep_shift", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_half_turns_are_the_stock_model_with_negated_channels(case, keep_shift):
    """R(pi) y = -y: a pair that makes half a turn is scale -> -2 - scale, shift -> -shift in stock rows."""
    stock, inputs = make(case)
    model, _ = swapped(case, keep_shift=keep_shift)
    linears = rotation_linears(model)
    assert linears.keys() == stock_maps(stock).keys()
    generator = torch.Generator().manual_seed(5)
    for name, (owner, layout) in stock_maps(stock).items():
        linear = linears[name]
        half_turns = torch.randint(0, 2, (layout.count("h"), linear.dim // 2), generator=generator)
        linear.rotation.bias.copy_(math.pi * half_turns.flatten())
        # Channel j makes its pair with channel j + D/2.
        signs = (1 - 2 * half_turns).repeat(1, 2).float()
        if layout == "h":
            negate_shift_only(owner, signs[0], keep_shift)
        else:
            negate_rows(stock.get_submodule(name), layout, signs, keep_shift)
    before = run(make(case)[0], inputs)
    expected = run(stock, inputs)
    assert relative_error(expected, before) > 0.05
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def negate_rows(linear, layout, signs, keep_shift):
    def hook(module, args, rows):
        rows = rows.unflatten(-1, (len(layout), -1)).clone()
        for kind, factor in (("h", keep_shift), ("s", 1)):
            places = [place for place, letter in enumerate(layout) if letter == kind]
            for place, sign in zip(places, signs, strict=True):
                row = rows[..., place, :]
                rows[..., place, :] = factor * sign * row if kind == "h" else sign * (1 + row) - 1
        return rows.flatten(-2)

    linear.register_forward_hook(hook)


def negate_shift_only(norm, signs, keep_shift):
    if not keep_shift:
        norm.linear.weight.zero_()
        norm.linear.bias.zero_()
    norm.register_forward_hook(lambda module, args, output: signs * output)


def hand_rotated(y, angle):
    """Complex multiplication of the halves, as a second way to compute a rotation."""
    first, second = y.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle).double(), angle.double())
    return torch.cat([turned.real, turned.imag], dim=-1).to(y.dtype)


@torch.no_grad()
@pytest.mark.parametrize("keep_shift", [False, True])
def test_dit_block_by_hand(keep_shift):
    """R(angle) (norm(x) (1 + scale) + shift), for attention and MLP, with angles of any size."""
    stock, inputs = make("DiT")
    model, _ = swapped("DiT", 1.0, keep_shift=keep_shift)
    block, stock_block = model.transformer_blocks[1], stock.transformer_blocks[1]
    tokens = torch.randn(2, 4, 16)
    conditioning = torch.nn.functional.silu(
        stock_block.norm1.emb(inputs["timestep"], inputs["class_labels"], hidden_dtype=torch.float32)
    )
    maps = stock_block.norm1.linear(conditioning)[:, None].chunk(6, dim=-1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = maps
    head = block.norm1.linear.rotation
    angle, mlp_angle = (conditioning @ head.weight.T + head.bias)[:, None].chunk(2, dim=-1)
    assert angle.std() > 0.5

    normed = stock_block.norm1.norm(tokens)
    attention_input = hand_rotated(normed * (1 + scale) + keep_shift * shift, angle)
    after_attention = tokens + gate * stock_block.attn1(attention_input)
    mlp_input = stock_block.norm3(after_attention) * (1 + mlp_scale) + keep_shift * mlp_shift
    expected = after_attention + mlp_gate * stock_block.ff(hand_rotated(mlp_input, mlp_angle))
    value = block(tokens, timestep=inputs["timestep"], class_labels=inputs["class_labels"])
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_qwen_tokens_of_two_conditions_by_hand():
    model, _ = swapped("QwenImage edit plus", 1.0)
    block = model.transformer_blocks[0]
    linear = block.img_mod[1]
    # As the model calls it: conditions of the noisy tokens of both samples, then those of the clean ones.
    conditions, tokens = torch.randn(4, 16), torch.randn(2, 3, 16)
    index = torch.tensor([[0, 0, 1], [1, 0, 1]])
    value, gate = block._modulate(tokens, linear(conditions).chunk(2, dim=-1)[1], index)
    angles = linear.rotation(conditions).chunk(2, dim=-1)[1]
    _, _, scales, gates = linear.linear(conditions).chunk(4, dim=-1)
    for batch in range(2):
        for place in range(3):
            row = batch + 2 * index[batch, place]
            expected = hand_rotated(tokens[batch, place] * (1 + scales[row]), angles[row])
            torch.testing.assert_close(value[batch, place], expected)
            torch.testing.assert_close(gate[batch, place], gates[row])


@torch.no_grad()
def test_hunyuan_video_first_frame_by_hand():
    model, _ = swapped("HunyuanVideo token_replace", 1.0)
    norm = model.transformer_blocks[0].norm1
    tokens, condition, first_frame = torch.randn(2, 5, 16), torch.randn(2, 16), torch.randn(2, 16)
    value = norm(tokens, condition, first_frame, 2)[0]
    expected = []
    for part, chosen in ((tokens[:, :2], first_frame), (tokens[:, 2:], condition)):
        activated = torch.nn.functional.silu(chosen)
        scale = norm.linear.linear(activated)[:, None, :16]
        angle = norm.linear.rotation(activated)[:, None, :8]
        expected.append(hand_rotated(norm.norm(part) * (1 + scale), angle))
    torch.testing.assert_close(value, torch.cat(expected, dim=1))


@pytest.mark.parametrize("case", CASES)
def test_rows_of_scales_and_gates_are_kept_exactly(case):
    stock, _ = make(case)
    model, _ = swapped(case)
    for name, (_, layout) in stock_maps(stock).items():
        linear = model.get_submodule(name)
        kept = [place for place, letter in enumerate(layout) if letter != "h"]
        if not kept:
            assert linear.linear is None
            continue
        for key, rows in stock.get_submodule(name).named_parameters():
            expected = rows.unflatten(0, (len(layout), -1))[kept].flatten(0, 1)
            assert torch.equal(getattr(linear.linear, key), expected)
    sites, found, expected = tuple(rotation_linears(model)), model.state_dict(), stock.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected if not key.startswith(sites))


# Gradients


@pytest.mark.parametrize("angles", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_new_parameter(case, angles):
    model, inputs = swapped(case, angles, keep_shift=True)
    all_gradients = gradients(model, inputs)
    names = [name for name in all_gradients if name.startswith(tuple(rotation_linears(model)))]
    assert names
    for name in names:
        gradient = all_gradients[name]
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    # Each rotation, not only their sum, is used: no rows of a head without a gradient.
    for name, linear in rotation_linears(model).items():
        bias = all_gradients[f"{name}.rotation.bias"].unflatten(0, (linear.kinds.count("rotate"), -1))
        unused = [index for index, rows in enumerate(bias) if not rows.any()]
        # Text tokens are dropped after the last block of these.
        stock_unused = unused_shifts(case)[name]
        assert unused == stock_unused, (name, unused, stock_unused)


@functools.cache
def unused_shifts(case):
    """Path of each stock map → indices of its shifts without any gradient."""
    stock, inputs = make(case)
    of_stock, unused = gradients(stock, inputs), {}
    for name, (_, layout) in stock_maps(stock).items():
        rows = of_stock[f"{name}.weight"].unflatten(0, (len(layout), -1))
        shifts = [place for place, letter in enumerate(layout) if letter == "h"]
        unused[name] = [index for index, place in enumerate(shifts) if not rows[place].any()]
    return unused


CHECKPOINTED = [
    case
    for case in CASES
    # The stock HunyuanImage of diffusers 0.42.1 raises: it passes the function arguments by name.
    if getattr(diffusers, CASES[case][0])._supports_gradient_checkpointing and case != "HunyuanImage"
]


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(case):
    model, inputs = swapped(case, 0.3)
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    value = gradients(model, inputs)
    assert model.is_gradient_checkpointing
    for name, gradient in expected.items():
        assert (gradient is None) == (value[name] is None)
        if gradient is not None:
            torch.testing.assert_close(value[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_stock_model_without_gradient_checkpointing():
    model, inputs = make("HunyuanImage")
    model.enable_gradient_checkpointing()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        run(model, inputs)


# Precision


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_as_the_stock_model(case):
    errors = []
    for swap in (False, True):
        outputs = []
        for dtype in (torch.float32, torch.bfloat16):
            model, inputs = make(case)
            if swap:
                swap_adaln_for_rotation(model)
                turn_(model, 0.3)
            outputs.append(run(model.to(dtype), cast(inputs, dtype)))
        assert outputs[1].isfinite().all()
        assert outputs[1].dtype == torch.bfloat16
        errors.append(relative_error(outputs[1], outputs[0]))
    assert errors[1] < 2 * errors[0] + 0.01


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of RMS norms of queries
@torch.no_grad()
@pytest.mark.parametrize("case", CLASSES)
def test_autocast(case):
    model, inputs = swapped(case, 0.3)
    expected = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        value = run(model, inputs)
    assert value.isfinite().all()
    stock, _ = make(case)
    stock_expected = run(stock, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock_error = relative_error(run(stock, inputs), stock_expected)
    assert relative_error(value, expected) < 2 * stock_error + 0.01


# The way back


@pytest.mark.parametrize("keep_shift", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_unswapped_is_the_stock_model(case, keep_shift):
    stock, inputs = make(case)
    model, _ = swapped(case, 0.3, keep_shift=keep_shift)
    unswap_rotation(model, None if keep_shift else stock)
    assert type(model) is type(stock)
    assert dict(model.config) == dict(stock.config)
    found, expected = model.state_dict(), stock.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(run(model, inputs), run(stock, inputs))


def test_unswapped_keeps_trained_rows():
    stock, _ = make("Flux")
    model, _ = swapped("Flux", 0.3)
    with torch.no_grad():
        for linear in rotation_linears(model).values():
            linear.linear.weight.add_(1)
            linear.linear.bias.add_(1)
    unswap_rotation(model, stock)
    for name, (_, layout) in stock_maps(model).items():
        for key, rows in model.get_submodule(name).named_parameters():
            difference = (rows - stock.get_submodule(name).get_parameter(key)).unflatten(0, (len(layout), -1))
            for letter, part in zip(layout, difference, strict=True):
                torch.testing.assert_close(part, torch.full_like(part, letter != "h"))
