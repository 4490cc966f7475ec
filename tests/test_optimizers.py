"""The table of docs/optimizers.md: what forced normalisation covers, and which rates carry over to unit rows."""

import copy
import math
import re
import warnings

import pytest
import torch
from helpers import NOT_IN_DEV, ROOT, row_norms, tiny_inputs, tiny_model
from torch import nn

from diffusers_mp import MPEmbedding, MPLinear, functional, normalize_weights_
from diffusers_mp.optimization import (
    SCALINGS,
    MuonWithAdam,
    check_optimizer,
    inverse_sqrt_schedule,
    parameter_groups,
)


FAN_IN, EPS = 64, 1e-2
# Rows closer to their norm than this count as there (33 float32 eps, see `normalize_weights_`) and are not touched.
AT_NORM = 5e-6
OPTIM = torch.optim
# name: (optimiser on groups that bring lr and eps, scaling); eps is as large as the gradient, so that it decides.
CARRY_OVER = {
    "Adam": (OPTIM.Adam, "adam"),
    "Adam, foreach": (lambda groups: OPTIM.Adam(groups, foreach=True), "adam"),
    "Adam, fused": (lambda groups: OPTIM.Adam(groups, fused=True), "adam"),
    "Adam, amsgrad": (lambda groups: OPTIM.Adam(groups, amsgrad=True), "adam"),
    "AdamW": (lambda groups: OPTIM.AdamW(groups, weight_decay=0), "adam"),
    "AdamW, fused": (lambda groups: OPTIM.AdamW(groups, weight_decay=0, fused=True), "adam"),
    "NAdam": (OPTIM.NAdam, "adam"),
    "Adamax": (OPTIM.Adamax, "adam"),
    "RMSprop": (lambda groups: OPTIM.RMSprop(groups, momentum=0.9, centered=True), "adam"),
    "Adagrad": (OPTIM.Adagrad, "adam"),
    "Muon": (lambda groups: OPTIM.Muon(groups, weight_decay=0), "adam"),
    "Muon, Adam's rate": (lambda groups: OPTIM.Muon(groups, weight_decay=0, adjust_lr_fn="match_rms_adamw"), "adam"),
    "SGD": (OPTIM.SGD, "sgd"),
    "SGD, momentum": (lambda groups: OPTIM.SGD(groups, momentum=0.9, nesterov=True, foreach=True), "sgd"),
}
# These have a step that neither rule describes; how their rates carry over has not been derived.
PART_WAYS = {
    "RAdam": OPTIM.RAdam,
    "Adadelta": lambda groups: OPTIM.Adadelta([{**group, "lr": 100 * group["lr"]} for group in groups]),
    "Adafactor": lambda groups: OPTIM.Adafactor([{**group, "eps": (None, 1e-3)} for group in groups]),
}


def distance_of_trajectories(make, scaling, num_steps=10, dtype=torch.float64):
    """Largest entry, in units of RMS, by which unit rows part from the same rows at RMS 1 after some updates."""
    torch.manual_seed(0)
    layer = MPLinear(FAN_IN, 8, dtype=dtype)
    reference = nn.Parameter(layer.weight.detach() * math.sqrt(FAN_IN))
    ours = make(parameter_groups(layer, lr=1e-2, eps=EPS, scaling=scaling))
    theirs = make([{"params": [reference], "lr": 1e-2, "eps": EPS, "weight_decay": 0.0}])
    before = layer.weight.detach().clone()
    for _ in range(num_steps):
        x, y = torch.randn(32, FAN_IN, dtype=dtype), torch.randn(32, 8, dtype=dtype)
        (layer(x) - y).square().mean().backward()
        (functional.unit_norm(reference) @ x.T - y.T).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        normalize_weights_(layer)
        with torch.no_grad():
            reference.copy_(functional.unit_magnitude(reference))
    assert (layer.weight - before).abs().max() > 1e-5, "nothing has moved"
    return (layer.weight * math.sqrt(FAN_IN) - reference).abs().max().item()


@pytest.mark.parametrize("name", CARRY_OVER)
def test_rates_carry_over_from_rows_of_magnitude_one(name):
    make, scaling = CARRY_OVER[name]
    # Muon's iteration runs in bfloat16; the fan-in is a power of 4, so that even there scaling rounds nothing.
    assert distance_of_trajectories(make, scaling) < 1e-12
    other = {"adam": "sgd", "sgd": "adam"}[scaling]
    assert distance_of_trajectories(make, other) > 1e-4


