"""The four modulations by their formulae, and as models of their own."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from helpers import relative_error, row_norms
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_mp import GateModulation, MPLinear, RotationModulation, ScaleModulation, ShiftModulation
from diffusers_mp.modulation import MODULATION_KINDS, Modulation


MODULATIONS = [ScaleModulation, ShiftModulation, RotationModulation, GateModulation]
DIM, CONDITIONING_DIM = 8, 12


def opened(module, dtype=torch.float64):
    """The module with gains that are not zero."""
    module = module.to(dtype)
    with torch.no_grad():
        module.gain.copy_(torch.linspace(0.7, 1.3, len(module.gain)))
    return module


def inputs(dtype=torch.float64, dim=DIM):
    return torch.randn(2, 5, dim).to(dtype), torch.randn(2, CONDITIONING_DIM).to(dtype)


def maps(module, conditioning):
    """What the projection says for each kind, written out: gain times unit rows times conditioning."""
    weight = module.proj.weight.detach()
    unit_rows = weight / torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    parts = F.linear(conditioning, unit_rows).split(module.sizes, dim=-1)
    return {kind: gain * part for kind, gain, part in zip(module.kinds, module.gain, parts, strict=True)}


def rotated(x, angle):
    first, second = x.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.exp(1j * angle).unsqueeze(1)
    return torch.cat([product.real, product.imag], dim=-1)


FORMULAE = {
    ScaleModulation: lambda x, value: x * (1 + value[:, None]),
    ShiftModulation: lambda x, value: x + value[:, None],
    RotationModulation: rotated,
    GateModulation: lambda x, value: x * (1 + value[:, None]),
}


# The four classes


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_the_start_is_the_identity_and_the_gain_opens_it(modulation):
    module = modulation(DIM, CONDITIONING_DIM)
    x, conditioning = inputs(torch.float32)
    for mode in (True, False):
        assert torch.equal(module.train(mode)(x, conditioning), x)
    module.train()(x, conditioning).square().sum().backward()
    if modulation is RotationModulation:
        # A rotation changes no sum of squares.
        assert module.gain.grad.abs().max() < 1e-4
        module.zero_grad()
        (module(x, conditioning) * torch.randn_like(x)).sum().backward()
    assert module.gain.grad.abs().max() > 1e-2
    # Behind a gain of zero no gradient reaches the map.
    assert not module.proj.weight.grad.any()


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_formula(modulation, mode):
    module = opened(modulation(DIM, CONDITIONING_DIM)).train(mode)
    x, conditioning = inputs()
    (value,) = maps(module, conditioning).values()
    expected = FORMULAE[modulation](x, value)
    assert relative_error(expected, x) > 0.1
    torch.testing.assert_close(module(x, conditioning), expected, rtol=1e-12, atol=1e-13)


def test_rotation_keeps_norms_and_the_others_do_not():
    x, conditioning = inputs()
    for modulation in MODULATIONS:
        y = opened(modulation(DIM, CONDITIONING_DIM))(x, conditioning)
        change = (y.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max()
        assert change < 1e-14 if modulation is RotationModulation else change > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_half_precision(modulation, dtype):
    module = opened(modulation(384, CONDITIONING_DIM))
    x, conditioning = inputs(dim=384)
    expected = module(x, conditioning)
    y = module.to(dtype)(x.to(dtype), conditioning.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < 4 * torch.finfo(dtype).eps
    if modulation is RotationModulation:
        assert (y.double().norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < torch.finfo(dtype).eps


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_the_dtype_is_that_of_the_tokens(modulation):
    """As under autocast, or with tokens in half precision and a conditioning that is not."""
    x, conditioning = inputs(torch.float32)
    assert opened(modulation(DIM, CONDITIONING_DIM), torch.float32)(x.bfloat16(), conditioning).dtype == torch.bfloat16


def test_rotation_has_half_the_weight_of_a_shift():
    counts = {cls: cls(384, 100).num_parameters() for cls in MODULATIONS}
    assert counts[ShiftModulation] == counts[ScaleModulation] == counts[GateModulation] == 384 * 100 + 1
    assert counts[RotationModulation] == 192 * 100 + 1


def test_rotation_refuses_an_odd_width():
    with pytest.raises(
        ValueError, match="`dim` must be a multiple of 2 for 'rotate', which acts on groups of 2 channels, got 7"
    ):
        RotationModulation(7, CONDITIONING_DIM)
    with pytest.raises(ValueError, match="`dim` must be a multiple of 2"):
        Modulation(7, CONDITIONING_DIM, ("scale", "rotate"))
    for modulation in (ScaleModulation, ShiftModulation, GateModulation):
        x, conditioning = inputs(torch.float32, dim=7)
        assert modulation(7, CONDITIONING_DIM)(x, conditioning).shape == (2, 5, 7)


# One site


@pytest.mark.parametrize("kinds", [(), [], "scale", ("scale", "scale"), ("scale", "spin"), None])
def test_kinds_must_be_a_non_empty_list_of_distinct_known_names(kinds):
    message = (
        "`modulation` must be a non-empty list of distinct names out of .*'scale', 'shift', 'rotate', 'gate'.*, got"
    )
    with pytest.raises(ValueError, match=message):
        Modulation(DIM, CONDITIONING_DIM, kinds)


@pytest.mark.parametrize("kinds", [("gate", "rotate", "shift", "scale"), MODULATION_KINDS])
def test_a_site_scales_then_shifts_then_rotates_in_whatever_order_it_was_asked(kinds):
    site = opened(Modulation(DIM, CONDITIONING_DIM, kinds))
    # The order asked for is not part of the checkpoint either.
    assert site.kinds == ["scale", "shift", "rotate", "gate"]
    assert site.sizes == [DIM, DIM, DIM // 2, DIM]
    x, conditioning = inputs()
    value = maps(site, conditioning)
    expected = rotated(x * (1 + value["scale"][:, None]) + value["shift"][:, None], value["rotate"])
    other = rotated(x, value["rotate"]) * (1 + value["scale"][:, None]) + value["shift"][:, None]
    y, gate = site(x, conditioning)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    assert relative_error(other, expected) > 0.1
    torch.testing.assert_close(gate, 1 + value["gate"][:, None], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", MODULATION_KINDS)
def test_each_kind_has_a_gain_of_its_own(kind):
    site = Modulation(DIM, CONDITIONING_DIM, MODULATION_KINDS).double()
    assert site.gain.shape == (4,)
    with torch.no_grad():
        site.gain[list(MODULATION_KINDS).index(kind)] = 1
    x, conditioning = inputs()
    y, gate = site(x, conditioning)
    assert torch.equal(y, x) == (kind == "gate")
    assert torch.equal(gate, torch.ones_like(gate)) == (kind != "gate")


def test_fake_tensors_leave_nothing_behind():
    sums = []
    for mode in (FakeTensorMode(), contextlib.nullcontext(), FakeTensorMode(), contextlib.nullcontext()):
        with mode:
            site = Modulation(DIM, CONDITIONING_DIM, MODULATION_KINDS)
            y, gate = site(torch.randn(2, 5, DIM), torch.randn(2, CONDITIONING_DIM))
            sums.append(y.sum() + gate.sum())
            sums[-1].backward()
    assert [type(each) is torch.Tensor for each in sums] == [False, True, False, True]


def test_a_site_without_a_gate_returns_none_for_it():
    x, conditioning = inputs(torch.float32)
    assert Modulation(DIM, CONDITIONING_DIM, ["rotate"])(x, conditioning)[1] is None


def test_adaln_zero_is_the_site_without_weight_normalization():
    site = Modulation(
        DIM, CONDITIONING_DIM, MODULATION_KINDS, weight_normalization=False, forced_weight_normalization=False
    ).double()
    assert type(site.proj) is nn.Linear
    assert (site.proj.bias, site.gain) == (None, None)
    x, conditioning = inputs()
    y, gate = site(x, conditioning)
    assert torch.equal(y, x)
    assert torch.equal(gate, torch.zeros(2, 1, DIM, dtype=torch.float64))

    nn.init.normal_(site.proj.weight)
    parts = F.linear(conditioning, site.proj.weight).split([DIM, DIM, DIM // 2, DIM], dim=-1)
    scale, shift, angle, expected_gate = parts
    y, gate = site(x, conditioning)
    torch.testing.assert_close(y, rotated(x * (1 + scale[:, None]) + shift[:, None], angle), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gate, expected_gate[:, None], rtol=1e-12, atol=1e-13)


# As models


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_save_and_load_bit_equal(modulation, tmp_path):
    module = opened(modulation(DIM, CONDITIONING_DIM, forced_weight_normalization=False), torch.float32)
    module.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    loaded = modulation.from_pretrained(tmp_path)
    expected = {"dim": DIM, "conditioning_dim": CONDITIONING_DIM, "forced_weight_normalization": False}
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == expected
    x, conditioning = inputs(torch.float32)
    assert torch.equal(loaded(x, conditioning), module.eval()(x, conditioning))


def test_loading_leaves_rows_as_they_were_saved(tmp_path):
    module = opened(RotationModulation(DIM, CONDITIONING_DIM), torch.float32).eval()
    with torch.no_grad():
        module.proj.weight.mul_(torch.linspace(0.5, 2, DIM // 2).unsqueeze(-1))
    module.save_pretrained(tmp_path)
    loaded = RotationModulation.from_pretrained(tmp_path)
    assert torch.equal(loaded.proj.weight, module.proj.weight)
    assert not loaded.training


def test_saving_while_training_puts_rows_at_norm_one(tmp_path):
    module = opened(RotationModulation(DIM, CONDITIONING_DIM), torch.float32)
    with torch.no_grad():
        module.proj.weight.mul_(1.04)
    x, conditioning = inputs(torch.float32)
    expected = module(x, conditioning)
    module.save_pretrained(tmp_path)
    loaded = RotationModulation.from_pretrained(tmp_path)
    assert (row_norms(loaded.proj.weight) - 1).abs().max() < 1e-6
    torch.testing.assert_close(loaded(x, conditioning), expected)


class Host(ModelMixin, ConfigMixin):
    """Somebody else's model with a rotation inside."""

    _no_split_modules = ["Linear"]

    @register_to_config
    def __init__(self, dim: int = DIM):
        super().__init__()
        self.to_tokens = nn.Linear(dim, dim)
        self.rotation = RotationModulation(dim, CONDITIONING_DIM)

    def forward(self, hidden_states, conditioning):
        return self.rotation(self.to_tokens(hidden_states), conditioning)


