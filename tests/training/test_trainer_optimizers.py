"""What the trainer makes of its flags of optimisers and schedules, by class, groups and closed forms."""

import argparse
import math

import pytest
import torch
from helpers import NOT_IN_DEV, tiny_model

from diffusers_mp.optimization import MuonWithAdam
from diffusers_mp.training.optimizers import learning_rate_schedule, make_optimizer


def arguments(**given):
    defaults = {"optimizer": "adam", "use_8bit_adam": False, "adam_beta1": 0.8, "adam_beta2": 0.99}
    return argparse.Namespace(**{**defaults, "adam_epsilon": 1e-6, "adam_weight_decay": 0.0, **given})


@pytest.mark.parametrize(
    "name, cls", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("muon", MuonWithAdam)]
)
def test_optimizer_of_each_name(name, cls):
    optimizer = make_optimizer(arguments(optimizer=name), tiny_model(), 3e-3)
    assert type(optimizer) is cls
    assert optimizer.defaults["lr"] == 3e-3
    for group in optimizer.param_groups:
        fan_in = int(group["name"].rpartition("_")[2]) if "unit_rows" in group["name"] else 1
        assert group["lr"] == pytest.approx(3e-3 / math.sqrt(fan_in))
        assert group["weight_decay"] == 0
        if group.get("muon"):
            assert (group["momentum"], group["nesterov"]) == (0.95, True)
            assert group["adjust_lr_fn"] == "match_rms_adamw"
        else:
            assert (group["betas"], group["eps"]) == ((0.8, 0.99), pytest.approx(1e-6 * math.sqrt(fan_in)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, cls", [("adam", "Adam8bit"), ("adamw", "AdamW8bit")])
def test_moments_in_eight_bits(name, cls):
    optimizers = pytest.importorskip("bitsandbytes.optim", reason=NOT_IN_DEV)
    model = torch.nn.Linear(128, 64)
    optimizer = make_optimizer(arguments(optimizer=name, use_8bit_adam=True), model, 3e-3)
    assert type(optimizer) is getattr(optimizers, cls)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    model(torch.randn(4, 128)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[model.bias]["state1"].dtype == torch.float32


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_plain_weights_and_is_refused_where_all_rows_are_normalised(name):
    model = tiny_model("A")
    optimizer = make_optimizer(arguments(optimizer=name, adam_weight_decay=0.1), model, 1e-2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * (1 - 1e-2 * 0.1))
    with pytest.raises(ValueError, match="`adam_weight_decay` must be 0 for a model with normalised rows.* Got 0.1"):
        make_optimizer(arguments(optimizer=name, adam_weight_decay=0.1), tiny_model("E"), 1e-2)


def rates(name, num_steps=40, num_warmup_steps=8, **facts):
    """Rates of the updates of a run, over that of its groups."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    # As groups of `parameter_groups` are: their rates are others than that which is published, 1e-2.
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": 2e-3}], lr=1e-2)
    facts = {"lr_warmup_steps": num_warmup_steps, "lr_num_cycles": None, "lr_power": None, **facts}
    schedule = learning_rate_schedule(argparse.Namespace(lr_scheduler=name), optimizer, facts, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"] / 2e-3)
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("num_cycles", [1, 2, 4])
def test_cosine_with_restarts(num_cycles):
    expected = [
        u / 8 if u < 8 else 0.5 * (1 + math.cos(math.pi * ((num_cycles * (u - 8) / 32) % 1.0))) for u in range(40)
    ]
    found = rates("cosine_with_restarts", lr_num_cycles=num_cycles)
    assert found == pytest.approx(expected)
    assert (found == pytest.approx(rates("cosine"))) == (num_cycles == 1)
    # Full again at the start of each cycle.
    assert sum(rate == pytest.approx(1) for rate in found) == num_cycles


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_ends_at_1e_7_of_the_published_rate(power):
    end = 1e-7 / 1e-2
    expected = [u / 8 if u < 8 else (1 - end) * (1 - (u - 8) / 32) ** power + end for u in range(40)]
    found = rates("polynomial", lr_power=power)
    assert found == pytest.approx(expected, rel=1e-12)
    assert (found == pytest.approx(rates("linear"), abs=1e-4)) == (power == 1)


def test_a_polynomial_with_nothing_to_decay_in():
    message = r"`lr_warmup_steps` must be below the number of updates \(40\) for a polynomial decay, got 40"
    with pytest.raises(ValueError, match=message):
        rates("polynomial", num_warmup_steps=40, lr_power=1.0)
    assert rates("polynomial", num_warmup_steps=39, lr_power=1.0)[-1] == pytest.approx(1)