@pytest.mark.parametrize("name", PART_WAYS)
def test_where_neither_rule_holds_the_optimizer_warns(name):
    assert min(distance_of_trajectories(PART_WAYS[name], scaling) for scaling in SCALINGS) > 1e-4
    layer = MPLinear(FAN_IN, 8)
    with pytest.warns(UserWarning, match=f"not known how rates of {name} carry over"):
        check_optimizer(layer, PART_WAYS[name](parameter_groups(layer)))


def regression(make, num_steps=60, normalize=True):
    """Losses of a small network that learns another one, and the network."""
    torch.manual_seed(0)
    network, target = (nn.Sequential(MPLinear(16, 64), nn.SiLU(), MPLinear(64, 8)) for _ in range(2))
    update, losses = make(network), []
    for _ in range(num_steps):
        x = torch.randn(256, 16)
        loss = (network(x) - target(x).detach()).square().mean()
        loss.backward()
        update()
        network.zero_grad()
        if normalize:
            normalize_weights_(network)
            for layer in (network[0], network[2]):
                assert (row_norms(layer.weight) - 1).abs().max() < AT_NORM
        losses.append(loss.item())
    return losses, network


def stepping(make):
    return lambda network: make(network).step


@pytest.mark.parametrize("name", [*CARRY_OVER, *PART_WAYS])
def test_rows_are_at_norm_one_and_the_loss_falls(name):
    make, scaling = CARRY_OVER.get(name, (PART_WAYS.get(name), "adam"))
    lr = {"sgd": 10.0, "adam": 0.1}[scaling] * (10 if name == "Adadelta" else 1)
    losses, _ = regression(stepping(lambda network: make(parameter_groups(network, lr=lr, scaling=scaling))))
    assert sum(losses[-5:]) < 0.25 * sum(losses[:5])


def test_a_hand_written_loop():
    def make(network):
        @torch.no_grad()
        def update():
            for parameter in network.parameters():
                parameter -= 0.05 * parameter.grad / parameter.grad.norm(dim=-1, keepdim=True)

        return update

    losses, _ = regression(make)
    assert losses[-1] < 0.5 * losses[0]
    # Nobody puts the rows back: they grow, as updates orthogonal to a row do.
    _, network = regression(make, normalize=False)
    assert row_norms(network[0].weight).min() > 1.01


def test_one_update_of_muon_turns_a_row_by_its_rate():
    """With its own rule for the shape, Muon's rate on unit rows is the angle in radians, RMS over rows."""
    for fan_out, fan_in in ((256, 64), (64, 256), (128, 128)):
        layer = MPLinear(fan_in, fan_out)
        before = layer.weight.detach().clone()
        optimizer = OPTIM.Muon(layer.parameters(), lr=1e-2, weight_decay=0)
        (layer(torch.randn(512, fan_in)) - torch.randn(512, fan_out)).square().mean().backward()
        optimizer.step()
        turned = (layer.weight - before).norm(dim=-1).square().mean().sqrt().item()
        # Newton-Schulz leaves singular values between 0.7 and 1.2.
        assert 0.7e-2 < turned < 1.2e-2


# Muon and Adam as one


def muon_with_adam(model, **more):
    return MuonWithAdam(parameter_groups(model, lr=1e-2, muon=True, **more), lr=1e-2)


def learn(model, step, num_steps):
    for _ in range(num_steps):
        model(**tiny_inputs()).sample.square().mean().backward()
        step()
        model.zero_grad()
        normalize_weights_(model)


@pytest.mark.parametrize("configuration, weight_decay", [("E", 0.0), ("A", 0.1)])
def test_muon_with_adam_is_both_of_them(configuration, weight_decay):
    """To the bit what PyTorch's two do by themselves, each with its schedule."""
    model = tiny_model(configuration).train()
    other = copy.deepcopy(model)
    one = muon_with_adam(model, weight_decay=weight_decay)
    groups = parameter_groups(other, lr=1e-2, muon=True, weight_decay=weight_decay)
    rest = [group for group in groups if not group["muon"]]
    two = [
        OPTIM.Muon([group for group in groups if group["muon"]], adjust_lr_fn="match_rms_adamw"),
        OPTIM.AdamW(rest, betas=(0.9, 0.99)) if weight_decay else OPTIM.Adam(rest, betas=(0.9, 0.99)),
    ]
    schedules = [inverse_sqrt_schedule(optimizer, 3, 5) for optimizer in (one, *two)]
    learn(model, lambda: (one.step(), schedules[0].step()), 8)
    learn(other, lambda: [part.step() for part in (*two, *schedules[1:])], 8)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    check_optimizer(model, one)


