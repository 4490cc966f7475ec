"""Swapped models are saved, loaded, copied and hooked as models of diffusers."""

import copy
import json
import pickle

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from diffusers import AutoModel
from helpers import ROOT, relative_error
from processes import run_python
from rotation_pipelines import PIPELINES, make_pipeline, sample
from swapped_transformers import CLASSES, swapped, turn_
from tiny_transformers import CASES, cast, make, run

import diffusers_mp
from diffusers_mp import swap_adaln_for_rotation, unswap_rotation
from diffusers_mp.rotation_swap.linear import rotation_linears
from diffusers_mp.rotation_swap.sites import find_sites


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
