"""Rotation adapters: what is saved, what is refused, and that a stock model with one is the swapped model."""

import copy
import json
import os

import peft
import pytest
import torch
from diffusers import DiTTransformer2DModel
from processes import run_python
from safetensors.torch import load_file, save_file

from diffusers_mp import load_rotation_adapter, save_rotation_adapter, swap_adaln_for_rotation
from diffusers_mp.rotation_swap import RotationLinear, adapter


TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}


def stock_model(seed=0, **config):
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**{**TINY, **config}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def randomize_rotations(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, RotationLinear):
            for parameter in module.rotation.parameters():
                torch.nn.init.normal_(parameter, std=0.5, generator=generator)
            if module.mean_shift is not None:
                torch.nn.init.normal_(module.mean_shift, std=0.5, generator=generator)


def inputs():
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([1, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def snapshot(model):
    return type(model), dict(model.config), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    stock_class, config, state = before
    assert type(model) is stock_class
    assert dict(model.config) == config
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3},
        {"calibration": [inputs()]},
        {"sublayers": ["attention"]},
        {"keep_shift": True, "shift_scale": 0.25, "calibration": [inputs()]},
    ],
    ids=["full", "low rank", "constant shift", "one sublayer", "annealing"],
)
def test_a_stock_model_with_the_adapter_is_the_swapped_model(tmp_path, options):
    model = stock_model()
    swap_report = swap_adaln_for_rotation(model, **options)
    randomize_rotations(model)
    save_rotation_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other = stock_model()
    report = load_rotation_adapter(other, tmp_path)
    assert report == swap_report
    assert type(other) is type(model)
    assert dict(other.config) == dict(model.config)
    assert torch.equal(other(**inputs()).sample, model(**inputs()).sample)


def test_it_is_small_and_holds_the_rotations_alone(tmp_path):
    model = stock_model()
    swap_adaln_for_rotation(model, rank=2)
    save_rotation_adapter(model, tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names == {name for name in model.state_dict() if ".rotation." in name}


def test_trained_scale_and_gate_rows_are_saved_when_asked_for(tmp_path):
    model = stock_model()
    swap_adaln_for_rotation(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RotationLinear):
                module.linear.weight.mul_(1.5)
    save_rotation_adapter(model, tmp_path / "without")
    save_rotation_adapter(model, tmp_path / "with", modulation_rows=True)
    expected = model(**inputs()).sample
    for name, equal in (("without", False), ("with", True)):
        other = stock_model()
        load_rotation_adapter(other, tmp_path / name)
        assert torch.equal(other(**inputs()).sample, expected) is equal


def test_the_config_says_what_it_belongs_to(tmp_path):
    model = stock_model()
    swap_adaln_for_rotation(model, rank=2, sublayers=["mlp"])
    save_rotation_adapter(model, tmp_path, base_model_name_or_path="facebook/DiT-XL-2-256", base_model_revision="abc")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "adapter_type": "rotation_modulation",
        "base_model_name_or_path": "facebook/DiT-XL-2-256",
        "base_model_revision": "abc",
        "base_model_subfolder": "transformer",
        "base_model_class": "DiTTransformer2DModel",
        "rank": 2,
        "sublayers": ["mlp"],
        "dtype": "float32",
        "pairing": "halves",
    }
    assert {name: config[name] for name in expected} == expected


def test_the_base_is_the_model_s_own_origin_unless_said(tmp_path):
    stock_model().save_pretrained(tmp_path / "base")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "base")
    swap_adaln_for_rotation(model)
    save_rotation_adapter(model, tmp_path / "adapter", base_model_subfolder=None)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_relative_base_is_recorded_as_the_folder_it_is(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = stock_model()
    swap_adaln_for_rotation(model)
    save_rotation_adapter(model, "adapter", base_model_name_or_path="runs/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "runs" / "base")


def test_in_a_fresh_process(tmp_path):
    stock_model().save_pretrained(tmp_path / "base")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "base")
    swap_adaln_for_rotation(model)
    randomize_rotations(model)
    save_rotation_adapter(model, tmp_path / "nested" / "adapter")
    torch.save({"inputs": inputs(), "output": model(**inputs()).sample.detach()}, tmp_path / "expected.pt")
    code = f"""
    import torch
    from diffusers import DiTTransformer2DModel
    from diffusers_mp import load_rotation_adapter
    model = DiTTransformer2DModel.from_pretrained({str(tmp_path / "base")!r})
    print(load_rotation_adapter(model, {str(tmp_path / "nested")!r}, subfolder="adapter"))
    expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
    assert torch.equal(model(**expected["inputs"]).sample, expected["output"])
    """
    assert "5 shifts of 3 maps became rotations" in run_python(code)


def change_keys(function):
    def change(folder):
        file = folder / "adapter_model.safetensors"
        save_file(function(load_file(file)), file)

    return change


def change_config(**entries):
    def change(folder):
        file = folder / "adapter_config.json"
        config = {**json.loads(file.read_text()), **entries}
        file.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))

    return change