def test_muon_with_adam_goes_on_from_its_state():
    model = tiny_model().train()
    optimizer = muon_with_adam(model)
    learn(model, optimizer.step, 3)
    other = copy.deepcopy(model)
    resumed = muon_with_adam(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(model, optimizer.step, 2)
    learn(other, resumed.step, 2)
    for (name, ours), theirs in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(ours, theirs[1]), name
    # What is loaded counts, not what the two were made with: another rate, no step.
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    learn(model, optimizer.step, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_a_scaler_keeps_muon_with_adam_from_an_infinite_gradient():
    model, scaler = tiny_model().train(), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer, before = muon_with_adam(model), copy.deepcopy(model)
    for factor, moves in ((math.inf, False), (1.0, True)):
        (scaler.scale(model(**tiny_inputs()).sample.square().mean()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for (name, ours), old in zip(model.named_parameters(), before.parameters(), strict=True):
            assert torch.equal(ours, old) != moves, name


def test_a_row_turns_by_a_fifth_of_the_rate():
    model = tiny_model().train()
    optimizer, before = muon_with_adam(model), dict(copy.deepcopy(model).named_parameters())
    (model(**tiny_inputs()).sample - torch.randn(3, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["muon"] else []:
            (name,) = [name for name, other in model.named_parameters() if other is parameter]
            turned = (parameter - before[name]).norm(dim=-1).square().mean().sqrt().item()
            assert 0.7 * 0.2e-2 < turned < 1.2 * 0.2e-2, name


def test_muon_with_adam_wants_groups_of_both():
    with pytest.raises(ValueError, match=r"`params` must be groups as `parameter_groups\(model, muon=True\)`"):
        MuonWithAdam(tiny_model().parameters())
    with pytest.raises(ValueError, match="must have groups for Muon and for Adam, got 1 and 0"):
        MuonWithAdam([{"params": [nn.Parameter(torch.zeros(2, 2))], "muon": True}])


def test_muon_with_adam_takes_a_closure():
    model = tiny_model().train()
    optimizer = muon_with_adam(model)

    def closure():
        optimizer.zero_grad()
        loss = model(**tiny_inputs()).sample.square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


@pytest.mark.parametrize("configuration", "ABCDEF")
@pytest.mark.parametrize("scaling, divisor", [("adam", lambda n: n**0.5), ("sgd", lambda n: n)])
def test_groups_of_each_configuration(configuration, scaling, divisor):
    """Every parameter once, and with the rate of its layer; plain maps of A and B take the published one."""
    model = tiny_model(configuration)
    groups = parameter_groups(model, lr=1e-2, scaling=scaling)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        expected = 1e-2 / divisor(layer.in_features) if isinstance(layer, MPLinear) else 1e-2
        assert rates[id(parameter)] == pytest.approx(expected, rel=1e-12), name
    names = sorted(group["name"] for group in groups)
    # Patches of 2 x 2 x 4 and the constant, time features, width, hidden width.
    unit_rows = ["unit_rows_128", "unit_rows_17", "unit_rows_256", "unit_rows_32"]
    assert names == ["as_published"] + (unit_rows if configuration in "CDEF" else [])


@pytest.mark.parametrize("configuration", "ABCDEF")
def test_a_model_of_each_configuration_learns(configuration):
    model, inputs = tiny_model(configuration, open_gains=False).train(), tiny_inputs(batch_size=8)
    lr = 1e-2 if configuration in "CDEF" else 1e-3
    optimizer = OPTIM.Adam(parameter_groups(model, lr=lr), betas=(0.9, 0.99))
    check_optimizer(model, optimizer)
    losses = []
    for _ in range(25):
        loss = (model(**inputs).sample - inputs["hidden_states"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        normalize_weights_(model)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for layer in model.modules():
        if isinstance(layer, (MPLinear, MPEmbedding)):
            at_norm_one = (row_norms(layer.weight) / layer.row_norm - 1).abs().max() < AT_NORM
            assert at_norm_one == (configuration in "DEF")


# Weight decay


@pytest.mark.parametrize("make", [OPTIM.AdamW, OPTIM.Adam])
def test_weight_decay_that_a_user_passes_himself(make):
    layer = MPLinear(FAN_IN, 8)
    # The groups' zero wins ...
    optimizer = make(parameter_groups(layer), weight_decay=0.1)
    assert optimizer.param_groups[0]["weight_decay"] == 0
    check_optimizer(layer, optimizer)
    # ... and what goes around them is told.
    with pytest.warns(UserWarning, match="has weight decay 0.1 on normalised rows"):
        check_optimizer(layer, make(layer.parameters(), weight_decay=0.1))


def test_decoupled_decay_of_forced_rows_is_a_slightly_larger_rate():
    """w (1 - lr d) - lr u points where w - lr / (1 - lr d) u does."""
    layer = MPLinear(FAN_IN, 8, dtype=torch.float64)
    layers = [copy.deepcopy(layer) for _ in range(2)]
    lr, decay, gradient = 0.1, 0.5, torch.randn_like(layer.weight)
    for layer, rate, wd in zip(layers, (lr, lr / (1 - lr * decay)), (decay, 0.0), strict=True):
        layer.weight.grad = gradient.clone()
        OPTIM.AdamW(layer.parameters(), lr=rate, weight_decay=wd).step()
        normalize_weights_(layer)
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=0, atol=1e-14)


# Warnings


def test_known_optimizers_and_models_without_normalised_rows_are_silent():
    layer, plain = MPLinear(FAN_IN, 8), nn.Linear(4, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for make, scaling in CARRY_OVER.values():
            check_optimizer(layer, make(parameter_groups(layer, scaling=scaling)))
        check_optimizer(layer, OPTIM.Adam(layer.parameters()))
        check_optimizer(plain, OPTIM.ASGD(plain.parameters(), weight_decay=0.1))
    assert told == []


@pytest.mark.parametrize("make, scaling, right", [(OPTIM.SGD, "adam", "sgd"), (OPTIM.Adam, "sgd", "adam")])
def test_groups_that_were_scaled_for_another_kind(make, scaling, right):
    layer = MPLinear(FAN_IN, 8)
    with pytest.warns(UserWarning, match=f"another kind of optimiser than {make.__name__}: pass `scaling='{right}'`"):
        check_optimizer(layer, make(parameter_groups(layer, scaling=scaling)))


def test_an_optimizer_of_ones_own_and_a_wrapped_one():
    class Mine(OPTIM.SGD):
        pass

    class Wrapper(OPTIM.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    layer = MPLinear(FAN_IN, 8)
    for optimizer in (Mine(layer.parameters()), Wrapper(Mine(layer.parameters()))):
        with pytest.warns(UserWarning, match="not known how rates of Mine carry over"):
            check_optimizer(layer, optimizer)


def test_unknown_scaling():
    with pytest.raises(ValueError, match=r"`scaling` must be one of \['adam', 'sgd'\], got 'lion'"):
        parameter_groups(MPLinear(4, 4), scaling="lion")


# Of other packages


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit"])
@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_eight_bit_adam(package, name):
    optimizers = pytest.importorskip(f"{package}.optim", reason=NOT_IN_DEV)
    more = {"min_8bit_size": 1} if package == "bitsandbytes" else {"block_size": 16}

    def make(groups):
        return getattr(optimizers, name)(groups, weight_decay=0, **more)

    losses, network = regression(stepping(lambda network: make(parameter_groups(network, lr=0.1))))
    assert sum(losses[-5:]) < 0.25 * sum(losses[:5])
    # States are quantised relative to the largest of their block, which scales with the rest.
    assert distance_of_trajectories(make, "adam", dtype=torch.float32) < 1e-3
    check_optimizer(network, make(parameter_groups(network)))


@pytest.mark.filterwarnings("ignore")
def test_lion():
    make = pytest.importorskip("bitsandbytes.optim", reason=NOT_IN_DEV).Lion
    assert distance_of_trajectories(lambda groups: make(groups, weight_decay=0), "adam", dtype=torch.float32) < 1e-4


# The table


DOCS = (ROOT / "docs" / "optimizers.md").read_text()


def test_the_table_names_what_is_tested():
    rows = [line.split("|")[1:-1] for line in DOCS.splitlines() if line.startswith("| `")]
    table = {row[0].strip().strip("`"): row[2].strip() for row in rows}
    tested = {name.partition(",")[0] for name in (*CARRY_OVER, *PART_WAYS)}
    assert tested | {"Adam8bit", "AdamW8bit", "Lion"} == set(table)
    for name, scaling in table.items():
        expected = [known for known, (_, names) in SCALINGS.items() if name in names]
        assert scaling.strip("`") == (expected[0] if expected else "not known, warns"), name


def test_the_example_of_the_docs():
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    names = {}
    exec(code, names)
    assert type(names["optimizer"]) is MuonWithAdam
