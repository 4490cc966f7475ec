"""The model saved and loaded: bits, files, fresh processes, copies."""

import copy
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import forward, row_norms, tiny_inputs, tiny_model
from processes import run_python
from safetensors.torch import load_file, save_file

import diffusers_mp
from diffusers_mp import MPDiTTransformer2DModel


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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 1}, r"\(unexpected \d+, such as transformer_blocks.1.attn.to_k.weight\): one of the two"),
        ({"num_layers": 3}, r"\(missing \d+, such as transformer_blocks.2.attn.to_k.weight\)"),
        ({"num_classes": None}, r"\(unexpected 1, such as conditioning_embedder.class_embedder.weight\)"),
        ({"num_classes": 5}, r"class_embedder.weight expected shape torch.Size\(\[6, 32\]\)"),
    ],
)
def test_weights_of_another_config_are_refused(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        MPDiTTransformer2DModel.from_pretrained(tmp_path)
    if change != {"num_classes": 5}:  # who asks what was loaded is told, as by diffusers
        _, info = MPDiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] or info["unexpected_keys"]
