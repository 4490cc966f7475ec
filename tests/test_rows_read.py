"""Rows that are read as they are stored, by `eval`, saving and copies, and what is said of drift."""

import copy
import io
import math
import pickle

import pytest
import torch
from helpers import rescale_rows, row_norms, small_network, tiny_model
from processes import run_processes
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusers_mp import MPEmbedding, MPLinear, rows


@pytest.fixture(autouse=True)
def _not_warned_yet(monkeypatch):
    monkeypatch.setattr(rows, "_drift_warned", False)


@pytest.fixture
def _drift_is_fine(monkeypatch):
    monkeypatch.setattr(rows, "_drift_warned", True)


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


def test_a_copy_that_is_frozen_saves_its_rows_as_they_are():
    model = tiny_model()
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.mul_(0.5)
    stored = frozen.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], 0.5 * parameter), name


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


@pytest.mark.parametrize("read", ["eval", "state_dict"])
def test_rows_of_a_model_are_looked_at_together(monkeypatch, read):
    model, looks = tiny_model(), []
    monkeypatch.setattr(rows, "normalize_rows_", lambda layers: looks.append(len(layers)))
    monkeypatch.setattr(rows, "_drift_warned", True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    getattr(model, read)()
    num_layers = sum(isinstance(module, (MPLinear, MPEmbedding)) for module in model.modules())
    assert looks == [num_layers]


# Drift


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


def test_an_average_is_told_that_its_rows_are_put_right(monkeypatch):
    monkeypatch.setattr(rows, "_drift_warned", False)
    layer = MPLinear(6, 4)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        layer.reset_parameters()
        average.update_parameters(layer)
    with pytest.warns(UserWarning, match="Averages of weights, as those of EMAModel and AveragedModel, are shorter"):
        average.eval()


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
