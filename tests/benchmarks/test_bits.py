"""Few bits, emulated: each format rounds as it should, and models come back as they were."""

import bits
import pytest
import torch

from diffusers_mp import MPDiTTransformer2DModel, get_preset, normalize_weights_


@pytest.mark.parametrize(
    "form, values, expected",
    [
        ("int8", [127.0, -3.4, 0.6], [127.0, -3.0, 1.0]),
        ("int4", [7.0, -3.4, 0.6], [7.0, -3.0, 1.0]),
        # 3 bits of mantissa: 17 and 19 lie between 16, 18 and 20.
        ("e4m3", [448.0, 17.5, -19.5], [448.0, 18.0, -20.0]),
        ("e2m1", [6.0, 2.4, -0.7, 5.1], [6.0, 2.0, -0.5, 6.0]),
    ],
)
def test_a_format_rounds_to_its_values(form, values, expected):
    values = torch.tensor(values)
    assert bits.quantised(values, form, "tensor").tolist() == expected
    # Whatever the scale.
    assert bits.quantised(values / 8, form, "tensor").tolist() == [each / 8 for each in expected]


def test_what_shares_a_scale():
    values = torch.tensor([[127.0, 1.4], [1.27, 0.014]])
    assert bits.quantised(values, "int8", "tensor").tolist() == [[127.0, 1.0], [1.0, 0.0]]
    assert torch.allclose(bits.quantised(values, "int8", "token"), torch.tensor([[127.0, 1.0], [1.27, 0.01]]))
    # What is above the limit is clipped.
    assert bits.quantised(values, "int8", "constant", limit=63.5).tolist() == [[63.5, 1.5], [1.5, 0.0]]


def test_a_hadamard_matrix_is_orthogonal_and_spreads():
    matrix = bits.hadamard(96)
    assert torch.allclose(matrix @ matrix.T, torch.eye(96), atol=1e-6)
    spike = torch.zeros(96)
    spike[5] = 1.0
    assert (spike @ matrix).abs().max() == pytest.approx(32**-0.5)


def tiny(configuration):
    torch.manual_seed(0)
    kind = "shift" if configuration == "A" else "rotate"
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "sample_size": 8}
    config = get_preset("XS/2", configuration, ("scale", kind, "gate"), num_classes=10, **sizes)
    model = MPDiTTransformer2DModel(**config)
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith("output"):
            torch.nn.init.normal_(parameter, std=0.1 if configuration == "A" else 1.0)
    normalize_weights_(model)
    return model.eval()


@pytest.mark.parametrize("configuration", ["A", "F"])
def test_schemes_change_a_model_within_the_context_alone(configuration):
    model = tiny(configuration)
    images, target = torch.randn(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def output(model=model):
        return model(images, timestep=torch.arange(8) * 100, class_labels=torch.arange(8)).sample

    def loss(model):
        return (output() - target).square().mean().item()

    plain, weights = output(), {name: weight.clone() for name, weight in model.state_dict().items()}
    errors = {}
    for name, scheme in bits.SCHEMES.items():
        limits = ()
        if scheme.scale == "constant":
            limits = bits.fit_limits(model, scheme, lambda _: (output() - plain).norm().item())
        with bits.in_few_bits(model, scheme, *limits):
            errors[name] = ((output() - plain).norm() / plain.norm()).item()
        assert torch.equal(output(), plain)
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert 0 < errors["W8A8, token"] < 0.05
    assert errors["W8A8, token"] < errors["W4A8, token"] < 1
    assert errors["W4A8, hadamard"] < errors["W4A4, hadamard"]
    assert errors["W8A8, tensor"] < errors["fp4 weights, tensor"]
    found = bits.rises(model, loss, loss)
    assert set(found) == set(bits.SCHEMES)
    assert abs(found["W8A8, token"]["rise"]) < 5


def test_outliers_of_known_inputs():
    model = tiny("A")

    # One entry of 128 in a layer's input of 256 ones: kurtosis 128⁴/256 over (128²/256)².
    def run():
        with torch.no_grad():
            values = torch.zeros(1, 8, 32)
            values[0, 0, 0] = 128.0
            model.transformer_blocks[0].attn.to_q(values)

    found = bits.outliers(model, run)
    assert found["kurtosis"] == pytest.approx(256)
    assert found["largest_entry"] == pytest.approx(16)


def test_a_rise_is_read_off_at_equal_loss():
    import few_bits

    points = [(0.10, 8.0), (0.12, 2.0)]
    assert few_bits.rise_at(0.115, points) == pytest.approx(3.5)
    assert [few_bits.rise_at(loss, points) for loss in (0.09, 0.10, 0.13)] == [8.0, 8.0, 2.0]


def test_holms_rule():
    import few_bits

    adjusted = few_bits.holm({"one": 0.01, "two": 0.04, "three": 0.03, "four": 0.005})
    assert adjusted == pytest.approx({"four": 0.02, "one": 0.03, "three": 0.06, "two": 0.06})


def test_arms_are_compared_seed_by_seed(capsys):
    import few_bits
    import headline

    records = []
    for run in headline.SWEEP:
        loss = 0.1 + abs(run.learning_rate - headline.ARMS[run.arm][2])
        records.append(run._asdict() | {"validation_loss": loss})
    for run in headline.fresh(records):
        halved = run.arm in headline.HALVED and run.learning_rate < headline.ARMS[run.arm][2]
        # A has 8 at a loss of 0.10 and 4 at 0.12; F has 5 at 0.11, where A has 6.
        loss, rise = (0.12 if halved else 0.10, 4.0 if halved else 8.0) if run.arm == "A" else (0.11, 5.0)
        rises = {name: {"rise": rise + 0.01 * run.seed * (run.arm != "A")} for name in bits.SCHEMES}
        distances = dict.fromkeys(("float32", *headline.ENDPOINTS), 50.0)
        noted = {"outliers": {"kurtosis": 9.0, "largest_entry": 7.0}, "quantised_frechet": distances}
        records.append(run._asdict() | {"validation_loss": loss, "rises": rises} | noted)
    few_bits.report(records)
    printed = capsys.readouterr().out
    found = few_bits.by_arm_and_seed(records)
    assert set(found) == {*headline.ARMS, "A / 2", "F rotate / 2"}
    assert few_bits.differences(found, "F rotate", few_bits.PRIMARY) == pytest.approx(
        [seed / 100 - 1 for seed in range(8)]
    )
    assert "| W8A8, constant | F shift | 8 | -0.97 |" in printed
    assert "W8A8, constant, F shift: p = " in printed