FIRST = "transformer_blocks.0.norm1.linear.rotation.weight"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            change_keys(lambda tensors: {name: tensors[name] for name in tensors if name != FIRST}),
            ValueError,
            rf"missing \['{FIRST}'\] \(1\), unexpected \[\]",
        ),
        (
            change_keys(lambda tensors: {**tensors, "norm.rotation.weight": torch.zeros(1)}),
            ValueError,
            r"missing \[\] \(0\), unexpected \['norm.rotation.weight'\]",
        ),
        (
            change_keys(lambda tensors: {**tensors, FIRST: tensors[FIRST][1:].clone()}),
            ValueError,
            rf"{FIRST} must have shape \(16, 16\), it has \(15, 16\)",
        ),
        (
            change_keys(lambda tensors: {**tensors, FIRST: tensors[FIRST] * float("nan")}),
            ValueError,
            f"adapter_model.safetensors must hold finite numbers, {FIRST} has NaN or infinity",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no tensors"),
            ValueError,
            "adapter_model.safetensors is damaged",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            ValueError,
            "adapter_config.json is damaged, it is no JSON",
        ),
        (change_config(rank=2), ValueError, "must hold exactly the rotations of this model"),
        (change_config(base_model_class="FluxTransformer2DModel"), ValueError, "must be a FluxTransformer2DModel"),
        (change_config(format_version=2), ValueError, "must have format_version 1, it has 2"),
        (change_config(adapter_type="absent"), ValueError, "adapter_type 'rotation_modulation', it has None"),
        (change_config(pairing="neighbours"), ValueError, "must have pairing 'halves', it has 'neighbours'"),
        (change_config(sublayers="absent"), ValueError, r"is damaged: it lacks \['sublayers'\]"),
        (lambda folder: (folder / "adapter_config.json").unlink(), FileNotFoundError, "config.json is missing"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            FileNotFoundError,
            "adapter_model.safetensors is missing",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_model_untouched(tmp_path, change, error, message):
    model = stock_model()
    swap_adaln_for_rotation(model)
    save_rotation_adapter(model, tmp_path)
    change(tmp_path)
    other = stock_model()
    before = snapshot(other)
    with pytest.raises(error, match=message):
        load_rotation_adapter(other, tmp_path)
    assert_untouched(other, before)


def test_an_adapter_of_another_width_is_refused(tmp_path):
    model = stock_model(attention_head_dim=16)
    swap_adaln_for_rotation(model)
    save_rotation_adapter(model, tmp_path)
    other = stock_model()
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"must have shape \(\d+, 16\), it has \(\d+, 32\)|must have shape \(\d+,\)"):
        load_rotation_adapter(other, tmp_path)
    assert_untouched(other, before)


def test_only_swapped_models_are_saved_and_only_stock_ones_take_an_adapter(tmp_path):
    model = stock_model()
    with pytest.raises(ValueError, match="must be swapped by `swap_adaln_for_rotation`, got a DiTTransformer2DModel"):
        save_rotation_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    swap_adaln_for_rotation(model)
    save_rotation_adapter(model, tmp_path / "some")
    with pytest.raises(ValueError, match="must not be swapped already"):
        load_rotation_adapter(model, tmp_path / "some")


def test_another_base_is_said(tmp_path, caplog):
    stock_model().save_pretrained(tmp_path / "base")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "base")
    swap_adaln_for_rotation(model)
    save_rotation_adapter(model, tmp_path / "adapter", base_model_name_or_path="somebody/else")
    other = DiTTransformer2DModel.from_pretrained(tmp_path / "base")
    with caplog.at_level("WARNING"):
        # A folder, as of each transformer that came with its pipeline, tells nothing.
        load_rotation_adapter(copy.deepcopy(other), tmp_path / "adapter")
        assert "was made for" not in caplog.text
        other.register_to_config(_name_or_path="somebody/base")
        load_rotation_adapter(other, tmp_path / "adapter")
    assert "was made for somebody/else, the model came from somebody/base" in caplog.text


