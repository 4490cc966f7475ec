"""The model by its numbers: golden files, every configuration, shapes, and what its inputs must be."""

import math

import pytest
import torch
from helpers import (
    CONFIGURATIONS,
    forward,
    from_golden,
    golden_config,
    golden_names,
    gradients,
    load_golden,
    relative_error,
    row_norms,
    tiny_inputs,
    tiny_model,
)

from diffusers_mp import MPDiTTransformer2DModel, MPLinear, functional, get_preset, normalize_weights_
from diffusers_mp.optimization import parameter_groups


# Golden numbers


def golden_model(name, configuration=None):
    tensors = load_golden(f"forward_{name}")
    config = golden_config(name)
    if configuration is not None:
        config = {**config, **get_preset("XS/2", configuration, config["modulation"], num_layers=2)}
        config = {**config, **{key: golden_config(name)[key] for key in ("num_attention_heads", "attention_head_dim")}}
    model = MPDiTTransformer2DModel(**config).double()
    model.load_state_dict(from_golden(tensors, "weights."))
    return model, tensors


# C and D share one forward pass.
@pytest.mark.parametrize(
    "name, configuration", [(name, None) for name in golden_names()] + [("C_scale_shift_gate", "D")]
)
def test_golden_forward(name, configuration):
    model, tensors = golden_model(name, configuration)
    with torch.no_grad():
        output = model(tensors["x"], tensors["t"], tensors["y"]).sample
        assert (output - tensors["output"]).abs().max() <= 1e-9
        # In evaluation mode a model with forced rows takes them as they are stored.
        normalize_weights_(model).eval()
        output = model(tensors["x"], tensors["t"], tensors["y"]).sample
        assert (output - tensors["output"]).abs().max() <= 1e-9


def test_patch_1_of_packed_channels_is_patch_2():
    """As FLUX.2 packs latents: as many tokens, and so the same positions, attention and output."""
    model = tiny_model().eval()
    packed_model = tiny_model(patch_size=1, in_channels=16, sample_size=4).eval()
    packed_model.load_state_dict(model.state_dict())
    inputs = tiny_inputs()
    tokens = functional.patchify(inputs["hidden_states"], 2)
    packed = {**inputs, "hidden_states": tokens.unflatten(1, (4, 4)).permute(0, 3, 1, 2)}
    with torch.no_grad():
        expected, output = forward(model, inputs), forward(packed_model, packed)
    assert torch.equal(output.flatten(2).mT, functional.patchify(expected, 2))


def test_golden_files_are_all_there():
    assert len(golden_names()) == 17
    assert {name[0] for name in golden_names()} == set("ABCE")


@pytest.mark.parametrize("name", ["C_scale_shift_gate", "A_plus_weight_normalization"])
def test_rows_that_are_not_forced_keep_their_golden_norms(name):
    model, tensors = golden_model(name)
    weights = from_golden(tensors, "weights.")
    normalize_weights_(model).eval()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert (row_norms(model.transformer_blocks[0].ff.linear_1.weight) - 1).abs().max() > 0.5


