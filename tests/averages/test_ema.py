"""Profile maths against the golden numbers and numerical integrals, tracking against closed forms."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import ROOT, row_norms, tiny_model
from torch import nn

from diffusers_mp import normalize_weights_
from diffusers_mp.averages.ema import (
    MAX_STD,
    PowerFunctionEMA,
    exponent_of_std,
    power_function_decay,
    profile_inner_product,
)
from diffusers_mp.averages.reconstruction import reconstruction_weights
from diffusers_mp.layers import MPEmbedding, MPLinear


GOLDEN = json.loads((ROOT / "tests" / "fixtures" / "golden" / "ema.json").read_text())


class Counter(nn.Module):
    """A model that is one number, to be set to θ(t)."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=dtype))

    def set(self, value):
        with torch.no_grad():
            self.value.fill_(value)


class Small(nn.Module):
    """Every kind of state there is: normalised rows, a label table, a gain, a buffer, integers."""

    def __init__(self):
        super().__init__()
        self.label = MPEmbedding(5, 8)
        self.proj = MPLinear(8, 6)
        self.gain = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.codes = nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("statistic", torch.randn(2))


def floating(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def drift(model, seed):
    """Stand-in for an optimiser step: other values, rows off their norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in floating(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def tracked(model, stds=(0.05, 0.10), num_steps=7):
    ema = PowerFunctionEMA(model, stds)
    for step in range(1, num_steps + 1):
        drift(model, step)
        ema.update(step)
    return ema


def average(ema, std, name="value"):
    return ema.state_dict()["averages"][ema.stds.index(std)][name]


def bits(tensors):
    return {name: tensor.detach().reshape(-1).view(torch.uint8).tolist() for name, tensor in tensors.items()}


def model_bits(model):
    # Not from `state_dict()`, which normalises the rows of a model in training mode.
    return bits({**dict(model.named_parameters()), **dict(model.named_buffers())})


# Profile maths.


@pytest.mark.parametrize("std", GOLDEN["exponent_of_std"])
def test_exponent_is_the_golden_one_and_solves_the_cubic(std):
    exponent = exponent_of_std(float(std))
    assert exponent == pytest.approx(GOLDEN["exponent_of_std"][std], abs=1e-9, rel=0)
    # Equation 123: the width of a profile of this exponent.
    assert (exponent + 1) ** 0.5 / ((exponent + 2) * (exponent + 3) ** 0.5) == pytest.approx(float(std), rel=1e-12)


def profile(step, exponent, num_cells, last_step):
    """Profile of integral one on a midpoint grid over [0, last_step]."""
    grid = (np.arange(num_cells) + 0.5) / num_cells * last_step
    return grid, np.where(grid <= step, (exponent + 1) / step * (np.minimum(grid, step) / step) ** exponent, 0.0)


@pytest.mark.parametrize("std", [0.03, 0.1, 0.25])
def test_std_is_the_standard_deviation_of_the_profile(std):
    grid, density = profile(1.0, exponent_of_std(std), 400_000, 1.0)
    weights = density / density.sum()
    mean = (weights * grid).sum()
    assert (weights * (grid - mean) ** 2).sum() ** 0.5 == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize("step_a, step_b", [(600, 1000), (1000, 600), (800, 800)])
def test_inner_product_is_the_integral_of_the_product(step_a, step_b):
    grid, a = profile(step_a, 3.5, 400_000, 1000)
    _, b = profile(step_b, 7.0, 400_000, 1000)
    assert profile_inner_product(step_a, 3.5, step_b, 7.0) == pytest.approx((a * b).mean() * 1000, rel=1e-4)


@pytest.mark.parametrize("std", GOLDEN["decay_multiplying_the_average_at_step"])
def test_decay_is_the_golden_one(std):
    for step, expected in GOLDEN["decay_multiplying_the_average_at_step"][std].items():
        assert power_function_decay(int(step), float(std)) == pytest.approx(expected, abs=1e-9, rel=0)


def test_reconstruction_from_tracked_snapshots_is_the_average_tracked_directly():
    model = Counter()
    ema = PowerFunctionEMA(model, (0.05, 0.075, 0.10))
    steps, stds, snapshots = [], [], []
    for step in range(1, 1001):
        model.set(step + 100 * np.sin(step / 100))
        ema.update(step)
        if step % 50 == 0:
            for std in (0.05, 0.10):
                steps.append(step)
                stds.append(std)
                snapshots.append(average(ema, std).item())
    reconstructed = reconstruction_weights(steps, stds, 1000, 0.075) @ snapshots
    wanted = average(ema, 0.075).item()
    # The snapshots themselves are 10 away and more.
    assert abs(reconstructed - wanted) < 0.01
    assert min(abs(snapshot - wanted) for snapshot in snapshots) > 5


# Tracking.


def test_average_of_a_ramp_is_the_golden_one():
    stds = tuple(float(std) for std in GOLDEN["average_of_a_ramp_1_to_1000"])
    model = Counter()
    ema = PowerFunctionEMA(model, stds)
    swapped = 0.0
    for step in range(1, 1001):
        model.set(step)
        ema.update(step)
        decay = power_function_decay(step, stds[0])
        swapped = (1 - decay) * swapped + decay * step
    for std in stds:
        expected = GOLDEN["average_of_a_ramp_1_to_1000"][str(std)]
        assert average(ema, std).item() == pytest.approx(expected, abs=1e-9, rel=0)
    # Control: with decay on the new weights the "average" is the raw weights, within a step of 1000.
    assert swapped > 999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_constant_weights_stay_to_the_bit(dtype):
    model = nn.Linear(7, 5, dtype=dtype)
    ema = PowerFunctionEMA(model, (0.05, 0.2))
    for step in range(1, 301):
        ema.update(step)
    for averages in ema.state_dict()["averages"]:
        for name, parameter in model.named_parameters():
            assert averages[name].dtype == torch.promote_types(dtype, torch.float32)
            assert torch.equal(averages[name], parameter.detach().to(averages[name].dtype))


def test_first_update_forgets_the_initial_weights():
    model = Counter()
    model.set(float("1e30"))
    ema = PowerFunctionEMA(model)
    assert average(ema, 0.05) == 1e30
    model.set(3.0)
    ema.update(20)
    assert average(ema, 0.05) == 3.0


def test_a_stride_is_exact_for_weights_that_were_constant_over_it():
    every, strided = Counter(), Counter()
    ema_every, ema_strided = PowerFunctionEMA(every), PowerFunctionEMA(strided)
    for block in range(25):
        value = float(np.cos(block))
        every.set(value)
        strided.set(value)
        for step in range(8 * block + 1, 8 * block + 9):
            ema_every.update(step)
        ema_strided.update(8 * block + 8)
    for std in ema_every.stds:
        # (1 - 1/t) telescopes over the stride: equal up to the rounding of 200 float64 updates.
        torch.testing.assert_close(average(ema_strided, std), average(ema_every, std), rtol=0, atol=1e-13)
    assert ema_strided.step == ema_every.step == 200


def test_bf16_weights_are_averaged_in_float32():
    coarse, exact = Counter(torch.bfloat16), Counter(torch.float64)
    ema_coarse, ema_exact = PowerFunctionEMA(coarse), PowerFunctionEMA(exact)
    for step in range(1, 301):
        value = 1.0 if step <= 150 else 1.0078125
        coarse.set(value)
        exact.set(value)
        ema_coarse.update(step)
        ema_exact.update(step)
    # bf16 would never leave 1: the step to its next number is more than one update moves the average.
    assert average(ema_coarse, 0.10).item() == pytest.approx(average(ema_exact, 0.10).item(), abs=1e-5)
    assert 1 < average(ema_exact, 0.10) < 1.0078125


def test_update_leaves_the_model_and_reads_it_anew():
    model = Small()
    before = model_bits(model)
    ema = PowerFunctionEMA(model)
    ema.update(1)
    assert model_bits(model) == before
    model.gain = nn.Parameter(torch.tensor(5.0))
    ema.update(10**9)
    model.gain.data.fill_(7.0)
    assert average(ema, 0.05, "gain") == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_to_puts_rows_back_to_their_norm_and_leaves_the_rest(dtype):
    model = Small()
    ema = tracked(model)
    other = Small().to(dtype)
    with torch.no_grad():
        other.codes.add_(10)
    statistic = other.statistic.clone()
    ema.copy_to(other, 0.10)
    averages = ema.state_dict()["averages"][1]
    tolerance = torch.finfo(dtype).eps
    raw_norms = averages["proj.weight"].norm(dim=1)
    assert (raw_norms - 1).abs().min() > 0.01
    torch.testing.assert_close(
        other.proj.weight.float(), averages["proj.weight"] / raw_norms[:, None], rtol=2 * tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        other.label.weight.float().norm(dim=1), torch.full((5,), 8**0.5), rtol=tolerance, atol=0
    )
    assert torch.equal(other.gain, averages["gain"].to(dtype))
    assert torch.equal(other.frozen, averages["frozen"].to(dtype))
    assert torch.equal(other.codes, torch.arange(10, 14))
    assert torch.equal(other.statistic, statistic)
    assert "codes" not in averages
    assert "statistic" not in averages


def test_copy_to_leaves_the_average_alone():
    model = Small()
    ema = tracked(model)
    before = copy.deepcopy(ema.state_dict())
    ema.copy_to(model, 0.05)
    drift(model, 99)
    for now, then in zip(ema.state_dict()["averages"], before["averages"], strict=True):
        assert bits(now) == bits(then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("raises", [False, True])
def test_averaged_swaps_in_and_restores_bit_for_bit(dtype, raises):
    model = Small().to(dtype)
    ema = tracked(model)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    raw, raw_floating, expected = model_bits(model), bits(floating(model)), Small().to(dtype)
    ema.copy_to(expected, 0.05)

    def evaluate():
        with ema.averaged(model, 0.05) as inside:
            assert inside is model
            assert bits(floating(model)) == bits(floating(expected))
            assert bits(floating(model)) != raw_floating
            drift(model, 5)
            if raises:
                raise KeyError("from the body")

    if raises:
        with pytest.raises(KeyError, match="from the body"):
            evaluate()
    else:
        evaluate()
    # Rows of `model` are off their norm here: restoring must not normalise them.
    assert model_bits(model) == raw
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert all(
        parameter.requires_grad == (name not in ("frozen", "codes")) for name, parameter in model.named_parameters()
    )


def test_state_dict_round_trip_continues_the_same_run():
    model = Small()
    ema = tracked(model)
    resumed_model = copy.deepcopy(model)
    resumed = PowerFunctionEMA(resumed_model)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert resumed.step == 7
    for step in (8, 12):
        for current, tracker in ((model, ema), (resumed_model, resumed)):
            drift(current, step)
            tracker.update(step)
    for now, then in zip(resumed.state_dict()["averages"], ema.state_dict()["averages"], strict=True):
        assert bits(now) == bits(then)


# Errors.


@pytest.mark.parametrize("std", [0, -0.1, MAX_STD, 0.3, float("nan")])
def test_widths_out_of_range_are_refused(std):
    with pytest.raises(ValueError, match=rf"`std` must lie in \(0, 1/sqrt\(12\)\).* got {std}"):
        exponent_of_std(std)
    with pytest.raises(ValueError, match="`std` must lie in"):
        PowerFunctionEMA(Counter(), (0.05, std))


@pytest.mark.parametrize("step, stride", [(5, 0), (5, 6), (0, 1)])
def test_strides_out_of_range_are_refused(step, stride):
    with pytest.raises(ValueError, match=f"`stride` must be between 1 and `step`, got stride {stride} at step {step}"):
        power_function_decay(step, 0.05, stride)


@pytest.mark.parametrize("stds", [(), (0.05, 0.05)])
def test_no_or_repeated_widths_are_refused(stds):
    with pytest.raises(ValueError, match="`stds` must be one or more different widths, got"):
        PowerFunctionEMA(Counter(), stds)


def test_a_width_alone_is_refused():
    with pytest.raises(TypeError, match=r"`stds` must be a sequence of widths, .* got 0.05"):
        PowerFunctionEMA(Counter(), 0.05)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="`model` must have floating-point parameters, ReLU has none"):
        PowerFunctionEMA(nn.ReLU())


def test_steps_must_increase():
    ema = PowerFunctionEMA(Counter())
    with pytest.raises(ValueError, match="`step` must be above that of the last update, 0, got 0"):
        ema.update(0)
    ema.update(4)
    for step in (4, 3):
        with pytest.raises(ValueError, match=f"last update, 4, got {step}"):
            ema.update(step)
    with pytest.raises(TypeError, match="integer"):
        ema.update(5.5)
    assert ema.step == 4


def test_unknown_widths_are_refused():
    model = Counter()
    ema = PowerFunctionEMA(model)
    with pytest.raises(ValueError, match=r"`std` must be one of the tracked widths \[0.05, 0.1\], got 0.2"):
        ema.copy_to(model, 0.2)
    with pytest.raises(ValueError, match="got 0.2"), ema.averaged(model, 0.2):
        pass


def test_models_with_other_parameters_are_refused():
    model = nn.Linear(4, 3)
    ema = PowerFunctionEMA(model)
    with pytest.raises(ValueError, match=r"parameters of `model` must have .* missing \['bias'\], unexpected \[\]"):
        ema.copy_to(nn.Linear(4, 3, bias=False), 0.05)
    with pytest.raises(ValueError, match=r"'weight' must have shape \(3, 4\), got \(3, 5\)"):
        ema.copy_to(nn.Linear(5, 3), 0.05)
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"):
        ema.update(1)
    assert ema.step == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("step"), r"must have the keys \['averages', 'stds', 'step'\], got"),
        (lambda state: state.update(stds=[0.05, 0.2]), r"tracked stds \[0.05, 0.1\], got stds \[0.05, 0.2\]"),
        (lambda state: state["averages"].pop(), "and 1 averages"),
        (lambda state: state["averages"][1].pop("gain"), r"std 0.1 .* missing \['gain'\]"),
        (lambda state: state["averages"][1].update(x=torch.zeros(1)), r"unexpected \['x'\]"),
        (
            lambda state: state["averages"][1].update(gain=torch.zeros(1)),
            r"'gain' must have shape \(\), got \(1,\)",
        ),
        (
            lambda state: state["averages"][1].update(gain=torch.zeros((), dtype=torch.float64)),
            "must be torch.float32",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    ema = PowerFunctionEMA(Small())
    before = copy.deepcopy(ema.state_dict())
    state = copy.deepcopy(tracked(Small()).state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    assert ema.step == 0
    for now, then in zip(ema.state_dict()["averages"], before["averages"], strict=True):
        assert bits(now) == bits(then)


def test_a_model_put_to_evaluation_while_averaged_is_left_settled():
    torch.manual_seed(0)
    model = MPLinear(8, 4)
    ema = PowerFunctionEMA(model, (0.1,))
    with torch.no_grad():
        model.weight.mul_(torch.tensor([[0.5], [1.0], [2.0], [3.0]]))
    ema.update(1)
    x = torch.randn(5, 8)
    in_training = model(x)
    with ema.averaged(model, 0.1):
        model.eval()
    torch.testing.assert_close(model.eval()(x), in_training)


def test_an_average_in_a_frozen_model_has_rows_at_their_norm():
    model = tiny_model()
    ema = PowerFunctionEMA(model, [0.1])
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        normalize_weights_(model)
        ema.update(step)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    ema.copy_to(frozen, 0.1)
    for module in frozen.modules():
        if isinstance(module, MPLinear):
            torch.testing.assert_close(row_norms(module.weight), torch.ones(len(module.weight)).double())
    # Rows that the tracked model does not train, such as those under a LoRA, stay as they are.
    model.requires_grad_(False)
    longer = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    PowerFunctionEMA(model, [0.1]).copy_to(longer, 0.1)
    assert torch.equal(longer.patch_embed.proj.weight, model.patch_embed.proj.weight)