def host(dtype=torch.float32):
    module = Host().to(dtype)
    opened(module.rotation, dtype)
    return module


def test_nested_saving_and_loading(tmp_path):
    module = host()
    assert set(module.state_dict()) == {
        "to_tokens.weight",
        "to_tokens.bias",
        "rotation.proj.weight",
        "rotation.gain",
    }
    module.save_pretrained(tmp_path)
    x, conditioning = inputs(torch.float32)
    expected = module.eval()(x, conditioning)
    assert torch.equal(Host.from_pretrained(tmp_path)(x, conditioning), expected)
    assert torch.equal(Host.from_pretrained(tmp_path, device_map={"": "cpu"})(x, conditioning), expected)


def test_nested_it_does_not_spoil_device_maps():
    assert RotationModulation._no_split_modules == []
    assert set(host()._get_no_split_modules("auto")) == {"Linear"}


def test_nested_casting():
    module = host().to(torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    x, conditioning = inputs(torch.bfloat16)
    assert module(x, conditioning).dtype == torch.bfloat16
    assert isinstance(module.double().rotation.proj, MPLinear)
    x, conditioning = inputs()
    y = module(x, conditioning)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.norm(dim=-1), module.to_tokens(x).norm(dim=-1), rtol=1e-13, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("mode", [True, False])
def test_nested_compilation(mode):
    module = host().train(mode)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, conditioning = inputs(torch.float32)
    outputs = module(x, conditioning), compiled(x, conditioning)
    torch.testing.assert_close(outputs[1], outputs[0])
    weights = torch.randn_like(x)
    gradients = [torch.autograd.grad((y * weights).sum(), list(module.parameters())) for y in outputs]
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_angles_keep_their_precision_in_half_precision():
    """Angles are as precise as the conditioning; their cosines and sines are not made less so by being large."""
    module = opened(RotationModulation(DIM, CONDITIONING_DIM), torch.bfloat16).eval()
    with torch.no_grad():
        module.gain.fill_(64.0)
    x, conditioning = inputs(torch.bfloat16)
    angle = (module.proj(conditioning) * 64).double()
    assert angle.abs().max() > 4 * math.pi
    expected = rotated(x.double(), angle)
    assert relative_error(module(x, conditioning), expected) < 2**-7
