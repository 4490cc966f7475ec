"""Magnitudes of the layers, and layers as PyTorch uses them."""

import warnings

import pytest
import torch
from helpers import assert_magnitude, row_norms, small_network, unit
from torch import nn

from diffusers_mp import (
    MPEmbedding,
    MPLeakyReLU,
    MPLinear,
    MPPatchEmbed,
    MPSiLU,
    MPTimestepEmbedding,
    normalize_weights_,
)


def test_mp_linear_has_no_bias():
    assert MPLinear(3, 4).bias is None
    assert [name for name, _ in MPLinear(3, 4).named_parameters()] == ["weight"]


# Magnitudes


def test_mp_linear_keeps_magnitude():
    # With unit rows M^2 is 1 in expectation over the inputs; its error is that of batch * min(fan_in, fan_out) / 2
    # independent entries, since tr((W W^T)^2) of random unit rows is fan_out (1 + fan_out / fan_in).
    for fan_in, fan_out in ((256, 64), (64, 256)):
        y = MPLinear(fan_in, fan_out)(torch.randn(2000, fan_in))
        assert_magnitude(y, num_independent=2000 * 64 // 2)
        with pytest.raises(AssertionError):
            assert_magnitude(nn.Linear(fan_in, fan_out)(torch.randn(2000, fan_in)), num_independent=2000 * 64 // 2)


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 20.0])
def test_mp_leaky_relu_keeps_any_magnitude(magnitude):
    assert_magnitude(MPLeakyReLU(0.2)(magnitude * torch.randn(100_000)), expected=magnitude)
    assert repr(MPLeakyReLU(0.2)) == "MPLeakyReLU(negative_slope=0.2)"


def test_mp_silu_keeps_magnitude_one():
    assert_magnitude(MPSiLU()(torch.randn(100_000)), expected=0.59647 / 0.596)


def test_mp_embedding_rows_have_magnitude_exactly_one():
    table = MPEmbedding(11, 384)
    for mode in (True, False):
        rows = table.train(mode)(torch.tensor([[0, 10], [3, 3]]))
        assert rows.shape == (2, 2, 384)
        torch.testing.assert_close(rows.square().mean(dim=-1), torch.ones(2, 2), rtol=1e-5, atol=0)
    assert torch.equal(rows[1, 0], rows[1, 1])
    with pytest.raises(IndexError):
        table(torch.tensor([11]))


@pytest.mark.parametrize("activation", [MPSiLU, MPLeakyReLU])
def test_time_embedding_keeps_magnitude_one(activation):
    # One vector for each timestep: what is averaged over are the rows of the two random maps.
    embedding = MPTimestepEmbedding(2048, activation=activation)(torch.tensor([0.5, 500.0, 999.0]), torch.float32)
    assert embedding.shape == (3, 2048)
    for row in embedding:
        assert_magnitude(row, num_independent=2048 // 2)


def test_patch_embedding_keeps_magnitude_one_and_appends_a_constant():
    layer = MPPatchEmbed(2, 4, 64, linear=lambda *sizes: MPLinear(*sizes, dtype=torch.float64))
    image = torch.randn(200, 4, 8, 8, dtype=torch.float64)
    tokens = layer(image)
    assert tokens.shape == (200, 16, 64)
    assert_magnitude(tokens, num_independent=200 * 16 * 17 // 2)
    # Of a black image only the constant's column is left.
    black = layer(torch.zeros(1, 4, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(black, unit(layer.proj.weight)[:, -1].expand(1, 6, 64))
    patch = image[3, :, 2:4, 4:6].permute(1, 2, 0).flatten()
    expected = unit(layer.proj.weight) @ torch.cat([patch, patch.new_ones(1)])
    torch.testing.assert_close(tokens[3, 1 * 4 + 2], expected)


def test_a_chain_keeps_magnitude_where_a_plain_one_loses_it():
    x = torch.randn(1000, 256)
    chain = nn.Sequential(*[layer for _ in range(6) for layer in (MPLinear(256, 256), MPLeakyReLU())])
    assert 0.8 < chain(x).square().mean().sqrt() < 1.2
    plain = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.LeakyReLU())])
    assert plain(x).square().mean().sqrt() < 0.2


# Modules as PyTorch uses them


@pytest.mark.parametrize(
    "make", [lambda: MPLinear(6, 4), lambda: MPEmbedding(4, 6), lambda: MPTimestepEmbedding(8), small_network]
)
def test_on_the_meta_device_then_materialised(make):
    with torch.device("meta"):
        module = make()
    assert all(parameter.is_meta for parameter in module.parameters())
    # Reading it, in whatever way, needs no values.
    module.state_dict()
    normalize_weights_(module).eval().train()
    module.to_empty(device="cpu")
    for layer in module.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        if isinstance(layer, (MPLinear, MPEmbedding)):
            assert (row_norms(layer.weight) / layer.row_norm - 1).abs().max() < 1e-6


def test_device_and_dtype_arguments():
    layer = MPLinear(3, 4, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    table = MPEmbedding(3, 4, device="meta", dtype=torch.float16)
    with pytest.raises(TypeError, match="positional"):
        MPEmbedding(3, 4, 0)  # the padding index of nn.Embedding, not a device
    assert (table.weight.device.type, table.weight.dtype) == ("meta", torch.float16)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_compiles_into_one_graph(forced, training):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.label = MPEmbedding(5, 12, forced_weight_normalization=forced)
            self.time = MPTimestepEmbedding(12)
            self.patch = MPPatchEmbed(2, 3, 12)
            self.act = MPLeakyReLU(0.1)
            self.map = MPLinear(12, 6, forced_weight_normalization=forced)

        def forward(self, image, timestep, labels):
            conditioning = self.time(timestep, image.dtype) + self.label(labels)
            return self.map(self.act(self.patch(image) + conditioning.unsqueeze(1)))

    network = Network().train(training)
    with warnings.catch_warnings():
        # PyTorch's own, on importing its compiler.
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        inputs = torch.randn(2, 3, 4, 6), torch.tensor([3.5, 700.0]), torch.tensor([0, 4])
        outputs = network(*inputs), compiled(*inputs)
    torch.testing.assert_close(outputs[1], outputs[0])
    gradients = [torch.autograd.grad(y.square().sum(), list(network.parameters())) for y in outputs]
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
