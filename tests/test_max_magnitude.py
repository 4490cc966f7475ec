"""A bound on tokens: what `max_magnitude` promises whatever the weights are, and what it leaves alone."""

import math

import pytest
import torch
from helpers import forward, relative_error, tiny_inputs, tiny_model

from diffusers_mp import functional, fused, get_preset


LIMIT = 1.0
# Of a stream of MP sums with weight 0.3 of branches at the limit: the fixed point of M = (0.7 M + 0.3 c) / sqrt(0.58).
BOUND = 0.3 / (math.sqrt(0.58) - 0.7) * LIMIT


def largest_magnitudes(model, inputs):
    """Largest RMS of a token that the first block is given, and after each block."""
    found = []

    def note(block, args, output):
        found.extend(x.float().square().mean(-1).max().sqrt().item() for x in ([] if found else [args[0]]) + [output])

    hooks = [block.register_forward_hook(note) for block in model.transformer_blocks]
    with torch.no_grad():
        forward(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def with_wild_gains(model):
    """Gates and scales of 20 and more, as runs at high rates have had them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.normal_(0, 20)


def with_correlated_rows(model):
    """Every row of a map the same, and tokens that point where the rows do: √n from each map instead of 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embedder" not in name:
                parameter.copy_(torch.ones_like(parameter) / math.sqrt(parameter.shape[1]))


def with_long_free_rows(model):
    """Plain maps of any length, as those of configuration A after weeks of training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(50)


# Values


def test_a_token_above_the_limit_is_scaled_to_it_and_another_is_left_alone_to_the_bit():
    tokens = torch.tensor([[30.0, -40.0], [0.6, 0.8], [0.0, 0.0]])
    capped = functional.cap_magnitude(tokens, LIMIT)
    torch.testing.assert_close(capped[0], torch.tensor([0.6, -0.8]) * LIMIT * math.sqrt(2))
    assert torch.equal(capped[1:], tokens[1:])


def test_the_gradient_of_a_capped_token_is_orthogonal_to_it():
    tokens = torch.tensor([[3.0, -4.0], [0.6, 0.8]], requires_grad=True)
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (found,) = torch.autograd.grad(functional.cap_magnitude(tokens, 1.0), tokens, grad)
    # g - (g.x) x / |x|^2 = [1, 2] + [3, -4] / 5, times the factor sqrt(2) / 5.
    torch.testing.assert_close(found, torch.tensor([[1.6 * math.sqrt(2) / 5, 1.2 * math.sqrt(2) / 5], [3.0, 4.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_that_overflows_becomes_nan_and_not_zero(dtype):
    huge = torch.tensor([[3e38, 3e38], [0.5, 0.5]]).to(dtype)  # infinite in half precision
    capped = functional.cap_magnitude(huge, LIMIT)
    assert capped[0].isnan().all()
    assert torch.equal(capped[1], huge[1])


# The model


@pytest.mark.parametrize(
    "configuration, make_wild", [("E", with_wild_gains), ("E", with_correlated_rows), ("C", with_wild_gains)]
)
@pytest.mark.parametrize("modulation", [("scale", "rotate", "gate"), ("scale", "shift", "gate")], ids="+".join)
@pytest.mark.parametrize("num_layers", [2, 20])
def test_no_token_of_the_stream_is_above_the_bound(configuration, modulation, make_wild, num_layers):
    free = tiny_model(configuration, modulation, num_layers=num_layers).eval()
    capped = tiny_model(configuration, modulation, num_layers=num_layers, max_magnitude=LIMIT).eval()
    for model in (free, capped):
        make_wild(model)
    first, *after = largest_magnitudes(capped, tiny_inputs())
    assert max(after) <= max(first, BOUND) * (1 + 1e-6)
    assert max(largest_magnitudes(free, tiny_inputs())) > max(after)


def test_a_hundred_blocks_keep_the_bound():
    model = tiny_model("F", num_layers=100).eval()
    with_wild_gains(model)
    first, *after = largest_magnitudes(model, tiny_inputs())
    assert len(after) == 100
    assert LIMIT < max(after) <= max(first, BOUND) * (1 + 1e-5)


def test_branches_that_point_along_the_stream_reach_the_bound():
    x, gate = torch.randn(2, 4, 32), torch.full((2, 1, 32), 5.0)
    for _ in range(200):
        x = fused.gated_sum(x, x, gate, 0.3, LIMIT)
    torch.testing.assert_close(x.square().mean(-1).sqrt(), torch.full((2, 4), BOUND), rtol=1e-5, atol=0)


def test_plain_sums_grow_by_the_limit_at_most():
    model = tiny_model("A", num_layers=6, max_magnitude=LIMIT).eval()
    with_long_free_rows(model)
    first, *after = largest_magnitudes(model, tiny_inputs())
    assert after[0] > first + LIMIT / 10
    assert all(found <= first + 2 * LIMIT * number * (1 + 1e-6) for number, found in enumerate(after, 1))


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_limit_holds_in_half_precision_to_its_rounding(dtype, rounding):
    x, branch, gate = torch.zeros(2, 4, 32), 300 * torch.randn(2, 4, 32), 30 * torch.randn(2, 1, 32)
    added = fused.gated_sum(x.to(dtype), branch.to(dtype), gate.to(dtype), None, LIMIT).float()
    torch.testing.assert_close(added.square().mean(-1).sqrt(), torch.full((2, 4), LIMIT), rtol=rounding, atol=0)


def test_what_a_branch_adds_is_capped_after_its_gate():
    x, branch, gate = torch.zeros(1, 4, 8), torch.randn(1, 4, 8), torch.full((1, 1, 8), 100.0)
    added = functional.gated_sum(x, branch, gate, 0.3, 1.0)
    share = 0.3 / math.sqrt(0.7**2 + 0.3**2)
    torch.testing.assert_close(added.square().mean(-1).sqrt(), torch.full((1, 4), share))


def test_below_the_limit_the_model_is_that_of_e():
    inputs = tiny_inputs()
    plain, capped = tiny_model("E"), tiny_model("F", max_magnitude=100)
    capped.load_state_dict(plain.state_dict())
    assert relative_error(forward(capped, inputs), forward(plain, inputs)) < 1e-6


def test_f_is_e_with_a_limit_and_both_keep_it(tmp_path):
    preset = get_preset("S/2", "F")
    assert preset.pop("max_magnitude") == LIMIT
    assert preset == get_preset("S/2", "E")
    for configuration, limit in (("E", None), ("F", LIMIT)):
        model = tiny_model(configuration)
        model.save_pretrained(tmp_path / configuration)
        assert type(model).from_pretrained(tmp_path / configuration).config.max_magnitude == limit


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan, True, "2"])
def test_other_limits_are_refused(limit):
    with pytest.raises(ValueError, match="`max_magnitude` must be a positive number, or None for no limit, got"):
        tiny_model(max_magnitude=limit)
