"""Attention, conditioning and blocks: formulae, processors, names."""

import math

import pytest
import torch
from helpers import forward, tiny_inputs, tiny_model
from torch import nn

from diffusers_mp.blocks import MPDiTAttnProcessor


def test_conditioning_is_the_activated_balanced_sum():
    embedder = tiny_model("E").conditioning_embedder
    inputs = tiny_inputs()
    time = embedder.time_embedder(inputs["timestep"], torch.float32)
    label = embedder.class_embedder(inputs["class_labels"])
    expected = torch.nn.functional.silu((time + label) / math.sqrt(2)) / 0.596
    torch.testing.assert_close(embedder(inputs["timestep"], inputs["class_labels"], None, torch.float32), expected)


@pytest.mark.parametrize("cosine_attention", [True, False])
def test_attention_by_its_formula(cosine_attention):
    attn = tiny_model("E", cosine_attention=cosine_attention).double().transformer_blocks[0].attn
    x = 10 * torch.randn(2, 5, 32, dtype=torch.float64)
    query, key, value = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (attn.to_q, attn.to_k, attn.to_v))
    if cosine_attention:
        # Logits sqrt(d) cos, whatever the magnitude of the tokens.
        logits = math.sqrt(8) * nn.functional.cosine_similarity(query.unsqueeze(-2), key.unsqueeze(-3), dim=-1)
        assert logits.abs().max() <= math.sqrt(8)
    else:
        logits = query @ key.mT / math.sqrt(8)
    expected = attn.to_out[0]((logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), expected, rtol=1e-10, atol=1e-12)


def test_attention_processors():
    model, inputs = tiny_model("E"), tiny_inputs()
    names = [f"transformer_blocks.{index}.attn.processor" for index in range(2)]
    assert list(model.attn_processors) == names
    assert {type(processor) for processor in model.attn_processors.values()} == {MPDiTAttnProcessor}

    class Counting(MPDiTAttnProcessor):
        calls = 0

        def __call__(self, attn, hidden_states):
            Counting.calls += 1
            return super().__call__(attn, hidden_states)

    expected = forward(model, inputs)
    model.set_attn_processor(Counting())
    assert torch.equal(forward(model, inputs), expected)
    assert Counting.calls == 2
    model.set_attn_processor({names[0]: MPDiTAttnProcessor(), names[1]: Counting()})
    forward(model, inputs)
    assert Counting.calls == 3
    with pytest.raises(ValueError, match="number of attention layers"):
        model.set_attn_processor({names[0]: Counting()})


def test_names_follow_diffusers():
    names = set(tiny_model("E").state_dict())
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        assert f"transformer_blocks.1.attn.{name}.weight" in names


@torch.no_grad()
def test_an_activation_is_overwritten_only_where_nobody_looks():
    model, kept = tiny_model().eval(), []
    feed_forward = model.transformer_blocks[0].ff
    expected = forward(model, tiny_inputs())
    with torch.enable_grad():  # as for a quantised map, whose output must not be overwritten
        model(**tiny_inputs()).sample.square().mean().backward()
    feed_forward.linear_1.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    assert torch.equal(forward(model, tiny_inputs()), expected)
    (output, copied) = kept[0]
    assert torch.equal(output, copied)
