"""What a configuration makes a model of, which it may be, and that it is kept."""

import inspect
import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import (
    CONFIGURATIONS,
    FLAGS,
    forward,
    gradients,
    relative_error,
    row_norms,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from torch import nn

from diffusers_mp import MPDiTTransformer2DModel, MPEmbedding, MPLinear, get_preset, layers
from diffusers_mp.modulation import Modulation


KINDS = ("scale", "shift", "rotate", "gate")


SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(KINDS, size)]


# Sizes


@pytest.mark.parametrize(
    "modulation, count", [(("scale", "shift", "gate"), 32_794_443), (("scale", "rotate", "gate"), 30_951_243)]
)
def test_parameter_counts(modulation, count):
    with torch.device("meta"):
        model = MPDiTTransformer2DModel(
            **get_preset("S/2", "E", modulation, sample_size=16, num_classes=1000, out_channels=8)
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_rotation_saves_parameters():
    assert round(100 * (1 - 30_951_243 / 32_794_443), 2) == 5.62


@pytest.mark.parametrize("size, patch_size", [*itertools.product(["XS", "S", "B", "L", "XL"], [2, 4, 8])])
def test_every_preset_builds_and_runs_on_the_meta_device(size, patch_size):
    with torch.device("meta"):
        # Blocks are alike; test_presets.py has their number.
        model = MPDiTTransformer2DModel(**get_preset(f"{size}/{patch_size}", num_layers=1))
        # No value of any input is looked at: on this device there is none to see.
        sample = forward(
            model,
            {
                "hidden_states": torch.empty(2, 4, 16, 16),
                "timestep": torch.empty(2, dtype=torch.int64),
                "class_labels": torch.empty(2, dtype=torch.int64),
            },
        )
    assert sample.shape == (2, 4, 16, 16)


# Parts


@pytest.mark.parametrize("configuration, overrides", CONFIGURATIONS)
def test_a_flag_owns_what_the_table_says(configuration, overrides):
    model = tiny_model(configuration, **overrides)
    config = model.config
    modules = list(model.modules())
    maps = [module for module in modules if isinstance(module, nn.Linear)]
    assert all(type(layer) is (MPLinear if config.weight_normalization else nn.Linear) for layer in maps)
    assert all(layer.bias is None for layer in maps)
    gains = [name for name, _ in model.named_parameters() if name.endswith("gain")]
    # Two for each block, two for the output.
    assert len(gains) == (6 if config.weight_normalization else 0)
    norms = [module for module in modules if isinstance(module, nn.LayerNorm)]
    assert [(norm.eps, norm.elementwise_affine) for norm in norms] == [(1e-6, False)] * (5 if config.layer_norm else 0)
    activations = {type(module) for module in modules if isinstance(module, (nn.SiLU, layers.MPSiLU))}
    assert activations == {layers.MPSiLU if config.mp_silu else nn.SiLU}
    table = model.conditioning_embedder.class_embedder
    assert type(table) is (MPEmbedding if config.mp_embedding else nn.Embedding)
    assert table.num_embeddings == 11
    rows = [module for module in modules if isinstance(module, (MPLinear, MPEmbedding))]
    assert all(layer.forced_weight_normalization is config.forced_weight_normalization for layer in rows)


@pytest.mark.parametrize("modulation", SUBSETS)
def test_every_subset_of_modulations(modulation):
    model = tiny_model("E", modulation, num_layers=1)
    inputs = tiny_inputs()
    site = model.transformer_blocks[0].attn_modulation
    assert site.kinds == list(modulation)
    assert (model.output.modulation is None) == (modulation == ("gate",))
    for name, gradient in gradients(model, inputs).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    plain = tiny_model("A", modulation, num_layers=1)
    assert all(gradient.any() for gradient in gradients(plain, inputs).values())


@pytest.mark.parametrize("configuration", ["A", "E"])
def test_leaky_relu(configuration):
    model = tiny_model(configuration, activation_fn="leaky_relu")
    kinds = {type(module) for module in model.modules() if isinstance(module, (nn.SiLU, layers.MPSiLU))}
    assert not kinds
    assert isinstance(model.conditioning_embedder.act, layers.MPLeakyReLU if configuration == "E" else nn.LeakyReLU)
    assert all(gradient.any() for gradient in gradients(model, tiny_inputs()).values())
    silu = tiny_model(configuration)
    assert relative_error(forward(model, tiny_inputs()), forward(silu, tiny_inputs())) > 1e-3


@pytest.mark.parametrize("configuration", ["A", "E"])
def test_unconditional(configuration):
    model = tiny_model(configuration, num_classes=None)
    inputs = tiny_inputs()
    del inputs["class_labels"]
    assert not any("class_embedder" in name for name in model.state_dict())
    assert all(gradient.any() for gradient in gradients(model, inputs).values())
    # The conditioning is the activated time embedding alone.
    embedder = model.conditioning_embedder
    time = embedder.time_embedder(inputs["timestep"], torch.float32)
    assert torch.equal(embedder(inputs["timestep"], None, None, torch.float32), embedder.act(time))


def test_initial_rows_and_tables():
    model = tiny_model("E", open_gains=False, attention_head_dim=64)
    for name, module in model.named_modules():
        if isinstance(module, (MPLinear, MPEmbedding)):
            assert (row_norms(module.weight) / module.row_norm - 1).abs().max() < 1e-6, name
    plain = tiny_model("A", open_gains=False, attention_head_dim=64)
    embedder = plain.conditioning_embedder
    for weight in (embedder.time_embedder.linear_1.weight, embedder.time_embedder.linear_2.weight):
        assert abs(weight.std() / 0.02 - 1) < 5 / math.sqrt(2 * weight.numel())
    assert abs(embedder.class_embedder.weight.std() / 0.02 - 1) < 5 / math.sqrt(2 * 11 * 256)
    weight = plain.transformer_blocks[0].ff.linear_1.weight
    bound = math.sqrt(6 / (256 + 1024))
    assert 0.99 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_gains_on_the_meta_device_are_reset_to_zero(configuration):
    with torch.device("meta"):
        model = MPDiTTransformer2DModel(**tiny_config(configuration))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    owners = [model.output, *(module for module in model.modules() if isinstance(module, Modulation))]
    for module in owners:
        module.reset_parameters()
        assert not (module.proj.weight if module.gain is None else module.gain).any()


# The config


@pytest.mark.parametrize("configuration", "ABCDEF")
def test_config_round_trip(configuration, tmp_path):
    model = tiny_model(configuration, modulation=("gate", "scale"), num_classes=None, out_channels=8)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    loaded = MPDiTTransformer2DModel.from_pretrained(tmp_path)
    arguments = list(inspect.signature(MPDiTTransformer2DModel.__init__).parameters)[1:]
    assert {key for key in written if not key.startswith("_")} == set(arguments)
    for key in arguments:
        assert written[key] == model.config[key] == loaded.config[key], key
        assert type(written[key]) is type(model.config[key]) is type(loaded.config[key]), key
    assert loaded.config.modulation == ["gate", "scale"]
    assert MPDiTTransformer2DModel.from_config(written).config.modulation == ["gate", "scale"]


def test_config_keys_and_defaults():
    assert set(FLAGS) | {
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "in_channels",
        "out_channels",
        "sample_size",
        "patch_size",
        "mlp_ratio",
        "num_classes",
        "class_dropout_prob",
        "modulation",
        "residual_t",
        "activation_fn",
    } <= set(inspect.signature(MPDiTTransformer2DModel.__init__).parameters)
    with torch.device("meta"):
        model = MPDiTTransformer2DModel()
    assert {key: model.config[key] for key in get_preset("S/2")} == get_preset("S/2")
    assert type(model.config.modulation) is list


def test_no_submodule_carries_the_name_of_a_config_key():
    model = tiny_model("D")
    assert not set(dict(model.named_children())) & set(model.config)


def test_counts_of_numpy_are_saved(tmp_path):
    model = tiny_model(num_classes=np.int64(3), num_layers=np.int32(1))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_classes"], config["num_layers"]) == (3, 1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"modulation": []}, "`modulation` must be a non-empty list of distinct names out of .* got \\[\\]"),
        ({"modulation": ["spin"]}, "`modulation` must be a non-empty list of distinct names .* got \\['spin'\\]"),
        ({"modulation": "scale"}, "`modulation` must be a non-empty list of distinct names .* got 'scale'"),
        ({"modulation": ["gate", "gate"]}, "`modulation` must be a non-empty list of distinct names"),
        (
            {"num_attention_heads": 3, "attention_head_dim": 6},
            "`num_attention_heads \\* attention_head_dim` must be divisible by 4 .* got 3 \\* 6 = 18",
        ),
        ({"activation_fn": "gelu"}, "`activation_fn` must be one of \\['silu', 'leaky_relu'\\], got 'gelu'"),
        (
            {"weight_normalization": False},
            "`weight_normalization` must be True with `forced_weight_normalization=True`: .* got False",
        ),
        ({"sample_size": 9}, "`sample_size` must be divisible by `patch_size` \\(2\\), got 9"),
        ({"num_classes": 0}, "`num_classes` must be an integer of at least 1, or None, got 0"),
        ({"class_dropout_prob": 1.0}, "`class_dropout_prob` must be in \\[0, 1\\), got 1.0"),
        ({"class_dropout_prob": -0.1}, "`class_dropout_prob` must be in \\[0, 1\\), got -0.1"),
        ({"residual_t": 0.0}, "`residual_t` must be in \\(0, 1\\), got 0.0"),
        ({"residual_t": 1.0}, "`residual_t` must be in \\(0, 1\\), got 1.0"),
        # As a config.json written by hand has them.
        ({"layer_norm": "False"}, "`layer_norm` must be True or False, got 'False'"),
        ({"mp_silu": 1}, "`mp_silu` must be True or False, got 1"),
        ({"mp_embedding": None}, "`mp_embedding` must be True or False, got None"),
        ({"num_layers": "2"}, "`num_layers` must be an integer of at least 1, got '2'"),
        ({"num_layers": 1.5}, "`num_layers` must be an integer of at least 1, got 1.5"),
        ({"num_layers": True}, "`num_layers` must be an integer of at least 1, got True"),
        ({"mlp_ratio": "4"}, "`mlp_ratio` must be a finite number, got '4'"),
        ({"mlp_ratio": math.inf}, "`mlp_ratio` must be a finite number, got inf"),
        ({"class_dropout_prob": "0.1"}, "`class_dropout_prob` must be a finite number, got '0.1'"),
        ({"class_dropout_prob": math.nan}, "`class_dropout_prob` must be a finite number, got nan"),
        ({"residual_t": None}, "`residual_t` must be a finite number, got None"),
    ],
)
def test_errors_of_the_constructor(overrides, message):
    with pytest.raises(ValueError, match=message):
        MPDiTTransformer2DModel(**{**tiny_config("E"), **overrides})
