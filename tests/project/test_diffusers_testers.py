"""What diffusers' testers ask of a model and a pipeline, beside test_diffusers_features and test_pipeline_features.

The table is in docs/design/diffusers_conformance.md.
"""

import copy
import inspect
import textwrap

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, DDIMScheduler
from diffusers.training_utils import EMAModel
from helpers import row_norms, tiny_inputs, tiny_model, tiny_vae
from peft import LoraConfig
from processes import run_processes
from safetensors.torch import load_file

from diffusers_mp import (
    MagnitudeRecorder,
    MPDiTPipeline,
    MPDiTTransformer2DModel,
    PowerFunctionEMA,
    normalize_weights_,
)


CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


@torch.no_grad()
def forward(model, **inputs):
    return model(**{**tiny_inputs(), **inputs}).sample


def rounded_to_float8(model):
    """A copy whose weights are those that layerwise casting leaves, in float32."""
    cast = copy.deepcopy(model)
    cast.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    stored = {name for name, parameter in cast.named_parameters() if parameter.dtype == FP8}
    assert any("to_q" in name for name in stored)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name in stored:
                parameter.copy_(parameter.to(FP8))
    return rounded


# The class


def test_attributes_of_the_config_and_of_nobody():
    model = tiny_model()
    with pytest.warns(FutureWarning, match="Accessing config attribute `num_classes` directly"):
        assert model.num_classes == 10
    with pytest.raises(AttributeError, match="'MPDiTTransformer2DModel' object has no attribute 'number_of_classes'"):
        model.number_of_classes  # noqa: B018


def test_a_dtype_by_its_new_name(tmp_path):
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    half = MPDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(
        torch.equal(mine, theirs.to(torch.bfloat16))
        for mine, theirs in zip(half.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:the rows of a .* have drifted")
def test_an_average_kept_by_diffusers():
    # Averages of unit rows are shorter: copied into a model in training, they get their norm back with `eval`.
    model = tiny_model().train()
    average = EMAModel(model.parameters(), decay=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(4):
        model(**tiny_inputs()).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)
        average.step(model.parameters())
    weight = model.transformer_blocks[0].attn.to_q.weight
    index = next(index for index, parameter in enumerate(model.parameters()) if parameter is weight)
    shadow = average.shadow_params[index].clone()
    assert row_norms(shadow).max() < 0.99
    average.copy_to(model.parameters())
    model.eval()
    torch.testing.assert_close(weight.detach(), shadow / shadow.norm(dim=-1, keepdim=True))


# LoRA


def lora(rank=4, **options):
    options = {"target_modules": ["to_q", "to_v", "linear_1"], **options}
    return LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, **options)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"rank_pattern": {"to_q": 1, "linear_1": 6}, "alpha_pattern": {"to_q": 3}}],
    ids=["dora", "ranks"],
)
def test_kinds_of_lora_are_saved_and_loaded(options, tmp_path):
    model = tiny_model().eval()
    plain = forward(model)
    torch.manual_seed(4)
    model.add_adapter(lora(**options))
    expected = forward(model)
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max()
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert torch.equal(forward(model), plain)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(forward(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_several_adapters_are_added_to_the_rows_as_they_are():
    model, merged = tiny_model().eval(), tiny_model().eval()
    torch.manual_seed(4)
    for name, rank in (("first", 2), ("second", 4)):
        model.add_adapter(lora(rank), adapter_name=name)
    model.set_adapters(["first", "second"], [0.5, -1.5])
    assert set(model.active_adapters()) == {"first", "second"}
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == 7  # three of each block, and that of the time embedder
    with torch.no_grad():
        for name, layer in layers.items():
            for adapter, weight in (("first", 0.5), ("second", -1.5)):
                change = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
                merged.get_submodule(name).weight.add_(2 * weight * change)
    torch.testing.assert_close(forward(model), forward(merged), rtol=1e-4, atol=1e-4)
    model.delete_adapters("second")
    model.set_adapters("first", 1.0)
    assert list(model.peft_config) == ["first"]


def test_an_adapter_swapped_in_place(tmp_path):
    model = tiny_model().eval()
    expected = {}
    for rank in (2, 4):
        torch.manual_seed(rank)
        model.add_adapter(lora(rank, target_modules=["to_q", "to_v"]))
        expected[rank] = forward(model)
        model.save_lora_adapter(tmp_path / str(rank))
        model.unload_lora()
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(tmp_path / "2", prefix=None, use_safetensors=True, adapter_name="style")
    torch.testing.assert_close(forward(model), expected[2], rtol=1e-5, atol=1e-5)
    model.load_lora_adapter(tmp_path / "4", prefix=None, use_safetensors=True, adapter_name="style", hotswap=True)
    torch.testing.assert_close(forward(model), expected[4], rtol=1e-5, atol=1e-5)


def test_a_lora_that_is_not_finite_is_not_merged():
    model = tiny_model().eval()
    model.add_adapter(lora())
    layer = model.transformer_blocks[0].attn.to_q
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.fuse_lora(safe_fusing=True)
    assert layer.base_layer.weight.isfinite().all()


# Layerwise casting


@pytest.mark.parametrize("offload_type", [None, "leaf_level", "block_level"])
def test_cast_and_offloaded(offload_type):
    model = tiny_model().eval()
    expected = forward(rounded_to_float8(model))
    model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    if offload_type:
        number = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        model.enable_group_offload(onload_device=CPU, offload_type=offload_type, **number)
    assert torch.equal(forward(model), expected)


@pytest.mark.parametrize("configuration", ["A", "E"])
def test_training_with_cast_weights(configuration):
    model = tiny_model(configuration).train()
    reference = rounded_to_float8(model)
    model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    for each in (model, reference):
        each(**tiny_inputs()).sample.square().mean().backward()
    compared = 0
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        # The gradient of a stored weight is in the dtype of storage.
        if parameter.dtype == torch.float32:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-8)
            compared += bool(other.grad.any())
        else:
            assert parameter.grad.float().isfinite().all(), name
    assert compared >= 6


def test_cast_weights_are_saved_in_training(tmp_path):
    model = tiny_model().eval()
    expected = rounded_to_float8(model).state_dict()
    model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    model.train().save_pretrained(tmp_path)
    model.eval()
    # As they are stored: rounding moves the norm of a row by less than the tolerance of float8.
    for name, tensor in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor.float(), expected[name]), name


