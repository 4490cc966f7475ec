"""The row contract (module docstring of `diffusers_mp.rows`): stored rows, training, evaluation, loops."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, rescale_rows, row_norms, small_network, unit
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_mp import MPEmbedding, MPLinear, normalize_weights_, rows


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# How far from its norm a row is that was put there in a dtype: by rounding its entries and by the norm's own sum.
ROW_ERROR = {dtype: (1 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps for dtype in DTYPES}


FAN_INS = [1, 2, 3, 5, 17, 64, 65, 257, 384, 1000, 1152, 4609]


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


# Loops that do not know the package


def regression_step(network, target, optimizer, batch_size=64):
    x = torch.randn(batch_size, 12, dtype=torch.float64)
    loss = (network(x) - target(x)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_foreign_loop_learns_and_its_rows_are_at_norm_one_after_eval(monkeypatch):
    monkeypatch.setattr(rows, "_drift_warned", False)
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
