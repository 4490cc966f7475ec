"""What a user of diffusers does with a transformer, done with this one; after diffusers' own model tests."""

import os
import shutil
import textwrap

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from helpers import row_norms, tiny_inputs, tiny_model
from peft import LoraConfig
from peft.tuners.lora.config import KasaConfig
from processes import run_processes
from torch import nn

from diffusers_mp import MPDiTTransformer2DModel, layers
from diffusers_mp.blocks import MPDiTAttention


CPU = torch.device("cpu")
ALL_MAPS = ["to_q", "to_k", "to_v", "to_out.0", "proj", "linear_1", "linear_2"]


@torch.no_grad()
def forward(model, **inputs):
    return model(**(inputs or tiny_inputs())).sample


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Fused query, key and value maps


@pytest.mark.parametrize("configuration", "ABCDEF")
def test_fused_attention_maps_and_back(configuration):
    model = tiny_model(configuration).eval()
    expected, before = forward(model), weights_of(model)
    model.fuse_qkv_projections()
    model.fuse_qkv_projections()
    maps = [module.to_qkv for module in model.modules() if isinstance(module, MPDiTAttention)]
    assert len(maps) == 2
    assert all(isinstance(layer, nn.Linear) and layer.weight.shape == (96, 32) for layer in maps)
    assert all(isinstance(layer, layers.MPLinear) == (configuration in "CDEF") for layer in maps)
    torch.testing.assert_close(forward(model), expected, rtol=0, atol=1e-5)
    # It is the fused map that computes.
    with torch.no_grad():
        maps[0].weight.mul_(2)
    assert (forward(model) - expected).abs().max() > 1e-3 or configuration == "C"
    model.unfuse_qkv_projections()
    assert torch.equal(forward(model), expected)
    assert model.state_dict().keys() == before.keys()
    model.train()


def test_fused_attention_maps_are_for_inference():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"`fuse_qkv_projections` is for inference: call `model.eval\(\)` first"):
        model.train().fuse_qkv_projections()
    model.eval().fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"call `unfuse_qkv_projections\(\)` first"):
        model.train()
    assert not model.training
    model.unfuse_qkv_projections()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="needs plain query, key and value maps, without LoRA"):
        model.fuse_qkv_projections()


def test_a_lora_in_maps_that_are_fused_is_not_passed_over():
    model = tiny_model().eval()
    model.fuse_qkv_projections()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"already: call `unfuse_qkv_projections\(\)` first"):
        forward(model)
    model.unfuse_qkv_projections()
    assert not torch.equal(forward(model), forward(tiny_model().eval()))


@pytest.mark.parametrize("kind", ["cast", "offloaded by group", "offloaded in sequence"])
def test_maps_are_fused_before_they_are_cast_or_offloaded(kind):
    def attach(model):
        if kind == "cast":
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        elif kind == "offloaded by group":
            model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
        else:
            cpu_offload(model, torch.device("cpu"))

    model, late = tiny_model().eval(), tiny_model().eval()
    attach(late)
    with pytest.raises(ValueError, match="maps that are neither offloaded nor cast by layer, got some that are: fuse"):
        late.fuse_qkv_projections()
    if kind == "offloaded in sequence":
        return  # Accelerate offloads what is in the state dict, where fused maps are not.
    model.fuse_qkv_projections()
    attach(model)
    torch.testing.assert_close(forward(model), forward(late), rtol=1e-5, atol=1e-5)


def test_fused_attention_maps_are_not_saved(tmp_path):
    model = tiny_model().eval()
    expected = forward(model)
    model.fuse_qkv_projections()
    model.save_pretrained(tmp_path)
    assert torch.equal(forward(MPDiTTransformer2DModel.from_pretrained(tmp_path)), expected)
    assert not any("to_qkv" in name for name in model.state_dict())


# LoRA through PEFT


def with_lora(configuration="E", **options):
    model = tiny_model(configuration).eval()
    torch.manual_seed(4)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=ALL_MAPS, init_lora_weights=False, **options))
    return model


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "OLoRA"])
def test_a_lora_that_takes_part_of_the_weights_computes_what_the_model_did(kind):
    """The rows that it leaves are frozen, and so in effect as they are, in training too."""
    model = tiny_model().eval()
    expected = forward(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=kind))
    for mode in (False, True):
        torch.testing.assert_close(forward(model.train(mode)), expected, rtol=0, atol=1e-5)
    assert (row_norms(model.transformer_blocks[0].attn.to_q.base_layer.weight) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"kasa_config": KasaConfig()}])