def golden_training(scale_eps=True):
    """The five updates of the golden run; largest relative errors of first gradients, losses and end weights."""
    tensors = load_golden("train_E_scale_rotate_gate")
    model = MPDiTTransformer2DModel(**golden_config("E_scale_rotate_gate")).double()
    # Golden rows have RMS 1: those of linear maps are stored here divided by sqrt(fan_in).
    factors = {
        f"{name}.weight": math.sqrt(layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, MPLinear)
    }

    def golden(prefix, power):
        return {key: value * factors.get(key, 1) ** power for key, value in from_golden(tensors, prefix).items()}

    def error(values, reference):
        assert values.keys() == reference.keys()
        return max(((values[key] - reference[key]).abs().max() / reference[key].abs().max()).item() for key in values)

    model.load_state_dict(golden("start.", -1))
    groups = parameter_groups(model, lr=1e-2, eps=1e-8)
    if not scale_eps:
        groups = [{**group, "eps": 1e-8} for group in groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    losses, first_grad = [], None
    for _ in range(5):
        loss = (model(tensors["x"], tensors["t"], tensors["y"]).sample - tensors["target"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if first_grad is None:
            first_grad = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        normalize_weights_(model)
        losses.append(loss.detach())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return (
        error(first_grad, golden("first_grad.", 1)),
        error({"losses": torch.stack(losses)}, {"losses": tensors["losses"]}),
        error(weights, golden("end.", -1)),
    )


def test_golden_training_run():
    first_grad, losses, weights = golden_training()
    assert first_grad <= 1e-7
    assert losses <= 1e-7
    assert weights <= 1e-7


def test_rates_alone_miss_the_golden_training_run():
    first_grad, losses, weights = golden_training(scale_eps=False)
    assert first_grad <= 1e-7
    assert 1e-5 < weights < 1e-1
    assert losses > 1e-9


# Every configuration


@pytest.mark.parametrize("configuration, overrides", CONFIGURATIONS)
def test_configurations_and_flags_forward_and_backward(configuration, overrides):
    model = tiny_model(configuration, **overrides)
    inputs = tiny_inputs()
    sample = forward(model, inputs)
    assert sample.shape == (3, 4, 8, 8)
    assert sample.isfinite().all()
    drawn = inputs["class_labels"].unique()
    for name, gradient in gradients(model, inputs).items():
        assert gradient.isfinite().all(), name
        rows = gradient[drawn] if "class_embedder" in name else gradient
        # Every row of every map, and every gain.
        assert rows.reshape(len(rows), -1).any(dim=-1).all(), name


@pytest.mark.parametrize("configuration, overrides", CONFIGURATIONS)
def test_output_is_zero_at_the_start_and_learning_can_begin(configuration, overrides):
    model, inputs = tiny_model(configuration, open_gains=False, **overrides), tiny_inputs()
    assert not forward(model, inputs).any()
    moved = {name for name, gradient in gradients(model, inputs).items() if gradient.any()}
    assert ("output.gain" if model.config.weight_normalization else "output.proj.weight") in moved


@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_a_few_updates_lower_the_loss(configuration):
    model, inputs = tiny_model(configuration, open_gains=False), tiny_inputs(batch_size=8)
    target = torch.randn(8, 4, 8, 8)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=3e-2 if configuration != "A" else 3e-3))
    losses = []
    for _ in range(40):
        loss = (forward(model, inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        normalize_weights_(model)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert losses[-1] < 0.8


@pytest.mark.parametrize("configuration", "ABCDEF")
def test_the_model_holds_no_random_state(configuration):
    model, inputs = tiny_model(configuration), tiny_inputs()
    before = torch.get_rng_state()
    first, second = forward(model, inputs), forward(model, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    evaluated = forward(model.eval(), inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert relative_error(evaluated, first) < 1e-5
    assert list(model.buffers()) == []


def test_timesteps_are_smooth():
    model = tiny_model("E").double().eval()
    inputs = tiny_inputs(dtype=torch.float64)

    def at(offset):
        return forward(model, {**inputs, "timestep": inputs["timestep"].double() + offset})

    torch.testing.assert_close(at(0.0), forward(model, inputs), rtol=1e-12, atol=1e-12)
    steps = {h: (at(h) - at(0.0)).norm().item() for h in (1e-2, 1e-3, 1e-4)}
    # A tenth of the way is a tenth of the change, so a derivative exists.
    assert steps[1e-3] / steps[1e-2] == pytest.approx(0.1, rel=0.05)
    assert steps[1e-4] / steps[1e-3] == pytest.approx(0.1, rel=0.01)
    assert steps[1e-4] > 0
    # Half a step lies between its neighbours.
    assert (at(0.5) - (at(0.0) + at(1.0)) / 2).norm() < 0.3 * (at(1.0) - at(0.0)).norm()


# Shapes


@pytest.mark.parametrize("patch_size", [2, 4])
@pytest.mark.parametrize("height, width", [(8, 12), (16, 8), (32, 32)])
def test_any_size_divisible_by_the_patch(height, width, patch_size):
    model = tiny_model("E", patch_size=patch_size, out_channels=8)
    inputs = tiny_inputs(batch_size=1)
    inputs["hidden_states"] = torch.randn(1, 4, height, width)
    sample = forward(model, inputs)
    assert sample.shape == (1, 8, height, width)
    assert sample.isfinite().all()
    # Rows and columns are told apart: transposing the image is not transposing the answer.
    transposed = forward(model, {**inputs, "hidden_states": inputs["hidden_states"].mT})
    assert transposed.shape == (1, 8, width, height)
    assert relative_error(transposed.mT, sample) > 1e-3


def test_samples_of_a_batch_do_not_mix():
    model, inputs = tiny_model("E").eval(), tiny_inputs()
    alone = forward(model, {name: value[1:2] for name, value in inputs.items()})
    torch.testing.assert_close(forward(model, inputs)[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_tuple_on_request():
    model, inputs = tiny_model("E"), tiny_inputs()
    (sample,) = model(**inputs, return_dict=False)
    assert torch.equal(sample, model(**inputs).sample)


def test_an_empty_batch():
    inputs = {name: value[:0] for name, value in tiny_inputs().items()}
    assert forward(tiny_model("E", num_layers=1), inputs).shape == (
        0,
        *forward(tiny_model("E"), tiny_inputs()).shape[1:],
    )


def test_both_integer_types_of_labels_and_every_type_of_timestep():
    model, inputs = tiny_model("E", num_layers=1), tiny_inputs()
    expected = forward(model, inputs)
    assert torch.equal(forward(model, {**inputs, "class_labels": inputs["class_labels"].int()}), expected)
    for dtype in (torch.int32, torch.float32, torch.float64):
        assert torch.equal(forward(model, {**inputs, "timestep": inputs["timestep"].to(dtype)}), expected)


# Errors


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"hidden_states": torch.zeros(3, 5, 8, 8)},
            "`hidden_states` must have shape \\(B, 4, H, W\\), got \\(3, 5, 8, 8\\)",
        ),
        (
            {"hidden_states": torch.zeros(3, 4, 8)},
            "`hidden_states` must have shape \\(B, 4, H, W\\), got \\(3, 4, 8\\)",
        ),
        (
            {"hidden_states": torch.zeros(3, 4, 8, 9)},
            "Height and width of `hidden_states` must be divisible by `patch_size` \\(2\\), got 8x9",
        ),
        (
            {"hidden_states": torch.zeros(3, 4, 7, 8)},
            "Height and width of `hidden_states` must be divisible by `patch_size` \\(2\\), got 7x8",
        ),
        ({"timestep": torch.tensor(5)}, "`timestep` must be .* of shape \\(3,\\), got torch.int64 of shape \\(\\)"),
        ({"timestep": torch.zeros(2)}, "`timestep` must be .* of shape \\(3,\\), got torch.float32 of shape \\(2,\\)"),
        (
            {"timestep": torch.zeros(3, dtype=torch.bfloat16)},
            "`timestep` must be integers or at least float32 .*, got torch.bfloat16",
        ),
        (
            {"timestep": torch.zeros(3, dtype=torch.float16)},
            "`timestep` must be integers or at least float32 .*, got torch.float16",
        ),
        (
            {"class_labels": None},
            "`class_labels` must be .* for a model with `num_classes=10`, got None: the null id 10 stands for no",
        ),
        (
            {"class_labels": torch.zeros(3)},
            "`class_labels` must be integers \\(int64 or int32\\) of shape \\(3,\\) .*, got torch.float32",
        ),
        (
            {"class_labels": torch.zeros(3, 1, dtype=torch.int64)},
            "`class_labels` must be integers .* got torch.int64 of shape \\(3, 1\\)",
        ),
        (
            {"class_labels": torch.tensor([0, 11, 3])},
            "`class_labels` must be in \\[0, 10\\], where 10 is the null id; got values from 0 to 11",
        ),
        (
            {"class_labels": torch.tensor([0, -1, 3])},
            "`class_labels` must be in \\[0, 10\\], where 10 is the null id; got values from -1 to 3",
        ),
    ],
)
def test_errors_of_forward(changes, message):
    model = tiny_model("E", num_layers=1)
    with pytest.raises(ValueError, match=message):
        model(**{**tiny_inputs(), **changes})


def test_class_labels_for_an_unconditional_model():
    model = tiny_model("E", num_layers=1, num_classes=None)
    with pytest.raises(
        ValueError, match="`class_labels` must be None for a model with `num_classes=None`, got a Tensor"
    ):
        model(**tiny_inputs())
