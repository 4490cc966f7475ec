"""Who else may own the weights of layers with unit rows: PEFT by any door, ties, `torch.func`."""

import pytest
import torch
from helpers import row_norms, tiny_inputs, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from diffusers_mp import MPEmbedding, MPLinear, normalize_weights_


def forward(model):
    with torch.no_grad():
        return model(**tiny_inputs()).sample


def with_peft(configuration="E", **options):
    """A model wrapped by PEFT itself, past diffusers' mixin, with an adapter that does something."""
    options = {"target_modules": ["to_q", "linear_1", "proj"], **options}
    wrapped = get_peft_model(tiny_model(configuration).eval(), LoraConfig(r=2, init_lora_weights=False, **options))
    assert (forward(wrapped) - forward(tiny_model(configuration).eval())).abs().max() > 0.01
    return wrapped


@pytest.mark.parametrize("configuration", "ABDE")
def test_merging_by_peft_itself_changes_nothing_in_either_mode(configuration):
    model = with_peft(configuration)
    expected = forward(model)
    tolerance = 1e-5 * expected.abs().max()
    for mode in (True, False):
        model.train(mode)
        assert (forward(model) - expected).abs().max() <= tolerance
        model.merge_adapter()
        for other in (True, False):
            assert (forward(model.train(other)) - expected).abs().max() <= tolerance
        model.train(mode)
        model.unmerge_adapter()
        model.state_dict()
        assert (forward(model) - expected).abs().max() <= tolerance


def test_merging_by_peft_itself_is_refused_where_rows_are_normalised_on_use():
    model = with_peft("C")
    model.merge_adapter()
    with pytest.raises(ValueError, match="PEFT's merges need rows that are used as they are stored"):
        forward(model)
    model.unmerge_adapter()
    forward(model)


def test_quantised_weights_are_refused_where_rows_are_normalised_on_use():
    model = tiny_model("C").eval()
    layer = model.transformer_blocks[0].attn.to_q
    # As bitsandbytes keeps it, but for the scale.
    layer.weight = nn.Parameter((127 * layer.weight.detach()).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="weights not quantised otherwise, .*; got Parameter of torch.int8"):
        forward(model)


# PEFT takes the second one in any case.
@pytest.mark.parametrize("start", ["pissa", "OLoRA"])
def test_a_start_that_changes_weights_is_right_or_refused_through_peft_itself(start):
    options = LoraConfig(r=2, init_lora_weights=start, target_modules=["to_q", "linear_1"])
    expected = forward(tiny_model("E").eval())
    for mode in (True, False):
        model = get_peft_model(tiny_model("E"), options).train(mode)
        assert (forward(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match=f"`init_lora_weights` must leave the weights as they are .* got '{start}'"):
        forward(get_peft_model(tiny_model("C"), options))


@pytest.mark.filterwarnings("ignore:target_modules=:RuntimeWarning")
def test_an_adapter_of_a_parameter_is_the_same_in_either_mode():
    model = with_peft(target_modules=[], target_parameters=["to_q.weight"])
    torch.testing.assert_close(forward(model.train()), forward(model.eval()), rtol=0, atol=1e-6)


def test_rows_that_are_trained_are_normalised_whatever_stands_in_for_the_parameter():
    layer, x = MPLinear(6, 4), torch.randn(3, 6)
    weight = 2 * layer.weight.detach()
    torch.testing.assert_close(torch.func.functional_call(layer, {"weight": weight}, x), layer(x))
    # Control: the frozen parameter itself is used as it is.
    layer.weight.requires_grad_(False).mul_(2)
    normalize_weights_(layer)
    torch.testing.assert_close(row_norms(layer.weight), torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(layer(x), x @ weight.T)


def test_a_weight_that_layers_of_other_norms_share_is_refused():
    table, layer = MPEmbedding(5, 8), MPLinear(8, 5)
    layer.weight = table.weight
    with pytest.raises(ValueError, match="rows of one norm, got layers that share it with norms 2.82843 and 1"):
        normalize_weights_(nn.ModuleList([table, layer]))
    # Of one norm it is normalised once.
    other = MPLinear(8, 5)
    other.weight = nn.Parameter(3 * torch.randn(5, 8))
    layer.weight = other.weight
    normalize_weights_(nn.ModuleList([other, layer]))
    torch.testing.assert_close(row_norms(layer.weight), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)