def test_cast_weights_are_normalised_averaged_and_recorded():
    model = tiny_model().eval()
    reference = rounded_to_float8(model)
    model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    values = []
    for each in (model, reference):
        with MagnitudeRecorder(each) as recorder:
            forward(each)
        values.append(recorder.values())
    assert values[0] == pytest.approx(values[1], rel=1e-5)

    ema = PowerFunctionEMA(model)
    expected = {name: parameter.float() for name, parameter in model.named_parameters()}
    assert all(torch.equal(average, expected[name]) for name, average in ema.state_dict()["averages"][0].items())

    # Settled rows stay as they are, others go back to norm 1 up to the rounding of float8.
    layer = model.transformer_blocks[0].ff.linear_1
    with torch.no_grad():
        layer.weight[0] = (layer.weight[0].float() * 4).to(FP8)
    normalize_weights_(model)
    for name, parameter in model.named_parameters():
        if parameter is layer.weight:
            assert torch.equal(parameter[1:].float(), expected[name][1:])
            assert row_norms(parameter[0]).item() == pytest.approx(1, abs=0.125)
        else:
            assert torch.equal(parameter.float(), expected[name])


def test_a_lora_over_cast_weights():
    model = tiny_model().eval()
    reference = rounded_to_float8(model)
    for each in (model, reference):
        torch.manual_seed(4)
        each.add_adapter(lora())
    model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.base_layer.weight.dtype == FP8
    assert layer.lora_A["default"].weight.dtype == torch.float32
    torch.testing.assert_close(forward(model), forward(reference), rtol=1e-5, atol=1e-6)


# Compilation


@pytest.fixture
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("clean_compiler")
def test_nothing_is_compiled_again():
    model = tiny_model(num_layers=1).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height, width in ((8, 12), (8, 12), (12, 8), (16, 20)):
            x = torch.randn(3, 4, height, width)
            torch.testing.assert_close(forward(compiled, hidden_states=x), forward(model, hidden_states=x))


@pytest.mark.usefixtures("clean_compiler")
def test_compiled_and_offloaded():
    model = tiny_model().eval()
    expected = forward(model)
    model.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)
    model.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(forward(model), expected)


# Context parallelism