def test_where_rows_are_normalised_on_use_it_is_refused(options):
    model = tiny_model("C").eval()
    before = weights_of(model)
    with pytest.raises(ValueError, match="`init_lora_weights` must leave the weights .* got '(pissa|kasa_config)'"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], **options))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tiny_model("A").add_adapter(LoraConfig(r=2, target_modules=["to_q"], **options))


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but:UserWarning")
@pytest.mark.parametrize("kind", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_other_loras_leave_the_weights_as_they_are(kind):
    model = tiny_model().eval()
    before = weights_of(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=kind))
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("configuration", "ABDE")
def test_a_merged_lora_computes_what_the_unmerged_one_does(configuration):
    # Also where a gain follows: in the modulations and the output.
    model = with_lora(configuration)
    unmerged, plain = forward(model), forward(tiny_model(configuration).eval())
    scale = unmerged.abs().max()
    assert (unmerged - plain).abs().max() > 0.1 * scale
    model.fuse_lora()
    assert (forward(model) - unmerged).abs().max() <= 1e-5 * scale
    assert (forward(model.train()) - unmerged).abs().max() <= 1e-5 * scale
    model.unfuse_lora()
    assert (forward(model) - unmerged).abs().max() <= 1e-5 * scale
    model.train()
    model.eval()
    model.unload_lora()
    torch.testing.assert_close(forward(model), plain, rtol=0, atol=1e-4)


def test_merging_is_refused_where_it_would_be_another_function():
    model = with_lora("C")
    with pytest.raises(ValueError, match="`fuse_lora` and PEFT's merges need rows that are used as they are stored"):
        model.fuse_lora()


def test_a_lora_is_saved_and_loaded(tmp_path):
    model = with_lora()
    expected = forward(model)
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert (forward(model) - expected).abs().max() > 0.1
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(forward(model), expected, rtol=1e-5, atol=1e-5)


def test_training_a_lora_leaves_the_rows_alone():
    model = with_lora()
    model.requires_grad_(False)
    model.enable_adapters()
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    model.train()
    before = weights_of(model)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    model(**tiny_inputs()).sample.square().mean().backward()
    optimizer.step()
    model.eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) is ("lora_" not in name), name


# Precision and memory


@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_layerwise_casting_keeps_gains_exact(configuration):
    model = tiny_model(configuration).eval()
    expected, before = forward(model), weights_of(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert stored["transformer_blocks.0.attn.to_q.weight"] == torch.float8_e4m3fn
    exact = [name for name, dtype in stored.items() if dtype == torch.float32]
    assert {name for name in stored if name.endswith("gain")} <= set(exact)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in exact)
    error = (forward(model) - expected).norm() / expected.norm()
    # 3 bits of mantissa: 2^-4 of a weight at most, averaged over the maps of a block.
    assert 1e-4 < error < 0.15


def group_offload(model, folder):
    model.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def leaf_offload(model, folder):
    model.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


