"""The arithmetic of docs/scale_out.md: against what a step of training holds, and against the table of that page."""

import re

import pytest
import torch
from accelerate import init_empty_weights
from helpers import ROOT, tiny_inputs, tiny_model

from diffusers_mp import MPDiTTransformer2DModel, PowerFunctionEMA, get_preset, parameter_groups
from diffusers_mp.optimization import MuonWithAdam
from diffusers_mp.training.memory import activation_bytes, state_bytes


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("stds", [(0.05,), (0.05, 0.1, 0.15)])
def test_state_is_what_a_step_of_training_holds(stds):
    model = tiny_model().train()
    optimizer, ema = torch.optim.Adam(parameter_groups(model, lr=1e-2)), PowerFunctionEMA(model, stds)
    model(**tiny_inputs()).sample.square().mean().backward()
    optimizer.step()
    ema.update(1)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    averages = [tensor for average in ema.state_dict()["averages"] for tensor in average.values()]
    held = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *moments, *averages]
    assert state_bytes(model, len(stds)) == num_bytes(held)


def test_muon_keeps_one_moment_of_hidden_matrices():
    model = tiny_model().train()
    optimizer = MuonWithAdam(parameter_groups(model, lr=1e-2, muon=True))
    model(**tiny_inputs()).sample.square().mean().backward()
    optimizer.step()
    state = [value for of_one in optimizer.state.values() for value in of_one.values() if value.ndim]
    held = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *state]
    assert state_bytes(model, 0, optimizer="muon") == num_bytes(held)
    assert state_bytes(model, 0, optimizer="muon") < state_bytes(model, 0)


def test_moments_in_8_bits():
    # 64 x 64 numbers, and 64 too few to be worth it.
    layer = torch.nn.Linear(64, 64)
    assert state_bytes(layer, 0, use_8bit_adam=True) == 4096 * (4 + 4 + 2) + 64 * (4 + 4 + 8)


TABLE = re.findall(
    r"^\| (\w+/[12]) \| ([\d.]+) M \| ([\d.]+) \| ([\d.]+) \| (\d+) \| (\d+) \|$",
    (ROOT / "docs" / "scale_out.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_the_table_of_the_docs(row):
    size, millions, state, shard, activations, checkpointed = row
    channels, sample_size = (4, 32) if size.endswith("/2") else (128, 16)
    of_latents = {"in_channels": channels, "out_channels": 2 * channels, "sample_size": sample_size}
    config = get_preset(size, **of_latents, num_classes=1000)
    with init_empty_weights():
        model = MPDiTTransformer2DModel(**config)
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}" == millions
    assert f"{state_bytes(model, 2) / 2**30:.2f}" == state
    assert f"{state_bytes(model, 2, num_shards=8) / 2**30:.2f}" == shard
    assert round(activation_bytes(config, 1) / 2**20) == int(activations)
    assert round(activation_bytes(config, 1, gradient_checkpointing=True) / 2**20) == int(checkpointed)


def test_there_is_a_table():
    assert len(TABLE) == 10
    # And activations grow with the images.
    config = get_preset("S/2", sample_size=32)
    assert activation_bytes(config, 64) == 64 * activation_bytes(config, 1)
