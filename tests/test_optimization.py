"""Rates for unit rows, by the rule of the paper's rates for rows of RMS 1, and the schedule by its formula."""

import math

import pytest
import torch
from helpers import tiny_model
from torch import nn

from diffusers_mp import MPEmbedding, MPLinear, functional, normalize_weights_
from diffusers_mp.optimization import inverse_sqrt_schedule, parameter_groups


def _group_of(groups, parameter):
    (group,) = [group for group in groups if any(parameter is other for other in group["params"])]
    return group


def test_rate_and_eps_scale_with_the_fan_in_of_unit_rows():
    model = nn.Sequential(MPLinear(16, 8), MPLinear(16, 4), MPLinear(100, 4))
    groups = parameter_groups(model, lr=1e-2, eps=1e-8)
    assert [group["name"] for group in groups] == ["unit_rows_16", "unit_rows_100"]
    assert [len(group["params"]) for group in groups] == [2, 1]
    assert [group["lr"] for group in groups] == pytest.approx([1e-2 / 4, 1e-2 / 10])
    assert [group["eps"] for group in groups] == pytest.approx([1e-8 * 4, 1e-8 * 10])


def test_embeddings_gains_and_plain_weights_take_the_published_rate():
    model = nn.ModuleDict({"label": MPEmbedding(5, 16), "map": nn.Linear(16, 4), "norm": nn.LayerNorm(4)})
    model.gain = nn.Parameter(torch.zeros(1))
    (group,) = parameter_groups(model, lr=3e-3, eps=1e-6)
    assert len(group["params"]) == 6
    assert (group["name"], group["lr"], group["eps"]) == ("as_published", 3e-3, 1e-6)


@pytest.mark.parametrize("configuration", "ABCDEF")
def test_every_parameter_of_the_model_is_in_exactly_one_group(configuration):
    model = tiny_model(configuration)
    groups = parameter_groups(model)
    for name, parameter in model.named_parameters():
        group = _group_of(groups, parameter)
        layer = model.get_submodule(name.rpartition(".")[0])
        fan_in = layer.in_features if isinstance(layer, MPLinear) else 1
        assert group["lr"] == pytest.approx(1e-2 / math.sqrt(fan_in)), name
        assert group["eps"] == pytest.approx(1e-8 * math.sqrt(fan_in)), name
    assert (len(groups) > 1) == (configuration in "CDEF")


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(MPLinear(16, 8), MPLinear(8, 4))
    model[0].requires_grad_(False)
    (group,) = parameter_groups(model)
    assert group["params"] == [model[1].weight]


def test_a_shared_weight_appears_once():
    first, second = MPLinear(8, 8), MPLinear(8, 8)
    second.weight = first.weight
    (group,) = parameter_groups(nn.Sequential(first, second))
    assert len(group["params"]) == 1


@pytest.mark.parametrize("layer", [MPLinear(4, 4), MPEmbedding(4, 4)])
def test_weight_decay_is_refused_on_normalised_rows(layer):
    with pytest.raises(ValueError, match="`weight_decay` must be 0 for a model with normalised rows.* Got 0.1"):
        parameter_groups(layer, weight_decay=0.1)


def test_weight_decay_is_passed_on_for_a_plain_model():
    (group,) = parameter_groups(nn.Linear(4, 4), weight_decay=0.1)
    assert group["weight_decay"] == 0.1


def test_weight_decay_acts_on_what_is_neither_a_normalised_row_nor_a_gain():
    model = nn.ModuleDict({"rows": MPLinear(16, 4), "label": MPEmbedding(5, 16), "plain": nn.Linear(4, 4)})
    model.gain = nn.Parameter(torch.zeros(1))
    groups = parameter_groups(model, weight_decay=0.1)
    decays = {name: _group_of(groups, parameter)["weight_decay"] for name, parameter in model.named_parameters()}
    assert decays == {"rows.weight": 0, "label.weight": 0, "gain": 0, "plain.weight": 0.1, "plain.bias": 0.1}
    assert [group["lr"] for group in groups] == [1e-2, 1e-2 / 4, 1e-2]


@pytest.mark.parametrize("configuration", "ABCDEF")
def test_weight_decay_of_each_configuration(configuration):
    """A and B have plain maps; the rest have nothing beside normalised rows but gains."""
    model = tiny_model(configuration)
    if configuration in "AB":
        assert {group["weight_decay"] for group in parameter_groups(model, weight_decay=0.1)} == {0.1}
    else:
        with pytest.raises(ValueError, match="`weight_decay` must be 0 for a model with normalised rows"):
            parameter_groups(model, weight_decay=0.1)


