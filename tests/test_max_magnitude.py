"""A bound on tokens: what `max_magnitude` promises whatever the weights are, and what it leaves alone."""

import math

import pytest
import torch
from helpers import forward, relative_error, tiny_inputs, tiny_model

from diffusers_mp import functional, get_preset


LIMIT = 2.0


def largest_magnitudes(model, inputs):
    """Largest RMS of a token after each half of each block."""
    found = []

    def note(block, args, output):
        found.append(output.float().square().mean(-1).max().sqrt().item())

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
    huge = torch.tensor([[3e38, 3e38], [1.0, 1.0]]).to(dtype)  # infinite in half precision
    capped = functional.cap_magnitude(huge, LIMIT)
    assert capped[0].isnan().all()
    assert torch.equal(capped[1], huge[1])


# The model


@pytest.mark.parametrize(
    "configuration, make_wild",
    [("E", with_wild_gains), ("E", with_correlated_rows), ("C", with_wild_gains), ("A", with_long_free_rows)],
)
@pytest.mark.parametrize("modulation", [("scale", "rotate", "gate"), ("scale", "shift", "gate")], ids="+".join)
def test_no_token_of_the_stream_is_above_the_limit(configuration, modulation, make_wild):
    free = tiny_model(configuration, modulation).eval()
    capped = tiny_model(configuration, modulation, max_magnitude=LIMIT).eval()
    for model in (free, capped):
        make_wild(model)
    assert max(largest_magnitudes(free, tiny_inputs())) > 1.5 * LIMIT
    assert max(largest_magnitudes(capped, tiny_inputs())) <= LIMIT * (1 + 1e-6)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_limit_holds_in_half_precision_to_its_rounding(dtype, rounding):
    model = tiny_model("F").eval()
    with_wild_gains(model)
    found = largest_magnitudes(model.to(dtype), tiny_inputs(dtype=dtype))
    assert max(found) <= LIMIT * (1 + rounding)


def test_the_limit_holds_over_a_hundred_blocks():
    model = tiny_model("F", num_layers=100).eval()
    with_wild_gains(model)
    found = largest_magnitudes(model, tiny_inputs())
    assert len(found) == 100
    assert LIMIT / 2 < min(found) <= max(found) <= LIMIT * (1 + 1e-6)


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
