"""The linear map whose shift rows are rotations."""

import copy

import pytest
import torch
from helpers import relative_error
from torch import nn

from diffusers_mp.rotation_swap import RotationLinear


ZERO = ("rotate", "scale", "gate", "rotate", "scale", "gate")


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