def disk_group_offload(model, folder):
    model.enable_group_offload(onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def accelerate_offload(model, folder):
    cpu_offload(model, execution_device=CPU)


def dispatch_to_disk(model, folder):
    sizes = {"cpu": "150KB", "disk": "1GB"}
    device_map = infer_auto_device_map(model, max_memory=sizes, no_split_module_classes=model._no_split_modules)
    assert set(device_map.values()) == {"cpu", "disk"}, "the model must be in two places"
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize(
    "offload", [group_offload, leaf_offload, disk_group_offload, accelerate_offload, dispatch_to_disk]
)
@pytest.mark.parametrize("configuration", ["A", "E"])
def test_offloading_changes_nothing(offload, configuration, tmp_path):
    model = tiny_model(configuration, pooled_projection_dim=6).eval()
    inputs = {**tiny_inputs(), "pooled_projections": torch.randn(3, 6)}
    expected = forward(model, **inputs)
    offload(model, tmp_path)
    assert torch.equal(forward(model, **inputs), expected)


def test_device_map_auto(tmp_path):
    model = tiny_model().eval()
    expected = forward(model)
    model.save_pretrained(tmp_path)
    placed = MPDiTTransformer2DModel.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GB"})
    assert torch.equal(forward(placed), expected)


# Saving


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants(tmp_path, variant):
    model = tiny_model().eval()
    expected = forward(model)
    model.save_pretrained(tmp_path, max_shard_size="30KB", variant=variant)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert all((variant or "") in path.name for path in shards)
    for parallel in ("0", "1"):
        os.environ["HF_ENABLE_PARALLEL_LOADING"] = parallel
        try:
            loaded = MPDiTTransformer2DModel.from_pretrained(tmp_path, variant=variant)
        finally:
            del os.environ["HF_ENABLE_PARALLEL_LOADING"]
        assert torch.equal(forward(loaded), expected)


@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_a_single_file(configuration, tmp_path):
    model = tiny_model(configuration).eval()
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "weights.safetensors"
    shutil.move(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors", file)
    options = {"config": tmp_path / "pipeline", "subfolder": "transformer"}
    loaded = MPDiTTransformer2DModel.from_single_file(file, **options)
    assert not loaded.training
    assert torch.equal(forward(loaded), forward(model))
    half = MPDiTTransformer2DModel.from_single_file(file, dtype=torch.bfloat16, **options)
    assert half.dtype == torch.bfloat16
    half = MPDiTTransformer2DModel.from_single_file(file, torch_dtype=torch.bfloat16, **options)
    assert half.dtype == torch.bfloat16
    other = tiny_model(configuration, num_layers=1).eval()
    other.save_config(tmp_path / "other")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"transformer_blocks.1"):
        MPDiTTransformer2DModel.from_single_file(file, config=tmp_path / "other")


# Attention


@pytest.fixture
def keep_active_backend():
    # `set_attention_backend` changes that of all models to come as well.
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.usefixtures("keep_active_backend")
def test_attention_backends():
    model = tiny_model().eval()
    expected = forward(model)
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        assert all(processor._attention_backend == backend for processor in model.attn_processors.values())
        by_setting = forward(model)
        model.reset_attention_backend()
        with attention_backend(backend):
            by_context = forward(model)
        assert torch.equal(by_setting, by_context)
        torch.testing.assert_close(by_setting, expected, rtol=1e-4, atol=1e-5)


CONTEXT_PARALLEL = """
import os, sys, torch, warnings
import torch.distributed as dist
from diffusers import ContextParallelConfig
from helpers import row_norms, tiny_inputs, tiny_model

# A GPU's number is what diffusers asks for; a CPU has none.
torch.accelerator.device_count = lambda: 1
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
inputs = tiny_inputs(batch_size=2)
seen = []
with torch.no_grad():
    expected = tiny_model().eval()(**inputs).sample
    model = tiny_model().eval()
    model.transformer_blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape))
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    got = model(**inputs).sample
# Each process has half of the 16 tokens.
assert seen == [(2, 8, 32)], seen
torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
print("done", flush=True)
dist.barrier()
os._exit(0)
"""


def test_context_parallelism(tmp_path):
    # Ulysses; ring attention needs kernels for GPUs.
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(CONTEXT_PARALLEL))
    assert run_processes(script).count("done") == 2


# Compilation


def test_regional_compilation():
    model = tiny_model().eval()
    expected = forward(model)
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(model), expected)


# That no size is compiled anew is also in test_diffusers_testers.py, without AOTAutograd's symbols, which take long.
@pytest.mark.slow
def test_one_graph_for_several_sizes():
    model = tiny_model().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (8, 12, 16):
        inputs = {**tiny_inputs(), "hidden_states": torch.randn(3, 4, size, size)}
        torch.testing.assert_close(forward(compiled, **inputs), forward(model, **inputs), rtol=1e-4, atol=1e-5)


def test_export():
    model = tiny_model().eval()
    inputs = tiny_inputs()
    program = torch.export.export(model, args=(), kwargs=inputs)
    torch.testing.assert_close(program.module()(**inputs).sample, forward(model, **inputs))