def norm1_maps(model, path):
    return [f"{name}.{path}" for name, module in model.named_modules() if name.endswith("norm1.linear")]


@pytest.mark.parametrize(
    "path, options, modulation_rows, found",
    [
        ("rotation", {}, False, "peft.tuners.lora.layer.Linear whose weight is a torch.Tensor of torch.float32"),
        ("rotation.1", {"rank": 2}, False, "peft.tuners.lora.layer.Linear whose weight is a torch.Tensor"),
        ("linear", {}, True, "peft.tuners.lora.layer.Linear whose weight is a torch.Tensor"),
    ],
)
def test_maps_that_carry_a_lora_are_not_saved(tmp_path, path, options, modulation_rows, found):
    model = stock_model()
    swap_adaln_for_rotation(model, **options)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=norm1_maps(model, path)), model)
    name = f"transformer_blocks.0.norm1.linear.{path.split('.')[0]}"
    message = (
        f"`model` must have plain linear maps to be saved as an adapter, {name} is a {found}.*: "
        "dequantise it, or merge and unload the LoRA before"
    )
    with pytest.raises(ValueError, match=message):
        save_rotation_adapter(model, tmp_path / "adapter", modulation_rows=modulation_rows)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_rotations_in_another_wrapper_are_not_saved(tmp_path, options):
    model = stock_model()
    swap_adaln_for_rotation(model, **options)
    # How PEFT trains a map as a whole.
    config = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=norm1_maps(model, "rotation"))
    peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="norm1.linear.rotation is a peft.utils.other.ModulesToSaveWrapper"):
        save_rotation_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_lora_in_what_is_not_saved_does_not_matter(tmp_path):
    model = stock_model()
    swap_adaln_for_rotation(model)
    randomize_rotations(model)
    expected = model(**inputs()).sample
    config = peft.LoraConfig(r=2, target_modules=["to_q", *norm1_maps(model, "linear")])
    peft.inject_adapter_in_model(config, model)
    save_rotation_adapter(model, tmp_path)
    other = stock_model()
    load_rotation_adapter(other, tmp_path)
    assert torch.equal(other(**inputs()).sample, expected)


def halfway(tensors, file, metadata):
    file.write_bytes(b"half")
    raise KeyboardInterrupt


def at_once(*args, **kwargs):
    raise KeyboardInterrupt


def at_the_second(source, target):
    if target.name == "adapter_config.json":
        raise KeyboardInterrupt
    os.rename(source, target)


@pytest.mark.parametrize(
    "name, kill, survives",
    [
        ("save_file", halfway, True),
        ("json.dumps", at_once, True),
        # Between the two there is no adapter, where the old options would go with the new weights.
        ("os.replace", at_once, False),
        ("os.replace", at_the_second, False),
    ],
    ids=["weights half written", "before the options", "before the weights are put there", "between the two"],
)
def test_a_kill_leaves_the_old_adapter_or_none(tmp_path, monkeypatch, name, kill, survives):
    adapters = {}
    for seed, sublayers in enumerate(("attention", "mlp")):  # of equal keys and shapes
        adapters[sublayers] = stock_model()
        swap_adaln_for_rotation(adapters[sublayers], sublayers=[sublayers])
        randomize_rotations(adapters[sublayers], seed)
    save_rotation_adapter(adapters["attention"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(f"{adapter.__name__}.{name}", kill)
        with pytest.raises(KeyboardInterrupt):
            save_rotation_adapter(adapters["mlp"], tmp_path)
    other = stock_model()
    if survives:
        load_rotation_adapter(other, tmp_path)
        assert torch.equal(other(**inputs()).sample, adapters["attention"](**inputs()).sample)
    else:
        with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
            load_rotation_adapter(other, tmp_path)
    save_rotation_adapter(adapters["mlp"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other = stock_model()
    load_rotation_adapter(other, tmp_path)
    assert torch.equal(other(**inputs()).sample, adapters["mlp"](**inputs()).sample)
