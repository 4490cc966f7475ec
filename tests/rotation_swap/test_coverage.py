"""The rotation swap in a tiny real instance of every transformer it supports."""

import copy
import functools
import json
import math
import pickle
from contextlib import nullcontext

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from diffusers import AutoModel
from helpers import ROOT, relative_error, tiny_inputs, tiny_model
from processes import run_python
from rotation_pipelines import PIPELINES, make_pipeline, sample
from tiny_transformers import CASES, cast, make, run

import diffusers_mp
from diffusers_mp import set_shift_scale, swap_adaln_for_rotation, unswap_rotation
from diffusers_mp.rotation_swap.coverage import COVERAGE, SUPPORTED
from diffusers_mp.rotation_swap.linear import rotation_linears
from diffusers_mp.rotation_swap.sites import find_sites


# Without the variants of a class: what a test of mechanics needs.
CLASSES = [case for case, (name, *_) in CASES.items() if case == next(c for c in CASES if CASES[c][0] == name)]

# Rows of a stock map by the class of its owner, written from diffusers' sources: shift h, scale s, gate g.
LAYOUTS = {
    "AdaLayerNormZero": "hsg hsg",
    "SD35AdaLayerNormZeroX": "hsg hsg hsg",
    "AdaLayerNormZeroSingle": "hsg",
    "AdaLayerNormContinuous": "sh",
    "AuraFlowPreFinalBlock": "sh",
    "CogVideoXLayerNormZero": "hsg hsg",
    "EasyAnimateLayerNormZero": "hsg hsg",
    "CogView3PlusAdaLayerNormZeroTextImage": "hsg hsg hsg hsg",
    "CogView4AdaLayerNormZero": "hhssgg hhssgg",
    "CogView4AdaLayerNormContinuous": "sh",
    "GlmImageAdaLayerNormZero": "hhssgg hhssgg",
    "GlmImageAdaLayerNormContinuous": "sh",
    "AdaLayerNorm": "hs",
    "AdaLayerNormShift": "h",
    "HunyuanVideoTokenReplaceAdaLayerNormZero": "hsg hsg",
    "HunyuanVideoTokenReplaceAdaLayerNormZeroSingle": "hsg",
    "QwenImageTransformerBlock": "hsg hsg",
    "HiDreamImageTransformerBlock": "hsg hsg hsg hsg",
    "HiDreamImageSingleTransformerBlock": "hsg hsg",
    "HiDreamImageOutEmbed": "hs",
    "Modulation": "hsg hsg",
    "FinalLayer": "hs",
    "DiTTransformer2DModel": "hs",
    "Transformer2DModel": "hs",
}
# Where the maps are in those whose map is not called `linear`.
PATHS = {
    "QwenImageTransformerBlock": ["img_mod.1", "txt_mod.1"],
    "HiDreamImageTransformerBlock": ["adaLN_modulation.1"],
    "HiDreamImageSingleTransformerBlock": ["adaLN_modulation.1"],
    "HiDreamImageOutEmbed": ["adaLN_modulation.1"],
    "Modulation": ["lin"],
    "FinalLayer": ["adaLN_modulation.1"],
    "DiTTransformer2DModel": ["proj_out_1"],
    "Transformer2DModel": ["proj_out_1"],
}


def slow_unless(cases, names):
    """Parameters of a test, those beyond `names` marked slow."""
    return [pytest.param(case, marks=() if case in names else pytest.mark.slow) for case in cases]


def swapped(case, angles=0.0, dtype=torch.float32, **options):
    """A swapped model whose heads are random, of this standard deviation, and inputs."""
    model, inputs = make(case, dtype)
    swap_adaln_for_rotation(model, **options)
    turn_(model, angles)
    return model, inputs


@torch.no_grad()
def turn_(model, std, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for linear in rotation_linears(model).values():
        for parameter in linear.rotation.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std / fan_in**0.5)