@pytest.mark.parametrize("configuration", "AE")
def test_muon_gets_the_matrices_of_the_blocks(configuration):
    model = tiny_model(configuration)
    groups = parameter_groups(model, lr=1e-2, eps=1e-6, muon=True)
    others = parameter_groups(model, lr=1e-2, eps=1e-6)
    for name, parameter in model.named_parameters():
        group, other = _group_of(groups, parameter), _group_of(others, parameter)
        # Neither gains and label rows, nor the patches, the time features and the output, which are its ends.
        assert group["muon"] == (name.startswith("transformer_blocks.") and name.endswith(".weight")), name
        assert (group["lr"], group["scaling"]) == (other["lr"], other["scaling"]), name
        assert group.get("eps") == (None if group["muon"] else other["eps"]), name
    assert sum(group["muon"] for group in groups) == (2 if configuration == "E" else 1)
    assert all("muon" not in group for group in others)


def test_embeddings_within_a_block_are_not_muons():
    block = nn.ModuleDict({"label": nn.Embedding(3, 4), "map": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 1)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "head": nn.Linear(4, 1)})
    (matrices,) = [group for group in parameter_groups(model, muon=True) if group["muon"]]
    assert matrices["params"] == [block["map"].weight]


def test_muon_without_hidden_matrices_is_refused():
    model = nn.Sequential(MPLinear(4, 4), MPLinear(4, 4))
    with pytest.raises(ValueError, match="`muon` must be False for a model without .* a Sequential has none"):
        parameter_groups(model, muon=True)
    blocks = nn.ModuleList([MPLinear(4, 4).requires_grad_(False)])
    with pytest.raises(ValueError, match="`muon` must be False"):
        parameter_groups(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(4, 1)}), muon=True)


@pytest.mark.parametrize("scale_eps", [True, False])
def test_adam_on_unit_rows_follows_adam_on_rows_of_magnitude_one(scale_eps):
    """With an eps as large as the gradient its scaling decides: without it the trajectories part."""
    fan_in, eps = 64, 1e-2
    layer = MPLinear(fan_in, 8, dtype=torch.float64)
    reference = nn.Parameter(layer.weight.detach() * math.sqrt(fan_in))
    groups = parameter_groups(layer, lr=1e-2, eps=eps)
    if not scale_eps:
        groups = [{**group, "eps": eps} for group in groups]
    ours = torch.optim.Adam(groups, betas=(0.9, 0.99))
    theirs = torch.optim.Adam([reference], lr=1e-2, betas=(0.9, 0.99), eps=eps)
    for _ in range(10):
        x, y = torch.randn(32, fan_in, dtype=torch.float64), torch.randn(32, 8, dtype=torch.float64)
        (layer(x) - y).square().mean().backward()
        (x @ functional.unit_norm(reference).T - y).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        normalize_weights_(layer)
        with torch.no_grad():
            reference.copy_(functional.unit_magnitude(reference))
    difference = (layer.weight - reference / math.sqrt(fan_in)).abs().max().item()
    assert difference < 1e-13 if scale_eps else difference > 1e-4


@pytest.mark.parametrize("num_steps", [150, 1500, 3000])
def test_schedule_is_the_formula_of_the_recipe(num_steps):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4}], lr=0.1)
    schedule = inverse_sqrt_schedule(optimizer, num_warmup_steps=num_steps // 150, num_constant_steps=num_steps // 10)
    for update in range(1, num_steps + 1):
        expected = min(1, update / (num_steps / 150)) / math.sqrt(max(1, update / (num_steps / 10)))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * expected, rel=1e-12)
        optimizer.step()
        schedule.step()
    # One tenth of training at the full rate, then 1 / sqrt(10) of it at the end.
    assert expected == pytest.approx(1 / math.sqrt(10))


def test_schedule_without_warmup_starts_at_the_full_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    inverse_sqrt_schedule(optimizer, num_warmup_steps=0, num_constant_steps=10)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("num_constant_steps", [0, -1])
def test_schedule_refuses_a_decay_from_before_the_start(num_constant_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=f"`num_constant_steps` must be at least 1, got {num_constant_steps}"):
        inverse_sqrt_schedule(optimizer, 1, num_constant_steps)


def test_schedule_refuses_a_warm_up_of_negative_rates():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="`num_warmup_steps` must be at least 0, got -5"):
        inverse_sqrt_schedule(optimizer, -5, 10)


def test_rows_in_evaluation_mode_are_told():
    model = nn.Sequential(MPLinear(4, 4), nn.Linear(4, 4)).eval()
    with pytest.warns(UserWarning, match=r"the model is in evaluation mode, .* call `model.train\(\)` before"):
        parameter_groups(model)
    # Warnings are errors here: neither frozen rows nor plain layers are spoken of.
    model[0].requires_grad_(False)
    assert len(parameter_groups(model)) == 1
    parameter_groups(nn.Linear(4, 4).eval())
