"""The model: golden numbers, counts, every configuration, and what PyTorch and diffusers do with a model."""

import copy
import importlib
import inspect
import itertools
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FLAGS,
    from_golden,
    golden_config,
    golden_names,
    load_golden,
    relative_error,
    row_norms,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from processes import run_python
from safetensors.torch import load_file, save_file
from torch import nn

import diffusers_mp
from diffusers_mp import MPDiTTransformer2DModel, MPEmbedding, MPLinear, get_preset, layers, normalize_weights_
from diffusers_mp.blocks import MPDiTAttnProcessor
from diffusers_mp.modulation import Modulation
from diffusers_mp.optimization import parameter_groups


KINDS = ("scale", "shift", "rotate", "gate")
SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(KINDS, size)]
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


def forward(model, inputs):
    return model(**inputs).sample


def gradients(model, inputs):
    """Gradient of every parameter for a loss that leaves none of them out."""
    weights = torch.randn(forward(model, inputs).shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (forward(model, inputs).float() * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def one_flag_changed():
    """Every flag alone: on in A, off in E, where that is legal."""
    for flag in FLAGS:
        if flag == "layer_norm":
            yield "A", {flag: False}
            yield "E", {flag: True}
        elif flag == "forced_weight_normalization":
            yield "E", {flag: False}
        else:
            yield "A", {flag: True}
            yield (
                "E",
                {flag: False} | ({"forced_weight_normalization": False} if flag == "weight_normalization" else {}),
            )


CONFIGURATIONS = [(name, {}) for name in "ABCDE"] + list(one_flag_changed())


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


# Every size and every patch; the products of both are alike.
@pytest.mark.parametrize(
    "size, patch_size",
    [
        pytest.param(size, patch_size, marks=() if patch_size == 2 or size == "XS" else pytest.mark.slow)
        for size, patch_size in itertools.product(["XS", "S", "B", "L", "XL"], [2, 4, 8])
    ],
)
def test_every_preset_builds_and_runs_on_the_meta_device(size, patch_size):
    with torch.device("meta"):
        model = MPDiTTransformer2DModel(**get_preset(f"{size}/{patch_size}"))
        # No value of any input is looked at: on this device there is none to see.
        sample = forward(model, meta_inputs())
    assert sample.shape == (2, 4, 16, 16)
    assert len(model.transformer_blocks) == model.config.num_layers


def meta_inputs():
    return {
        "hidden_states": torch.empty(2, 4, 16, 16, device="meta"),
        "timestep": torch.empty(2, device="meta", dtype=torch.int64),
        "class_labels": torch.empty(2, device="meta", dtype=torch.int64),
    }


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


def test_conditioning_is_the_activated_balanced_sum():
    embedder = tiny_model("E").conditioning_embedder
    inputs = tiny_inputs()
    time = embedder.time_embedder(inputs["timestep"], torch.float32)
    label = embedder.class_embedder(inputs["class_labels"])
    expected = torch.nn.functional.silu((time + label) / math.sqrt(2)) / 0.596
    torch.testing.assert_close(embedder(inputs["timestep"], inputs["class_labels"], None, torch.float32), expected)


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


@pytest.mark.parametrize("configuration, overrides", CONFIGURATIONS)
def test_output_is_zero_at_the_start_and_learning_can_begin(configuration, overrides):
    model, inputs = tiny_model(configuration, open_gains=False, **overrides), tiny_inputs()
    assert not forward(model, inputs).any()
    moved = {name for name, gradient in gradients(model, inputs).items() if gradient.any()}
    assert ("output.gain" if model.config.weight_normalization else "output.proj.weight") in moved


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


# What PyTorch does with a model


@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_gradient_checkpointing_changes_nothing(configuration):
    model, inputs = tiny_model(configuration), tiny_inputs()
    expected_sample, expected = forward(model, inputs), copy.deepcopy(gradients(model, inputs))
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(forward(model, inputs), expected_sample)
    del calls[:]
    for name, gradient in gradients(model, inputs).items():
        assert torch.equal(gradient, expected[name]), name
    # Twice forward in `gradients`, once more in its backward pass.
    assert len(calls) == 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_half_precision_inference(configuration, dtype, tolerance):
    model, inputs = tiny_model(configuration).eval(), tiny_inputs()
    with torch.no_grad():
        expected = forward(model, inputs)
        sample = forward(model.to(dtype), {**inputs, "hidden_states": inputs["hidden_states"].to(dtype)})
    assert sample.dtype == dtype
    assert 0 < relative_error(sample, expected) < tolerance


@pytest.mark.parametrize("configuration", ["A", "E"])
def test_autocast_training(configuration):
    model, inputs = tiny_model(configuration), tiny_inputs()
    expected = copy.deepcopy(gradients(model, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward(model, inputs).isfinite().all()
        found = gradients(model, inputs)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
    flat = [torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected)]
    assert relative_error(*flat) < 0.05


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


def assert_compiled_equals_eager(model, inputs, backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(forward(compiled, inputs), forward(model, inputs), rtol=1e-4, atol=1e-4)
    if not model.training:
        return
    expected, found = copy.deepcopy(gradients(model, inputs)), gradients(compiled, inputs)
    for name, gradient in found.items():
        # Both are about 1e-5 away from the gradient in float64.
        assert relative_error(gradient, expected[name.removeprefix("_orig_mod.")]) < 1e-4, name


# Only rows that are forced are another code in evaluation.
@compiles
@pytest.mark.parametrize(
    "configuration, training",
    [("A", True), ("E", True), ("E", False), pytest.param("A", False, marks=pytest.mark.slow)],
)
def test_compiles_into_one_graph(configuration, training):
    model = tiny_model(configuration, num_layers=1).train(training)
    assert_compiled_equals_eager(model, tiny_inputs(), "aot_eager")


@compiles
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_compiles_into_one_graph_with_gradient_checkpointing():
    model = tiny_model("E", num_layers=1)
    model.enable_gradient_checkpointing()
    assert_compiled_equals_eager(model, tiny_inputs(), "aot_eager")


# Each kernel costs a call of the C++ compiler where nothing is cached: half of a model's are in a block.
@compiles
@torch.no_grad()
def test_a_block_compiles_with_inductor(monkeypatch):
    torch._dynamo.reset()
    # Too few kernels for processes, compiled headers and a trial of the processor's instructions to pay.
    config = importlib.import_module("torch._inductor.config")
    monkeypatch.setattr(config, "compile_threads", 1)
    monkeypatch.setattr(config, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(config.cpp, "vec_isa_ok", True)
    block = tiny_model("E", num_layers=1).eval().transformer_blocks[0]
    inputs = torch.randn(3, 16, 32), torch.randn(3, 32)
    compiled = torch.compile(block, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@compiles
def test_compiles_with_inductor():
    with torch.no_grad():
        assert_compiled_equals_eager(tiny_model("E", num_layers=1).eval(), tiny_inputs(), "inductor")


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("configuration", "ABCDE")
def test_trains_compiled_with_inductor(configuration):
    assert_compiled_equals_eager(tiny_model(configuration), tiny_inputs(), "inductor")


@pytest.mark.parametrize("configuration", ["A", "E"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_deepcopy_and_pickle(copied, configuration):
    model, inputs = tiny_model(configuration), tiny_inputs()
    twin = copied(model)
    assert type(twin) is MPDiTTransformer2DModel
    assert twin.config == model.config
    assert torch.equal(forward(twin, inputs), forward(model, inputs))
    with torch.no_grad():
        twin.patch_embed.proj.weight.zero_()
    assert model.patch_embed.proj.weight.any()


@pytest.mark.parametrize("configuration", "ABCDE")
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


# What diffusers does with a model


LOAD = """
import sys
import torch
from safetensors.torch import load_file
import diffusers_mp
from diffusers_mp import MPDiTTransformer2DModel

folder, num_threads = sys.argv[1:]
torch.set_num_threads(int(num_threads))
inputs = load_file(f"{folder}/inputs.safetensors")
for name, sample in load_file(f"{folder}/expected.safetensors").items():
    model = MPDiTTransformer2DModel.from_pretrained(f"{folder}/{name}")
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, sample), name
print(diffusers_mp.__file__, *[name for name in sys.modules if name.startswith("diffusers_mp.")])
"""


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    """Models of three configurations, saved while training, with what they say about one batch."""
    folder = tmp_path_factory.mktemp("saved")
    inputs, expected = tiny_inputs(), {}
    for configuration in "ACE":
        model = tiny_model(configuration).train()
        if configuration == "E":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
        model.save_pretrained(folder / configuration)
        model.eval()
        with torch.no_grad():
            expected[configuration] = forward(model, inputs)
    save_file(inputs, folder / "inputs.safetensors")
    save_file(expected, folder / "expected.safetensors")
    return folder


def test_a_fresh_process_loads_bit_equal(saved_models):
    package, *modules = run_python(LOAD, saved_models, torch.get_num_threads()).split()
    assert Path(package) == Path(diffusers_mp.__file__)
    assert "diffusers_mp.transformer_mpdit" in modules


def test_a_fresh_process_loads_bit_equal_after_the_file_was_moved(saved_models, tmp_path):
    folder = tmp_path / "diffusers_mp"
    shutil.copytree(Path(diffusers_mp.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "transformer_mpdit.py").rename(folder / "somewhere_else.py")
    init = (folder / "__init__.py").read_text()
    assert '"transformer_mpdit": [' in init
    (folder / "__init__.py").write_text(init.replace("transformer_mpdit", "somewhere_else"))
    package, *modules = run_python(LOAD, saved_models, torch.get_num_threads(), package=tmp_path).split()
    assert Path(package) == folder / "__init__.py"
    assert "diffusers_mp.somewhere_else" in modules
    assert "diffusers_mp.transformer_mpdit" not in modules


def test_weights_are_saved_as_safetensors_alone(saved_models):
    assert {path.name for path in (saved_models / "E").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    saved = load_file(saved_models / "E" / "diffusion_pytorch_model.safetensors")
    # Saved while training: rows are at norm 1 whatever they were.
    assert (row_norms(saved["transformer_blocks.0.attn.to_q.weight"]) - 1).abs().max() < 1e-6
    assert (row_norms(saved["conditioning_embedder.class_embedder.weight"]) / math.sqrt(32) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("configuration", "ABCDE")
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


def test_a_merged_lora_survives_saving_and_loading(tmp_path):
    model, inputs = tiny_model("E").eval(), tiny_inputs()
    with torch.no_grad():
        to_q = model.transformer_blocks[0].attn.to_q
        to_q.weight += torch.randn(32, 2) @ torch.randn(2, 32)
        expected = forward(model, inputs)
        model.save_pretrained(tmp_path)
        loaded = MPDiTTransformer2DModel.from_pretrained(tmp_path)
        assert torch.equal(loaded.transformer_blocks[0].attn.to_q.weight, to_q.weight)
        assert (row_norms(to_q.weight) - 1).abs().max() > 0.5
        assert torch.equal(forward(loaded, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision(saved_models, dtype):
    model = MPDiTTransformer2DModel.from_pretrained(saved_models / "E", torch_dtype=dtype)
    saved = load_file(saved_models / "E" / "diffusion_pytorch_model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name].to(dtype)), name


def test_names_follow_diffusers():
    names = set(tiny_model("E").state_dict())
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        assert f"transformer_blocks.1.attn.{name}.weight" in names


def test_attention_processors():
    model, inputs = tiny_model("E"), tiny_inputs()
    names = [f"transformer_blocks.{index}.attn.processor" for index in range(2)]
    assert list(model.attn_processors) == names
    assert {type(processor) for processor in model.attn_processors.values()} == {MPDiTAttnProcessor}

    class Counting(MPDiTAttnProcessor):
        calls = 0

        def __call__(self, attn, hidden_states):
            Counting.calls += 1
            return super().__call__(attn, hidden_states)

    expected = forward(model, inputs)
    model.set_attn_processor(Counting())
    assert torch.equal(forward(model, inputs), expected)
    assert Counting.calls == 2
    model.set_attn_processor({names[0]: MPDiTAttnProcessor(), names[1]: Counting()})
    forward(model, inputs)
    assert Counting.calls == 3
    with pytest.raises(ValueError, match="number of attention layers"):
        model.set_attn_processor({names[0]: Counting()})


@pytest.mark.parametrize("cosine_attention", [True, False])
def test_attention_by_its_formula(cosine_attention):
    attn = tiny_model("E", cosine_attention=cosine_attention).double().transformer_blocks[0].attn
    x = 10 * torch.randn(2, 5, 32, dtype=torch.float64)
    query, key, value = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (attn.to_q, attn.to_k, attn.to_v))
    if cosine_attention:
        # Logits sqrt(d) cos, whatever the magnitude of the tokens.
        logits = math.sqrt(8) * nn.functional.cosine_similarity(query.unsqueeze(-2), key.unsqueeze(-3), dim=-1)
        assert logits.abs().max() <= math.sqrt(8)
    else:
        logits = query @ key.mT / math.sqrt(8)
    expected = attn.to_out[0]((logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), expected, rtol=1e-10, atol=1e-12)


# Errors


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
    ],
)
def test_errors_of_the_constructor(overrides, message):
    with pytest.raises(ValueError, match=message):
        MPDiTTransformer2DModel(**{**tiny_config("E"), **overrides})


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_each_sample_by_torch_func():
    model, inputs = tiny_model().train(), tiny_inputs()
    samples = inputs["hidden_states"], inputs["timestep"], inputs["class_labels"]

    def loss(parameters, hidden_states, timestep, label):
        inputs = {"hidden_states": hidden_states[None], "timestep": timestep[None], "class_labels": label[None]}
        return torch.func.functional_call(model, parameters, (), inputs).sample.square().mean()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, *samples)
    for number, sample in enumerate(zip(*samples, strict=True)):
        alone = torch.autograd.grad(loss(dict(model.named_parameters()), *sample), list(model.parameters()))
        for of_all, of_one in zip(together.values(), alone, strict=True):
            torch.testing.assert_close(of_all[number], of_one, rtol=1e-3, atol=1e-6)


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


def test_counts_of_numpy_are_saved(tmp_path):
    model = tiny_model(num_classes=np.int64(3), num_layers=np.int32(1))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_classes"], config["num_layers"]) == (3, 1)
