"""The row contract (module docstring of `diffusers_mp.rows`) and magnitudes of the layers."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_magnitude, relative_error, row_norms
from processes import run_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_mp import (
    MPEmbedding,
    MPLeakyReLU,
    MPLinear,
    MPPatchEmbed,
    MPSiLU,
    MPTimestepEmbedding,
    normalize_weights_,
    rows,
)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# How far from its norm a row is that was put there in a dtype: by rounding its entries and by the norm's own sum.
ROW_ERROR = {dtype: (1 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps for dtype in DTYPES}
FAN_INS = [1, 2, 3, 5, 17, 64, 65, 257, 384, 1000, 1152, 4609]


@pytest.fixture(autouse=True)
def _not_warned_yet(monkeypatch):
    monkeypatch.setattr(rows, "_drift_warned", False)


@pytest.fixture
def _drift_is_fine(monkeypatch):
    monkeypatch.setattr(rows, "_drift_warned", True)


@torch.no_grad()
def rescale_rows(layer, low=0.1, high=10.0):
    """Give every stored row a norm of its own; returns the factors."""
    factors = torch.empty(layer.weight.shape[0], 1, dtype=layer.weight.dtype).uniform_(low, high)
    layer.weight.mul_(factors)
    return factors


def unit(weight):
    return weight.detach() / torch.linalg.vector_norm(weight.detach(), dim=-1, keepdim=True)


def small_network(dtype=torch.float64, forced=True):
    return nn.Sequential(
        MPLinear(12, 16, dtype=dtype, forced_weight_normalization=forced),
        MPSiLU(),
        MPLinear(16, 4, dtype=dtype, forced_weight_normalization=forced),
    )


# Rows as they are stored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer, norm", [(MPLinear, 1.0), (MPEmbedding, math.sqrt(48))])
def test_rows_start_at_their_norm(layer, norm, dtype):
    weight = layer(*((48, 20) if layer is MPLinear else (20, 48)), dtype=dtype).weight
    assert weight.shape == (20, 48)
    assert weight.dtype == dtype
    assert (row_norms(weight) / norm - 1).abs().max() <= ROW_ERROR[dtype]
    # Directions are those of a normal draw: no two alike.
    cosine = unit(weight.double()) @ unit(weight.double()).T
    assert cosine.fill_diagonal_(0).abs().max() < 0.7


def test_mp_linear_has_no_bias():
    assert MPLinear(3, 4).bias is None
    assert [name for name, _ in MPLinear(3, 4).named_parameters()] == ["weight"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in", FAN_INS)
def test_normalizing_again_changes_no_bit(fan_in, dtype):
    layer = MPLinear(fan_in, 200, dtype=dtype)
    settled = layer.weight.detach().clone()
    assert torch.equal(normalize_weights_(layer).weight, settled)
    rescale_rows(layer, 0.3, 3)
    once = normalize_weights_(layer).weight.detach().clone()
    assert (row_norms(once) - 1).abs().max() <= ROW_ERROR[dtype]
    assert torch.equal(normalize_weights_(layer).weight, once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 65, 384, 1152])
def test_normalizing_label_rows_again_changes_no_bit(dim, dtype):
    table = MPEmbedding(100, dim, dtype=dtype)
    rescale_rows(table, 0.3, 3)
    once = normalize_weights_(table).weight.detach().clone()
    assert (row_norms(once) / math.sqrt(dim) - 1).abs().max() <= ROW_ERROR[dtype]
    assert torch.equal(normalize_weights_(table).weight, once)


def test_idempotence_is_not_a_property_of_division():
    """The control: dividing float32 rows by their norm a second time changes many of their entries."""
    once = unit(torch.randn(200, 384))
    assert (unit(once) != once).float().mean() > 0.1


def test_normalize_weights_leaves_zero_rows_directions_and_everything_else():
    network = nn.Sequential(MPLinear(6, 5), nn.Linear(5, 5), MPLinear(5, 3, forced_weight_normalization=False))
    with torch.no_grad():
        network[0].weight[2] = 0
    for layer in network:
        rescale_rows(layer)
    before = copy.deepcopy(network)
    assert normalize_weights_(network) is network
    expected = torch.ones(5, dtype=torch.float64)
    expected[2] = 0
    torch.testing.assert_close(row_norms(network[0].weight), expected, rtol=0, atol=1e-6)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(network[0].weight[others], unit(before[0].weight[others]))
    assert torch.equal(network[1].weight, before[1].weight)
    assert torch.equal(network[2].weight, before[2].weight)


def test_rows_too_long_for_a_norm_are_noticed():
    layer = MPLinear(6, 5)
    with torch.no_grad():
        layer.weight[2] *= 1e30
    normalize_weights_(layer)
    assert layer.weight.isfinite().all(dim=1).tolist() == [True, True, False, True, True]


def test_layers_of_every_kind_are_normalised_at_once():
    """A weight that layers share, rows of other dtypes and lengths, and as many as no row at all."""
    first, second = MPLinear(6, 5), MPLinear(6, 5)
    second.weight = first.weight
    others = [MPLinear(7, 3, dtype=torch.bfloat16), MPLinear(4, 2, dtype=torch.float64), MPEmbedding(9, 16)]
    network = nn.ModuleList([first, second, *others, MPLinear(6, 0)])
    for layer in (first, *others):
        rescale_rows(layer, 0.3, 3)
    before = copy.deepcopy(network)
    normalize_weights_(network)
    for layer, was in zip(network, before, strict=True):
        alone = was.weight.double() / row_norms(was.weight)[:, None] * layer.row_norm
        error = ROW_ERROR[layer.weight.dtype] * layer.row_norm
        torch.testing.assert_close(layer.weight.double(), alone, rtol=0, atol=error)


# Training mode: value and gradient are those of unit rows


@pytest.mark.parametrize("forced", [True, False])
def test_training_output_does_not_depend_on_stored_norms(forced):
    layer = MPLinear(7, 5, dtype=torch.float64, forced_weight_normalization=forced)
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    expected = F.linear(x, unit(layer.weight))
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-15)
    rescale_rows(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("forced", [True, False])
def test_weight_gradient_is_the_projection_divided_by_the_norm(forced):
    layer = MPLinear(7, 5, dtype=torch.float64, forced_weight_normalization=forced)
    rescale_rows(layer)
    x, g = torch.randn(30, 7, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    layer(x).backward(g)
    row, norm = unit(layer.weight), row_norms(layer.weight).unsqueeze(-1)
    by_unit_row = g.T @ x
    expected = (by_unit_row - (by_unit_row * row).sum(dim=-1, keepdim=True) * row) / norm
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-13)
    assert ((layer.weight.grad * row).sum(dim=-1) / layer.weight.grad.norm(dim=-1)).abs().max() < 1e-12
    assert ((by_unit_row * row).sum(dim=-1) / by_unit_row.norm(dim=-1)).abs().max() > 1e-2


def test_label_rows_follow_the_same_contract():
    table = MPEmbedding(4, 6, dtype=torch.float64)
    ids, g = torch.tensor([2, 0, 2]), torch.randn(3, 6, dtype=torch.float64)
    expected = math.sqrt(6) * unit(table.weight)[ids]
    torch.testing.assert_close(table(ids), expected, rtol=1e-14, atol=0)
    rescale_rows(table)
    torch.testing.assert_close(table(ids), expected, rtol=1e-13, atol=0)
    table(ids).backward(g)
    row, norm = unit(table.weight), row_norms(table.weight).unsqueeze(-1)
    by_row = math.sqrt(6) * torch.stack([g[1], torch.zeros_like(g[0]), g[0] + g[2], torch.zeros_like(g[0])])
    expected = (by_row - (by_row * row).sum(dim=-1, keepdim=True) * row) / norm
    torch.testing.assert_close(table.weight.grad, expected, rtol=1e-12, atol=1e-13)


# Evaluation mode


def test_evaluation_is_a_plain_linear_map_where_rows_are_forced():
    layer = MPLinear(7, 5).eval()
    x = torch.randn(3, 7)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    rescale_rows(layer)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    table = MPEmbedding(7, 5).eval()
    rescale_rows(table)
    assert torch.equal(table(torch.arange(7)), table.weight)


def test_evaluation_normalises_on_use_where_rows_are_not_forced():
    layer = MPLinear(7, 5, forced_weight_normalization=False).eval()
    table = MPEmbedding(7, 5, forced_weight_normalization=False).eval()
    x = torch.randn(3, 7)
    expected, rows = layer(x), table(torch.arange(7))
    rescale_rows(layer)
    rescale_rows(table)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(table(torch.arange(7)), rows)
    assert relative_error(F.linear(x, layer.weight), expected) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_train_and_eval_agree_once_rows_are_at_norm_one(dtype):
    layer = MPLinear(64, 32, dtype=dtype)
    rescale_rows(layer)
    normalize_weights_(layer)
    x = torch.randn(10, 64, dtype=dtype)
    trained = layer.train()(x)
    torch.testing.assert_close(layer.eval()(x), trained, rtol=0, atol=20 * torch.finfo(dtype).eps)


# Leaving training mode, saving, merging


@pytest.mark.usefixtures("_drift_is_fine")
@pytest.mark.parametrize(
    "read", [lambda network: network.eval(), lambda network: network.state_dict(), lambda network: save(network)]
)
def test_rows_return_to_norm_one_when_a_training_module_is_read(read):
    network = small_network(torch.float32)
    for layer in (network[0], network[2]):
        rescale_rows(layer)
    read(network)
    for layer in (network[0], network[2]):
        torch.testing.assert_close(row_norms(layer.weight), torch.ones(layer.out_features).double())


def save(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer


@pytest.mark.usefixtures("_drift_is_fine")
def test_what_is_saved_while_training_is_what_evaluation_uses():
    network = small_network()
    for layer in (network[0], network[2]):
        rescale_rows(layer)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = network(x)
    loaded = small_network().eval()
    loaded.load_state_dict(torch.load(io.BytesIO(save(network).getvalue()), weights_only=True))
    torch.testing.assert_close(loaded(x), expected, rtol=1e-12, atol=1e-14)


def test_rows_that_are_not_forced_keep_their_norm_when_read():
    network = small_network(forced=False)
    rescale_rows(network[0])
    before = network[0].weight.detach().clone()
    assert torch.equal(network.state_dict()["0.weight"], before)
    assert torch.equal(network.eval()[0].weight, before)


def test_a_merged_lora_equals_the_unmerged_model_and_survives_saving_and_loading():
    network = small_network().eval()
    layer, x = network[0], torch.randn(9, 12, dtype=torch.float64)
    down, up = torch.randn(2, 12, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    unmerged = network[2](network[1](layer(x) + x @ down.T @ up.T))
    with torch.no_grad():
        layer.weight += up @ down
    torch.testing.assert_close(network(x), unmerged, rtol=1e-12, atol=1e-13)

    merged = layer.weight.detach().clone()
    assert (row_norms(merged) - 1).abs().max() > 0.5
    assert torch.equal(network.state_dict()["0.weight"], merged)
    network.eval()
    assert torch.equal(layer.weight, merged)
    loaded = small_network().eval()
    loaded.load_state_dict(torch.load(io.BytesIO(save(network).getvalue()), weights_only=True))
    assert torch.equal(loaded(x), network(x))


def test_rows_as_loaded_spares_a_module_that_leaves_training_mode():
    layer = MPLinear(7, 5)
    rescale_rows(layer)
    before = layer.weight.detach().clone()
    with rows.rows_as_loaded():
        layer.eval()
    assert torch.equal(layer.weight, before)
    with pytest.warns(UserWarning, match="drifted"):
        layer.train().eval()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("read", [lambda layer: layer.eval(), lambda layer: layer.state_dict()])
def test_drift_is_told_once_with_the_line_to_add(read):
    first, second = MPLinear(8, 8), MPEmbedding(8, 8)
    with torch.no_grad():
        first.weight[3] *= 1.25
        second.weight[3] *= 2
    message = r"MPLinear have drifted 25%.*lowers the effective learning rate; add `normalize_weights_\(model\)` after"
    with pytest.warns(UserWarning, match=message):
        read(first)
    # Warnings are errors here: a second one would raise.
    read(second)
    assert (row_norms(second.weight) - math.sqrt(8)).abs().max() < 1e-5


def test_small_drift_is_put_right_without_a_word():
    layer = MPLinear(8, 8)
    with torch.no_grad():
        layer.weight.mul_(1.04)
    layer.eval()
    assert (row_norms(layer.weight) - 1).abs().max() < 1e-6


# Loops that do not know the package


def regression_step(network, target, optimizer, batch_size=64):
    x = torch.randn(batch_size, 12, dtype=torch.float64)
    loss = (network(x) - target(x)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_foreign_loop_learns_and_its_rows_are_at_norm_one_after_eval():
    torch.manual_seed(1)
    target = MPLinear(12, 6, dtype=torch.float64).eval()
    layer = MPLinear(12, 6, dtype=torch.float64)
    # A rate high enough that rows drift.
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = [regression_step(layer, target, optimizer) for _ in range(50)]
    assert (row_norms(layer.weight) - 1).max() > rows.DRIFT_WORTH_A_WARNING
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    losses += [regression_step(layer, target, optimizer) for _ in range(400)]
    assert losses[0] > 1
    assert losses[-1] < 1e-5
    x = torch.randn(20, 12, dtype=torch.float64)
    trained = layer(x)
    with pytest.warns(UserWarning, match="normalize_weights_"):
        layer.eval()
    torch.testing.assert_close(row_norms(layer.weight), torch.ones(6, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(layer(x), trained, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.weight, target.weight, rtol=0, atol=1e-2)


def test_a_loop_with_forced_rows_keeps_them_at_norm_one():
    network, target = small_network(), small_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(20):
        regression_step(network, target, optimizer)
        normalize_weights_(network)
        for layer in (network[0], network[2]):
            assert (row_norms(layer.weight) - 1).abs().max() < 1e-14
    network.eval()


def test_gradient_accumulation_equals_the_big_batch():
    network = small_network()
    rescale_rows(network[0])
    x, y = torch.randn(32, 12, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    (network(x) - y).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    for part, target in zip(x.split(8), y.split(8), strict=True):
        ((network(part) - target).square().mean() / 4).backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


def test_autocast_to_bfloat16():
    network = small_network(torch.float32)
    x = torch.randn(64, 12)
    network(x).square().mean().backward()
    expected, gradient = network(x).detach(), network[0].weight.grad.clone()
    network.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.bfloat16
    # 2^-8 is half a unit in the last place of bfloat16.
    assert relative_error(y, expected) < 4 * 2**-8
    y.float().square().mean().backward()
    assert network[0].weight.grad.dtype == torch.float32
    assert relative_error(network[0].weight.grad, gradient) < 8 * 2**-8
    # The projection is done in float32, after the bfloat16 product.
    overlap = (network[0].weight.grad * unit(network[0].weight)).sum(dim=-1) / network[0].weight.grad.norm(dim=-1)
    assert overlap.abs().max() < 1e-5
    # Rows of any power of two give the same bits.
    with torch.no_grad():
        network[0].weight *= 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(x), y)
    normalize_weights_(network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_train_on_unit_rows(dtype):
    layer = MPLinear(512, 64, dtype=dtype)
    x = torch.randn(256, 512).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, F.linear(x.float(), unit(layer.weight.float()))) < 2 * torch.finfo(dtype).eps
    y.float().square().mean().backward()
    assert layer.weight.grad.isfinite().all()
    # float16 entries whose squares would overflow or vanish are normalised all the same.
    with torch.no_grad():
        layer.weight *= 2**-6
    torch.testing.assert_close(layer(x), y, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("forced", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(forced):
    network = small_network(torch.float32, forced)
    rescale_rows(network[0])
    before = network[0].weight.detach().clone()
    x = torch.randn(5, 12, requires_grad=True)
    gradients = []
    for run in (network, lambda x: checkpoint(network, x, use_reentrant=False)):
        gradients.append(torch.autograd.grad(run(x).square().sum(), [x, *network.parameters()]))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    # The forward pass, run three times by now, wrote to no weight.
    assert torch.equal(network[0].weight, before)


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


# argv: none. Replicas whose rows have drifted, as they do under DistributedDataParallel without normalisation.
REPLICAS = """
import os, warnings
import torch
import torch.distributed as dist
from diffusers_mp import MPLinear

dist.init_process_group("gloo")
layer = MPLinear(8, 4)
with torch.no_grad():
    layer.weight *= 1.001
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer.state_dict()
print(caught[0].message, flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_little_drift_is_told_where_replicas_may_go_apart(tmp_path):
    (tmp_path / "script.py").write_text(REPLICAS)
    printed = run_processes(tmp_path / "script.py")
    assert printed.count("have drifted 0.1% from their norm") == 2
    assert "replicas go apart where one of them saves or samples alone" in printed


def test_device_and_dtype_arguments():
    layer = MPLinear(3, 4, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    table = MPEmbedding(3, 4, device="meta", dtype=torch.float16)
    with pytest.raises(TypeError, match="positional"):
        MPEmbedding(3, 4, 0)  # the padding index of nn.Embedding, not a device
    assert (table.weight.device.type, table.weight.dtype) == ("meta", torch.float16)


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_deepcopy_and_pickle(copied, forced):
    network = small_network(forced=forced)
    rescale_rows(network[0])
    twin = copied(network)
    assert torch.equal(twin[0].weight, network[0].weight)
    assert twin[0].forced_weight_normalization is forced
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(twin(x), network(x))
    with torch.no_grad():
        twin[0].weight.zero_()
    assert network[0].weight.any()
