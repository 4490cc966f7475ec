"""Presets against the paper's Table 1 and DiT's sizes, restated here."""

import json

import pytest

from diffusers_mp import MPDiTTransformer2DModel, get_preset


# size: depth, width, heads
PUBLISHED_SIZES = {"XS": (6, 256, 4), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
WITHOUT_NORMALIZATION = ["cosine_attention", "mp_embedding", "mp_pos_embed", "mp_residual", "mp_silu"]
FLAGS_ON = {
    "A": {"layer_norm"},
    "B": {"layer_norm", "cosine_attention"},
    "C": {"layer_norm", "weight_normalization", *WITHOUT_NORMALIZATION},
    "D": {"layer_norm", "weight_normalization", "forced_weight_normalization", *WITHOUT_NORMALIZATION},
    "E": {"weight_normalization", "forced_weight_normalization", *WITHOUT_NORMALIZATION},
}


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_sizes_are_the_published_ones(size, patch_size):
    config = get_preset(f"{size}/{patch_size}")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    assert (config["num_layers"], width, config["num_attention_heads"]) == PUBLISHED_SIZES[size]
    assert config["patch_size"] == patch_size


@pytest.mark.parametrize("configuration", FLAGS_ON)
def test_configurations_are_those_of_table_1(configuration):
    config = get_preset("S/2", configuration)
    assert {key for key, value in config.items() if value is True} == FLAGS_ON[configuration]
    assert {key for key, value in config.items() if value is False} == FLAGS_ON["D"] - FLAGS_ON[configuration]


def test_a_string_is_no_list_of_kinds():
    with pytest.raises(ValueError, match="must be a non-empty list of distinct names .*, got 'rotate'"):
        MPDiTTransformer2DModel(**get_preset("XS/2", modulation="rotate"))


def test_default_is_configuration_e_with_rotation():
    config = get_preset("S/2")
    assert config == get_preset("S/2", configuration="E", modulation=("scale", "rotate", "gate"))
    assert config["modulation"] == ["scale", "rotate", "gate"]


def test_a_preset_is_plain_data_that_the_model_takes():
    config = get_preset("XS/8", "B", ("scale", "shift"), num_classes=3, num_layers=1, sample_size=8)
    assert json.loads(json.dumps(config)) == config
    model = MPDiTTransformer2DModel(**config)
    assert {key: model.config[key] for key in config} == config


def test_overrides_win_and_leave_the_tables_alone():
    before = get_preset("S/2")
    config = get_preset("S/2", num_layers=2, mp_silu=False, activation_fn="leaky_relu")
    assert (config["num_layers"], config["mp_silu"], config["activation_fn"]) == (2, False, "leaky_relu")
    config["modulation"].append("shift")
    config["cosine_attention"] = False
    assert get_preset("S/2") == before


@pytest.mark.parametrize("size", ["S", "S/3", "M/2", "S/", "/2", "s/2", ""])
def test_unknown_size(size):
    with pytest.raises(ValueError, match="`size` must be one of .*'XS', 'S', 'B', 'L', 'XL'.*got "):
        get_preset(size)


@pytest.mark.parametrize("configuration", ["G", "e", ""])
def test_unknown_configuration(configuration):
    with pytest.raises(ValueError, match="`configuration` must be one of .*'A', 'B', 'C', 'D', 'E', 'F'.*got "):
        get_preset("S/2", configuration)