BACKWARD = """
import os, torch, warnings
import torch.distributed as dist
from diffusers import ContextParallelConfig
from helpers import tiny_inputs, tiny_model

torch.accelerator.device_count = lambda: 1  # a GPU's number is what diffusers asks for; a CPU has none
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
whole, divided = tiny_model().train(), tiny_model().train()
divided.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
inputs = tiny_inputs()
for model in (whole, divided):
    # No sum that would be the same for tokens in another order.
    (model(**inputs).sample - inputs["hidden_states"]).square().mean().backward()
for (name, parameter), own in zip(whole.named_parameters(), divided.parameters()):
    gradient = own.grad.clone()
    dist.all_reduce(gradient)
    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7, msg=lambda text: f"{name}: {text}")
    assert not torch.allclose(own.grad, parameter.grad, rtol=1e-2), name
print("done", flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_gradients_of_divided_tokens_add_up(tmp_path):
    # Each process has those of its own tokens.
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(BACKWARD))
    assert run_processes(script).count("done") == 2


# The pipeline


def tiny_pipeline():
    pipe = MPDiTPipeline(tiny_model().eval(), DDIMScheduler(clip_sample=False), tiny_vae())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **arguments):
    arguments = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0, **arguments}
    return pipe([1, 4], generator=torch.Generator().manual_seed(0), **arguments).images


def test_the_call_has_the_arguments_of_an_image_pipeline():
    parameters = inspect.signature(MPDiTPipeline.__call__).parameters
    defaults = {
        "height": None,
        "width": None,
        "num_inference_steps": 50,
        "generator": None,
        "latents": None,
        "output_type": "pil",
        "return_dict": True,
        "callback_on_step_end": None,
    }
    assert {name: parameters[name].default for name in defaults} == defaults


def test_components_are_the_arguments():
    pipe = tiny_pipeline()
    modules, others = pipe._get_signature_keys(pipe)
    assert set(pipe.components) == set(modules)
    assert set(others) == {"id2label", "latents_mean", "latents_std", "prediction_type"}
    again = MPDiTPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), sample(pipe))


def test_a_dtype_for_each_part(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    pipe = MPDiTPipeline.from_pretrained(tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)


def test_a_device_for_the_whole(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    placed = MPDiTPipeline.from_pretrained(tmp_path, device_map="cpu")
    placed.set_progress_bar_config(disable=True)
    assert torch.equal(sample(placed), sample(pipe))


def test_a_variant_that_is_not_there(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`variant=fp16`"):
        MPDiTPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_part_taken_out_stays_out(tmp_path):
    pipe = tiny_pipeline()
    pipe.vae = None
    pipe.save_pretrained(tmp_path)
    again = MPDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.vae is None
    assert torch.equal(sample(again, output_type="latent"), sample(pipe, output_type="latent"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            down_block_out_channels=(8, 8),
            up_block_types=("UpDecoderBlock2D",) * 2,
            up_block_out_channels=(8, 8),
            norm_num_groups=4,
        ),
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
    ],
    ids=["asymmetric", "tiny"],
)
def test_decoders_without_a_shift(make):
    pipe = tiny_pipeline()
    other = MPDiTPipeline(pipe.transformer, pipe.scheduler, make().eval())
    other.set_progress_bar_config(disable=True)
    assert sample(other).shape == (2, 3, 16, 16)


def test_a_cast_transformer():
    pipe = tiny_pipeline()
    reference = MPDiTPipeline(**{**pipe.components, "transformer": rounded_to_float8(pipe.transformer)})
    reference.set_progress_bar_config(disable=True)
    pipe.transformer.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    assert torch.equal(sample(pipe), sample(reference))


def test_parts_left_out_of_offloading():
    pipe = tiny_pipeline()
    expected = sample(pipe)
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level", exclude_modules="vae")
    assert not any(hasattr(module, "_diffusers_hook") for module in pipe.vae.modules())
    assert any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())
    assert torch.equal(sample(pipe), expected)


def test_a_callback_that_changes_the_guidance_scale():
    kept = {}

    def raise_scale(pipe, step, timestep, tensors):
        kept[step] = tensors["latents"]
        pipe._guidance_scale += 1.0
        return {}

    def put_back(pipe, step, timestep, tensors):
        return {"latents": kept[0]} if step == 0 else {}

    pipe = tiny_pipeline()
    got = sample(pipe, output_type="latent", callback_on_step_end=raise_scale)
    assert pipe.guidance_scale == 4.0
    # From the first step's latents on, it is sampling at the new scale.
    expected = sample(pipe, output_type="latent", guidance_scale=3.0, callback_on_step_end=put_back)
    assert torch.equal(got, expected)
