"""docs/layers_in_your_model.md: the page does what it says, and a stock model with our modulation stays one."""

import re

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from helpers import ROOT
from safetensors.torch import load_file, save_file


PAGE = ROOT / "docs" / "layers_in_your_model.md"
INPUTS = {
    "hidden_states": torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(1)),
    "encoder_hidden_states": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(2)),
    "pooled_projections": torch.randn(1, 32, generator=torch.Generator().manual_seed(3)),
    "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(16, 3),
    "txt_ids": torch.zeros(8, 3),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def page():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    namespace = {}
    exec("\n".join(blocks), namespace)
    return namespace


@pytest.fixture
def flux(page):
    """The page's Flux with open gains."""
    torch.manual_seed(0)
    model = page["FluxTransformer2DModel"].from_config(page["flux"].config).eval()
    for block in model.single_transformer_blocks:
        block.norm = page["RotationNorm"](model.inner_dim).eval()
        for modulation in (block.norm.scale, block.norm.rotate):
            torch.nn.init.constant_(modulation.gain, 0.5)
    return model


@torch.no_grad()
def forward(model):
    return model(**INPUTS).sample


def test_the_vision_transformer_learns_at_magnitude_1(page):
    assert page["accuracy"] > 0.7
    assert all(0.7 < magnitude < 1.1 for magnitude in page["at_start"])
    # Equal summands add up to (0.7 + 0.3) / sqrt(0.7² + 0.3²); what a branch can put out is bounded as well.
    largest = 1 / (0.7**2 + 0.3**2) ** 0.5
    bounds = [largest ** (2 * number + 2) for number in range(4)]
    trained = page["magnitudes"](page["model"])
    assert all(0.5 < magnitude < bound for magnitude, bound in zip(trained, bounds, strict=True))
    rows = [module.weight.norm(dim=-1) for module in page["model"].modules() if type(module).__name__ == "MPLinear"]
    assert all((norms - 1).abs().max() < 1e-5 for norms in rows)


def test_modulation_in_a_stock_model_acts_and_compiles(flux):
    expected = forward(flux)
    for block in flux.single_transformer_blocks:
        torch.nn.init.zeros_(block.norm.rotate.gain)
    assert (forward(flux) - expected).abs().max() > 1e-3
    for block in flux.single_transformer_blocks:
        torch.nn.init.constant_(block.norm.rotate.gain, 0.5)
    torch.compiler.reset()
    compiled = torch.compile(flux, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(compiled), expected, rtol=1e-4, atol=1e-5)


def test_modulation_in_a_stock_model_is_saved(flux, page, tmp_path):
    expected = forward(flux)
    save_file(flux.state_dict(), tmp_path / "flux.safetensors")
    other = page["FluxTransformer2DModel"].from_config(flux.config).eval()
    for block in other.single_transformer_blocks:
        block.norm = page["RotationNorm"](other.inner_dim).eval()
    other.load_state_dict(load_file(tmp_path / "flux.safetensors"))
    assert torch.equal(forward(other), expected)


def leaf_offload(model, folder):
    model.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


def block_offload(model, folder):
    model.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def accelerate_offload(model, folder):
    cpu_offload(model, execution_device=CPU)


def device_map(model, folder):
    places = infer_auto_device_map(
        model, max_memory={"cpu": "200KB", "disk": "1GB"}, no_split_module_classes=model._no_split_modules
    )
    assert set(places.values()) == {"cpu", "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("offload", [leaf_offload, block_offload, accelerate_offload, device_map])
def test_modulation_in_a_stock_model_is_offloaded(flux, offload, tmp_path):
    expected = forward(flux)
    offload(flux, tmp_path)
    assert torch.equal(forward(flux), expected)