def stock_maps(model):
    """Path of each map of a stock model → its owner and its layout."""
    return {
        f"{name}.{path}".lstrip("."): (owner, LAYOUTS[type(owner).__name__].replace(" ", ""))
        for name, owner in model.named_modules()
        if type(owner).__name__ in LAYOUTS
        for path in PATHS.get(type(owner).__name__, ["linear"])
    }


def gradients(model, inputs):
    model.zero_grad()
    run(model, inputs).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_supported_class_has_a_case():
    assert {name for name, *_ in CASES.values()} == {name for name, state in COVERAGE.items() if state == SUPPORTED}


# Value


@pytest.mark.parametrize("case", CASES)
def test_kept_shifts_and_zero_angles_are_the_stock_model(case):
    stock, inputs = make(case)
    model, _ = swapped(case, keep_shift=True)
    torch.testing.assert_close(run(model, inputs), run(stock, inputs), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("keep_shift", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_half_turns_are_the_stock_model_with_negated_channels(case, keep_shift):
    """R(pi) y = -y: a pair that makes half a turn is scale -> -2 - scale, shift -> -shift in stock rows."""
    stock, inputs = make(case)
    model, _ = swapped(case, keep_shift=keep_shift)
    linears = rotation_linears(model)
    assert linears.keys() == stock_maps(stock).keys()
    generator = torch.Generator().manual_seed(5)
    for name, (owner, layout) in stock_maps(stock).items():
        linear = linears[name]
        half_turns = torch.randint(0, 2, (layout.count("h"), linear.dim // 2), generator=generator)
        linear.rotation.bias.copy_(math.pi * half_turns.flatten())
        # Channel j makes its pair with channel j + D/2.
        signs = (1 - 2 * half_turns).repeat(1, 2).float()
        if layout == "h":
            negate_shift_only(owner, signs[0], keep_shift)
        else:
            negate_rows(stock.get_submodule(name), layout, signs, keep_shift)
    before = run(make(case)[0], inputs)
    expected = run(stock, inputs)
    assert relative_error(expected, before) > 0.05
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def negate_rows(linear, layout, signs, keep_shift):
    def hook(module, args, rows):
        rows = rows.unflatten(-1, (len(layout), -1)).clone()
        for kind, factor in (("h", keep_shift), ("s", 1)):
            places = [place for place, letter in enumerate(layout) if letter == kind]
            for place, sign in zip(places, signs, strict=True):
                row = rows[..., place, :]
                rows[..., place, :] = factor * sign * row if kind == "h" else sign * (1 + row) - 1
        return rows.flatten(-2)

    linear.register_forward_hook(hook)


def negate_shift_only(norm, signs, keep_shift):
    if not keep_shift:
        norm.linear.weight.zero_()
        norm.linear.bias.zero_()
    norm.register_forward_hook(lambda module, args, output: signs * output)


def hand_rotated(y, angle):
    """Complex multiplication of the halves, as a second way to compute a rotation."""
    first, second = y.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle).double(), angle.double())
    return torch.cat([turned.real, turned.imag], dim=-1).to(y.dtype)


@torch.no_grad()
@pytest.mark.parametrize("keep_shift", [False, True])
def test_dit_block_by_hand(keep_shift):
    """R(angle) (norm(x) (1 + scale) + shift), for attention and MLP, with angles of any size."""
    stock, inputs = make("DiT")
    model, _ = swapped("DiT", 1.0, keep_shift=keep_shift)
    block, stock_block = model.transformer_blocks[1], stock.transformer_blocks[1]
    tokens = torch.randn(2, 4, 16)
    conditioning = torch.nn.functional.silu(
        stock_block.norm1.emb(inputs["timestep"], inputs["class_labels"], hidden_dtype=torch.float32)
    )
    maps = stock_block.norm1.linear(conditioning)[:, None].chunk(6, dim=-1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = maps
    head = block.norm1.linear.rotation
    angle, mlp_angle = (conditioning @ head.weight.T + head.bias)[:, None].chunk(2, dim=-1)
    assert angle.std() > 0.5

    normed = stock_block.norm1.norm(tokens)
    attention_input = hand_rotated(normed * (1 + scale) + keep_shift * shift, angle)
    after_attention = tokens + gate * stock_block.attn1(attention_input)
    mlp_input = stock_block.norm3(after_attention) * (1 + mlp_scale) + keep_shift * mlp_shift
    expected = after_attention + mlp_gate * stock_block.ff(hand_rotated(mlp_input, mlp_angle))
    value = block(tokens, timestep=inputs["timestep"], class_labels=inputs["class_labels"])
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_qwen_tokens_of_two_conditions_by_hand():
    model, _ = swapped("QwenImage edit plus", 1.0)
    block = model.transformer_blocks[0]
    linear = block.img_mod[1]
    # As the model calls it: conditions of the noisy tokens of both samples, then those of the clean ones.
    conditions, tokens = torch.randn(4, 16), torch.randn(2, 3, 16)
    index = torch.tensor([[0, 0, 1], [1, 0, 1]])
    value, gate = block._modulate(tokens, linear(conditions).chunk(2, dim=-1)[1], index)
    angles = linear.rotation(conditions).chunk(2, dim=-1)[1]
    _, _, scales, gates = linear.linear(conditions).chunk(4, dim=-1)
    for batch in range(2):
        for place in range(3):
            row = batch + 2 * index[batch, place]
            expected = hand_rotated(tokens[batch, place] * (1 + scales[row]), angles[row])
            torch.testing.assert_close(value[batch, place], expected)
            torch.testing.assert_close(gate[batch, place], gates[row])


@torch.no_grad()
def test_hunyuan_video_first_frame_by_hand():
    model, _ = swapped("HunyuanVideo token_replace", 1.0)
    norm = model.transformer_blocks[0].norm1
    tokens, condition, first_frame = torch.randn(2, 5, 16), torch.randn(2, 16), torch.randn(2, 16)
    value = norm(tokens, condition, first_frame, 2)[0]
    expected = []
    for part, chosen in ((tokens[:, :2], first_frame), (tokens[:, 2:], condition)):
        activated = torch.nn.functional.silu(chosen)
        scale = norm.linear.linear(activated)[:, None, :16]
        angle = norm.linear.rotation(activated)[:, None, :8]
        expected.append(hand_rotated(norm.norm(part) * (1 + scale), angle))
    torch.testing.assert_close(value, torch.cat(expected, dim=1))


@pytest.mark.parametrize("case", CASES)
def test_rows_of_scales_and_gates_are_kept_exactly(case):
    stock, _ = make(case)
    model, _ = swapped(case)
    for name, (_, layout) in stock_maps(stock).items():
        linear = model.get_submodule(name)
        kept = [place for place, letter in enumerate(layout) if letter != "h"]
        if not kept:
            assert linear.linear is None
            continue
        for key, rows in stock.get_submodule(name).named_parameters():
            expected = rows.unflatten(0, (len(layout), -1))[kept].flatten(0, 1)
            assert torch.equal(getattr(linear.linear, key), expected)
    others = {key for key in stock.state_dict() if not any(key.startswith(name) for name in rotation_linears(model))}
    assert all(torch.equal(model.state_dict()[key], stock.state_dict()[key]) for key in others)


# Gradients


@pytest.mark.parametrize("angles", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_new_parameter(case, angles):
    model, inputs = swapped(case, angles, keep_shift=True)
    all_gradients = gradients(model, inputs)
    names = [name for name in all_gradients if any(name.startswith(site) for site in rotation_linears(model))]
    assert names
    for name in names:
        gradient = all_gradients[name]
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    # Each rotation, not only their sum, is used: no rows of a head without a gradient.
    for name, linear in rotation_linears(model).items():
        bias = all_gradients[f"{name}.rotation.bias"].unflatten(0, (linear.kinds.count("rotate"), -1))
        unused = [index for index, rows in enumerate(bias) if not rows.any()]
        # Text tokens are dropped after the last block of these.
        stock_unused = unused_shifts(case)[name]
        assert unused == stock_unused, (name, unused, stock_unused)


@functools.cache
def unused_shifts(case):
    """Path of each stock map → indices of its shifts without any gradient."""
    stock, inputs = make(case)
    of_stock, unused = gradients(stock, inputs), {}
    for name, (_, layout) in stock_maps(stock).items():
        rows = of_stock[f"{name}.weight"].unflatten(0, (len(layout), -1))
        shifts = [place for place, letter in enumerate(layout) if letter == "h"]
        unused[name] = [index for index, place in enumerate(shifts) if not rows[place].any()]
    return unused


CHECKPOINTED = [
    case
    for case in CASES
    # The stock HunyuanImage of diffusers 0.42.1 raises: it passes the function arguments by name.
    if getattr(diffusers, CASES[case][0])._supports_gradient_checkpointing and case != "HunyuanImage"
]


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(case):
    model, inputs = swapped(case, 0.3)
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    value = gradients(model, inputs)
    assert model.is_gradient_checkpointing
    for name, gradient in expected.items():
        assert (gradient is None) == (value[name] is None)
        if gradient is not None:
            torch.testing.assert_close(value[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_stock_model_without_gradient_checkpointing():
    model, inputs = make("HunyuanImage")
    model.enable_gradient_checkpointing()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        run(model, inputs)


# Compilation


@pytest.fixture
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# The stock models of these do not compile as one graph either: they read values of tensors in their forward.
BRANCHING = ("HunyuanVideo15", "HiDream")


def assert_compiles_as_one_graph(case, backend):
    model, inputs = swapped(case, 0.3, keep_shift=case == "Flux")
    with torch.no_grad():
        expected = run(model, inputs)
        value = run(torch.compile(model, fullgraph=True, backend=backend), inputs)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize("case", slow_unless([case for case in CASES if case not in BRANCHING], ("DiT", "Flux")))
def test_compiles_as_one_graph(case, clean_compiler):
    assert_compiles_as_one_graph(case, "aot_eager")


# What a swap puts in the place of tensors is gone from a captured graph, so capturing is what tells models apart.
@pytest.mark.parametrize("case", ["SD3.5", "HunyuanDiT", "HunyuanVideo"])
def test_is_captured_as_one_graph(case, clean_compiler):
    assert_compiles_as_one_graph(case, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", BRANCHING)
def test_stock_models_that_do_not_compile(case, clean_compiler):
    model, inputs = make(case)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.TorchDynamoException):
        run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of inductor itself
@pytest.mark.parametrize("case", ["DiT", "Flux"])
def test_compiles_with_inductor(case, clean_compiler):
    model, inputs = swapped(case, 0.3)
    expected = run(model, inputs)
    with torch.set_grad_enabled(case == "DiT"):
        value = run(torch.compile(model, fullgraph=True), inputs)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    if case == "DiT":
        expected.square().mean().backward()
        gradient = model.proj_out_1.rotation.weight.grad
        model.zero_grad()
        value.square().mean().backward()
        torch.testing.assert_close(
            model.proj_out_1.rotation.weight.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.std().item()
        )


@pytest.mark.parametrize("case", ["Flux", pytest.param("QwenImage", marks=pytest.mark.slow)])
def test_compiles_by_regions(case, clean_compiler):
    model, inputs = swapped(case, 0.3)
    with torch.no_grad():
        expected = run(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        value = run(model, inputs)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_annealing_does_not_compile_anew(clean_compiler):
    model, inputs = swapped("DiT", 0.3, keep_shift=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    values = []
    with torch.no_grad(), torch.compiler.set_stance("default"):
        for step, shift_scale in enumerate((1.0, 0.6, 0.2, 0.0)):
            set_shift_scale(model, shift_scale)
            with torch.compiler.set_stance("fail_on_recompile") if step else nullcontext():
                values.append(run(compiled, inputs))
            torch.testing.assert_close(values[-1], run(model, inputs), rtol=1e-4, atol=1e-3)
    assert relative_error(values[0], values[-1]) > 0.05


# Precision


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_as_the_stock_model(case):
    errors = []
    for swap in (False, True):
        outputs = []
        for dtype in (torch.float32, torch.bfloat16):
            model, inputs = make(case)
            if swap:
                swap_adaln_for_rotation(model)
                turn_(model, 0.3)
            outputs.append(run(model.to(dtype), cast(inputs, dtype)))
        assert outputs[1].isfinite().all()
        assert outputs[1].dtype == torch.bfloat16
        errors.append(relative_error(outputs[1], outputs[0]))
    assert errors[1] < 2 * errors[0] + 0.01


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of RMS norms of queries
@torch.no_grad()
@pytest.mark.parametrize("case", CLASSES)
def test_autocast(case):
    model, inputs = swapped(case, 0.3)
    expected = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        value = run(model, inputs)
    assert value.isfinite().all()
    stock, _ = make(case)
    stock_expected = run(stock, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock_error = relative_error(run(stock, inputs), stock_expected)
    assert relative_error(value, expected) < 2 * stock_error + 0.01


# Saving


OPTIONS = {"keep_shift": True, "shift_scale": 0.5, "rank": 2, "sublayers": ["mlp", "final"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every swapped model saved, some in shards and with options; then loaded and run in one fresh process."""
    folder = tmp_path_factory.mktemp("swapped")
    outputs = {}
    for case in [*CASES, "DiT with options", "Flux in shards", "Flux in bfloat16"]:
        name, _, variant = case.partition(" with ") if " with " in case else case.partition(" in ")
        model, inputs = swapped(name, 0.3, **(OPTIONS if variant == "options" else {}))
        if variant == "options":
            inputs_of_mean = inputs
            unswap_rotation(model)
            swap_adaln_for_rotation(model, calibration=[inputs_of_mean], **OPTIONS)
            turn_(model, 0.3)
        if variant == "bfloat16":
            model, inputs = model.to(torch.bfloat16), cast(inputs, torch.bfloat16)
        model.save_pretrained(folder / case, max_shard_size="20KB" if variant == "shards" else "5GB")
        outputs[case] = run(model, inputs).detach()
    run_python(
        """
        import sys, json
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        import torch, diffusers_mp
        from tiny_transformers import CASES, cast, run

        torch.set_num_threads(1)
        outputs = {}
        for folder in Path(sys.argv[1]).iterdir():
            case = folder.name.removesuffix(" with options").removesuffix(" in shards").removesuffix(" in bfloat16")
            name, _, inputs = CASES[case]
            dtype = torch.bfloat16 if "bfloat16" in folder.name else torch.float32
            model = getattr(diffusers_mp, "Rotation" + name).from_pretrained(folder, torch_dtype=dtype).eval()
            # Out of the file's memory: where a weight lies in it may change the order of a sum.
            model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
            with torch.no_grad():
                outputs[folder.name] = run(model, cast(inputs(), dtype))
        torch.save(outputs, Path(sys.argv[1]) / "outputs.pt")
        """,
        folder,
        ROOT / "tests",
    )
    return folder, outputs, torch.load(folder / "outputs.pt", weights_only=True)


def test_reloads_to_the_bit_in_a_fresh_process(saved):
    folder, outputs, reloaded = saved
    assert outputs.keys() == reloaded.keys()
    different = [case for case, output in outputs.items() if not torch.equal(output, reloaded[case])]
    assert not different
    assert len(list((folder / "Flux in shards").glob("*.safetensors"))) > 1


def test_is_never_saved_under_the_stock_name(saved):
    folder, outputs, _ = saved
    for case in outputs:
        config = json.loads((folder / case / "config.json").read_text())
        assert config["_class_name"].startswith("Rotation")
        assert set(config["rotation_modulation"]) == {"sublayers", "keep_shift", "mean_shift", "rank"}


def test_stock_class_says_what_it_leaves_out(saved, caplog):
    """All that diffusers does for a class that is told to load another one's weights."""
    diffusers.utils.logging.enable_propagation()
    try:
        diffusers.FluxTransformer2DModel.from_pretrained(saved[0] / "Flux")
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "rotation_modulation" in caplog.text
    assert "not used when initializing FluxTransformer2DModel" in caplog.text
    assert "norm_out.linear.rotation.weight" in caplog.text


def test_auto_model_knows_classes_of_diffusers_only(saved):
    with pytest.raises(ValueError, match="`diffusers` has no class `RotationFluxTransformer2DModel`"):
        AutoModel.from_pretrained(saved[0] / "Flux")


@pytest.mark.parametrize("options", [{"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": False, "device_map": None}])
def test_other_ways_to_load(saved, options):
    folder, outputs, _ = saved
    model = diffusers_mp.RotationFluxTransformer2DModel.from_pretrained(folder / "Flux in shards", **options)
    assert torch.equal(run(model.eval(), make("Flux")[1]), outputs["Flux"])


def test_device_map_offloads_to_disk(saved, tmp_path):
    folder, outputs, _ = saved
    parts = [name for name, _ in make("Flux")[0].named_children()]
    places = {name: "disk" if name in ("transformer_blocks", "norm_out") else "cpu" for name in parts}
    model = diffusers_mp.RotationFluxTransformer2DModel.from_pretrained(
        folder / "Flux", device_map=places, offload_folder=tmp_path
    )
    assert model.norm_out.linear.rotation.weight.is_meta
    with torch.no_grad():
        assert torch.equal(run(model.eval(), make("Flux")[1]), outputs["Flux"])


@pytest.mark.parametrize("case", CLASSES)
def test_class_attributes_are_those_of_the_stock_class(case):
    stock, _ = make(case)
    model, _ = swapped(case)
    assert isinstance(model, type(stock))
    assert type(model) is getattr(diffusers_mp, f"Rotation{type(stock).__name__}")
    for name in ("_no_split_modules", "_repeated_blocks", "_skip_layerwise_casting_patterns", "_keep_in_fp32_modules"):
        assert getattr(model, name, None) == getattr(stock, name, None)
    stock_classes = {type(module).__name__ for module in stock.modules()}
    assert {type(module).__name__ for module in model.modules()} - stock_classes == {
        "RotationLinear",
        type(model).__name__,
    }
    assert type(type(model).from_config(model.config)) is type(model)


def test_copies_and_pickles():
    model, inputs = swapped("Flux", 0.3)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(run(copied, inputs), run(model, inputs))


# Hooks, attached after the swap


# Constant and kept shifts are tensors of the swapped module itself: hooks must find these, too.
def fully_swapped(case):
    model, inputs = make(case)
    swap_adaln_for_rotation(model, keep_shift=True, shift_scale=0.5, calibration=[inputs])
    turn_(model, 0.3)
    return model, inputs


@pytest.mark.parametrize("case", ["DiT", "Flux", "QwenImage"])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, cpu_offload_with_hook])
def test_offload_hooks(case, offload, tmp_path):
    model, inputs = fully_swapped(case)
    with torch.no_grad():
        expected = run(model, inputs)
        arguments = {"offload_dir": tmp_path} if offload is disk_offload else {}
        offload(model, execution_device="cpu", **arguments)
        assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("case", ["Flux", "QwenImage"])
@pytest.mark.parametrize(
    "level", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(case, level):
    model, inputs = fully_swapped(case)
    with torch.no_grad():
        expected = run(model, inputs)
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **level)
        assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("case", ["DiT", "Flux", "QwenImage"])
def test_layerwise_casting(case):
    """Maps of norms stay as they are, by diffusers' own patterns; QwenImage's are not in norms."""
    model, inputs = fully_swapped(case)
    with torch.no_grad():
        expected = run(model, inputs)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        value = run(model, inputs)
    stored = {linear.rotation.weight.dtype for name, linear in rotation_linears(model).items() if "norm" in name}
    assert stored == {torch.float32}
    if case == "QwenImage":
        assert model.transformer_blocks[0].img_mod[1].rotation.weight.dtype == torch.float8_e4m3fn
    stock, _ = make(case)
    with torch.no_grad():
        stock_expected = run(stock, inputs)
        stock.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert relative_error(value, expected) < 2 * relative_error(run(stock, inputs), stock_expected) + 0.02


@torch.no_grad()
def test_first_block_cache():
    model, inputs = swapped("Flux", 0.3)
    expected = run(model, inputs)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("one"):
        assert torch.equal(run(model, inputs), expected)


# Pipelines


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Every pipeline run and saved, then loaded and run in one fresh process."""
    folder = tmp_path_factory.mktemp("pipelines")
    outputs = {}
    for case in PIPELINES:
        stock = sample(case, make_pipeline(case, lambda transformer: None))
        pipeline = make_pipeline(case, swap_and_turn)
        assert pipeline.transformer.config.rotation_modulation
        outputs[case] = sample(case, pipeline)
        assert outputs[case].isfinite().all()
        assert relative_error(outputs[case], stock) > 0.01, case
        pipeline.save_pretrained(folder / case)
    run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        import diffusers, torch, diffusers_mp
        from rotation_pipelines import PIPELINES, load, sample

        torch.set_num_threads(1)
        outputs = {case: sample(case, load(case, Path(sys.argv[1]) / case)) for case in PIPELINES}
        torch.save(outputs, Path(sys.argv[1]) / "outputs.pt")
        """,
        folder,
        ROOT / "tests",
    )
    return folder, outputs, torch.load(folder / "outputs.pt", weights_only=True)


def swap_and_turn(transformer):
    swap_adaln_for_rotation(transformer)
    turn_(transformer, 0.3)


def test_pipelines_reload_in_a_fresh_process(pipelines):
    _, outputs, reloaded = pipelines
    for case, output in outputs.items():
        # Weights that lie elsewhere in memory may be multiplied in another order, in stock models as well.
        torch.testing.assert_close(output, reloaded[case], msg=case)


def test_a_pipeline_is_saved_under_the_class_that_was_assigned(tmp_path):
    """Else the stock class is loaded, without values in its modulations: docs/rotation_swap.md says so."""
    pipeline = make_pipeline("DiT", lambda transformer: None)
    swap_adaln_for_rotation(pipeline.transformer)
    pipeline.save_pretrained(tmp_path / "as it was")
    pipeline.transformer = pipeline.transformer
    pipeline.save_pretrained(tmp_path / "assigned")
    assigned = type(pipeline).from_pretrained(tmp_path / "assigned").transformer
    assert type(assigned) is type(pipeline.transformer)
    assert not any(parameter.is_meta for parameter in assigned.parameters())
    stock = type(pipeline).from_pretrained(tmp_path / "as it was").transformer
    assert type(stock) is diffusers.DiTTransformer2DModel
    assert {name for name, parameter in stock.named_parameters() if parameter.is_meta} == {
        f"{site.name}.{name}" for site in find_sites(stock) for name in ("weight", "bias")
    }


def test_pipeline_without_the_import_says_what_to_import(pipelines):
    message = run_python(
        """
        import sys
        import diffusers
        for pipeline in (diffusers.FluxPipeline, diffusers.DiffusionPipeline):
            try:
                pipeline.from_pretrained(sys.argv[1])
            except ValueError as error:
                print(error)
        """,
        pipelines[0] / "Flux guided",
    )
    assert message.count("diffusers_mp is not one of the libraries Diffusers can load components from") == 2
    assert message.count("import diffusers_mp before calling `from_pretrained`") == 2


# The way back


@pytest.mark.parametrize("keep_shift", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_unswapped_is_the_stock_model(case, keep_shift):
    stock, inputs = make(case)
    model, _ = swapped(case, 0.3, keep_shift=keep_shift)
    unswap_rotation(model, None if keep_shift else stock)
    assert type(model) is type(stock)
    assert dict(model.config) == dict(stock.config)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model, inputs), run(stock, inputs))


def test_unswapped_keeps_trained_rows():
    stock, _ = make("Flux")
    model, _ = swapped("Flux", 0.3)
    with torch.no_grad():
        for linear in rotation_linears(model).values():
            linear.linear.weight.add_(1)
            linear.linear.bias.add_(1)
    unswap_rotation(model, stock)
    for name, (_, layout) in stock_maps(model).items():
        for key, rows in model.get_submodule(name).named_parameters():
            difference = (rows - stock.get_submodule(name).get_parameter(key)).unflatten(0, (len(layout), -1))
            for letter, part in zip(layout, difference, strict=True):
                torch.testing.assert_close(part, torch.full_like(part, letter != "h"))


# This package's own model, whose swap is another configuration of it


def native(keep_shift, **overrides):
    model = tiny_model("E", ["scale", "shift", "gate"], **overrides)
    swap_adaln_for_rotation(model, keep_shift=keep_shift)
    return model.eval(), tiny_inputs()


@torch.no_grad()
def test_native_kept_shift_and_closed_gain_are_the_model_of_before():
    expected = run(tiny_model("E", ["scale", "shift", "gate"]).eval(), tiny_inputs())
    model, inputs = native(keep_shift=True)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("configuration", ["A", "E"])
@pytest.mark.parametrize("keep_shift", [False, True])
def test_native_rows_and_gains_are_kept_exactly(configuration, keep_shift):
    before = tiny_model(configuration, ["scale", "shift", "gate"])
    model = tiny_model(configuration, ["scale", "shift", "gate"])
    report = swap_adaln_for_rotation(model, keep_shift=keep_shift)
    assert list(model.config.modulation) == ["scale", *["shift"] * keep_shift, "gate", "rotate"]
    for name in report.replaced:
        old, new = (m.get_submodule(name.removesuffix(".proj")) for m in (before, model))
        old_rows = dict(zip(old.kinds, old.proj.weight.split(old.sizes), strict=True))
        new_rows = dict(zip(new.kinds, new.proj.weight.split(new.sizes), strict=True))
        assert ("shift" in new_rows) == keep_shift
        for kind in set(old_rows) & set(new_rows):
            assert torch.equal(old_rows[kind], new_rows[kind])
            if new.gain is not None:
                assert torch.equal(old.gain[old.kinds.index(kind)], new.gain[new.kinds.index(kind)])
    assert len(report.replaced) == 5
    assert report.num_parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_native_equals_a_model_made_with_rotation_and_reloads(tmp_path):
    model, inputs = native(keep_shift=False)
    with torch.no_grad():
        before = run(model, inputs)
        for name, gain in model.named_parameters():
            if name.endswith("gain"):
                gain.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
        expected = run(model, inputs)
    assert relative_error(expected, before) > 0.01
    made = tiny_model("E", ["scale", "gate", "rotate"]).eval()
    made.load_state_dict(model.state_dict())
    assert torch.equal(run(made, inputs), expected)
    model.save_pretrained(tmp_path / "native")
    run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[2])
        import torch
        from helpers import tiny_inputs
        from diffusers_mp import MPDiTTransformer2DModel

        torch.set_num_threads(1)
        model = MPDiTTransformer2DModel.from_pretrained(sys.argv[1]).eval()
        with torch.no_grad():
            torch.save(model(**tiny_inputs(), return_dict=False)[0], sys.argv[1] + "/output.pt")
        """,
        tmp_path / "native",
        ROOT / "tests",
    )
    assert torch.equal(torch.load(tmp_path / "native" / "output.pt", weights_only=True), expected)


@pytest.mark.parametrize("keep_shift", [False, True])
def test_native_gradients_and_checkpointing(keep_shift):
    model, inputs = native(keep_shift)
    fill_gains_(model)
    expected = gradients(model, inputs)
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        if "modulation" in name:
            assert gradient.any(), name
    model.enable_gradient_checkpointing()
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def fill_gains_(model):
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            parameter.fill_(0.4)


@torch.no_grad()
def test_native_compiles_and_runs_in_bfloat16(clean_compiler):
    model, inputs = native(keep_shift=False)
    fill_gains_(model)
    expected = run(model, inputs)
    value = run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    model.to(torch.bfloat16)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    assert relative_error(run(model, inputs), expected) < 0.05
