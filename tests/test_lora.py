"""LoRA through the pipeline, as other pipelines of diffusers have it."""

import pytest
import torch
from guided_sampling import pipeline, sample
from helpers import tiny_model
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_mp import MPDiTPipeline


MAPS = ["to_q", "to_v", "linear_1", "attn_modulation.proj"]


def fresh(configuration="E"):
    return pipeline(tiny_model(configuration).eval())


def save_lora(folder, configuration="E", seed=4, **options):
    """A LoRA that changes much, saved through the pipeline; and what is sampled with it."""
    pipe = fresh(configuration)
    torch.manual_seed(seed)
    pipe.transformer.add_adapter(
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": MAPS, "init_lora_weights": False, **options})
    )
    MPDiTPipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    return sample(pipe)


@pytest.mark.parametrize("configuration", "CEF")
def test_saved_loaded_and_unloaded(configuration, tmp_path):
    expected, pipe = save_lora(tmp_path, configuration), fresh(configuration)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    plain = sample(pipe)
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max()
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(sample(pipe), expected, rtol=1e-5, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_two_adapters_and_their_weights(tmp_path):
    pipe, plain = fresh(), sample(fresh())
    alone = {name: save_lora(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"), 4)}
    for name in alone:
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    assert pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    for name, expected in alone.items():
        pipe.set_adapters(name)
        torch.testing.assert_close(sample(pipe), expected, rtol=1e-5, atol=1e-5)
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    torch.testing.assert_close(sample(pipe), alone["first"], rtol=1e-5, atol=1e-5)
    pipe.set_adapters(["first", "second"], [0.5, -0.3])
    both = sample(pipe)
    # The weights multiply what each adds to a map.
    merged = fresh()
    layers = {name: layer for name, layer in pipe.transformer.named_modules() if hasattr(layer, "lora_A")}
    with torch.no_grad():
        for name, layer in layers.items():
            for adapter, weight in (("first", 0.5), ("second", -0.3)):
                change = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
                merged.transformer.get_submodule(name).weight.add_(2 * weight * change)
    torch.testing.assert_close(both, sample(merged), rtol=1e-3, atol=1e-3)
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe), both, rtol=1e-3, atol=1e-3)
    assert pipe.num_fused_loras == 2
    pipe.unfuse_lora()
    pipe.disable_lora()
    torch.testing.assert_close(sample(pipe), plain, rtol=1e-4, atol=1e-4)
    pipe.enable_lora()
    pipe.delete_adapters("second")
    pipe.set_adapters("first")
    torch.testing.assert_close(sample(pipe), alone["first"], rtol=1e-3, atol=1e-3)


def test_free_rows_are_guarded_here_too(tmp_path):
    save_lora(tmp_path / "plain", "C")
    save_lora(tmp_path / "pissa", init_lora_weights="pissa")
    pipe = fresh("C")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match="`init_lora_weights` must leave the weights .* got 'pissa'"):
        pipe.load_lora_weights(tmp_path / "pissa")
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())
    pipe.load_lora_weights(tmp_path / "plain")
    with pytest.raises(ValueError, match="`fuse_lora` and PEFT's merges need rows that are used as they are stored"):
        pipe.fuse_lora()


A, B = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "lora_B"


@pytest.mark.parametrize(
    "weights, message",
    [
        (
            {A.replace("to_q", "add_q_proj"): (4, 32)},
            r"got '.*add_q_proj.lora_A.weight' .* where it has no such layer",
        ),
        ({A: (4, 48)}, r"shape \(4, 48\), where it has one with a weight of shape \(32, 32\)"),
        ({A: (4, 32), A.replace("lora_A", B): (96, 4)}, r"lora_B.weight' of shape \(96, 4\), where it has one"),
        ({A.replace("transformer.t", "unet.t"): (4, 32)}, "must begin with 'transformer.', .* got 'unet"),
        ({A.removeprefix("transformer."): (4, 32)}, r"`pipe.transformer.load_lora_adapter\(..., prefix=None\)`"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 32)}, "must begin with 'transformer.'"),
    ],
)
def test_a_lora_of_another_model_is_refused(weights, message):
    pipe = fresh()
    before = sample(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights({name: torch.randn(shape) for name, shape in weights.items()})
    assert not hasattr(pipe.transformer, "peft_config")
    assert torch.equal(sample(pipe), before)


@pytest.mark.parametrize("given", [{"weight_name": "lora.bin"}, {"use_safetensors": False}], ids=str)
def test_it_is_read_from_safetensors_only(given, tmp_path):
    save_lora(tmp_path)
    with pytest.raises(ValueError, match="a LoRA is read from safetensors only"):
        fresh().load_lora_weights(tmp_path, **given)


def test_only_the_transformer_has_it_and_not_the_weaker_model(tmp_path):
    expected, weak = save_lora(tmp_path), tiny_model(num_layers=1, seed=7).eval()
    pipe = pipeline(tiny_model().eval(), guidance_transformer=weak)
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert not any("lora" in name for name, _ in weak.named_modules())
    reference = pipeline(tiny_model().eval())
    reference.load_lora_weights(tmp_path)
    torch.testing.assert_close(sample(pipe, guidance_scale=1.0), sample(reference, guidance_scale=1.0))
    assert expected.isfinite().all()


def test_a_compiled_transformer_takes_it(tmp_path):
    save_lora(tmp_path)
    pipe = fresh()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.load_lora_weights(tmp_path)
    assert any("lora_A" in name for name, _ in pipe.transformer.named_parameters())
