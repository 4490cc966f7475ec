"""Which files of a folder are published: all that belong, no others, and none of a folder that is not complete."""

import json
import os
import shutil

import pytest
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.guiders import ClassifierFreeGuidance
from helpers import tiny_model, tiny_vae
from hub_client import DIT_OPTIONS, TOKEN, rewrite

from diffusers_mp import MPDiTPipeline, swap_adaln_for_rotation
from diffusers_mp.publishing import hub
from diffusers_mp.publishing.hub import HubError


def test_incomplete_folders_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        hub.files_to_publish(tmp_path)
    (run / "README.md").unlink()
    with pytest.raises(ValueError, match="`write_model_card` makes one"):
        hub.publish(run, "user/name", token=TOKEN)
    (run / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks vae/diffusion_pytorch_model\*.safetensors"):
        hub.files_to_publish(run)
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (run / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks vae/diffusion_pytorch_model-00001-of-00001.safetensors"):
        hub.files_to_publish(run)
    assert issubclass(HubError, RuntimeError)


@pytest.mark.parametrize("name", ["guidance_transformer", "guider"])
def test_parts_that_guide_are_published(name, tmp_path):
    part = ClassifierFreeGuidance(guidance_scale=2.0) if name == "guider" else tiny_model(num_layers=1).eval()
    pipe = MPDiTPipeline(tiny_model().eval(), DDIMScheduler(clip_sample=False), tiny_vae(), **{name: part})
    pipe.save_pretrained(tmp_path / "run")
    for path in hub.files_to_publish(tmp_path / "run"):
        (tmp_path / "published" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "run" / path, tmp_path / "published" / path)
    loaded = MPDiTPipeline.from_pretrained(tmp_path / "published").components[name]
    assert type(loaded) is type(part)
    shutil.rmtree(tmp_path / "run" / name)
    with pytest.raises(ValueError, match=f"lacks {name}/"):
        hub.files_to_publish(tmp_path / "run")


def test_shards_of_a_variant_are_published_with_their_index(tmp_path):
    pipe = MPDiTPipeline(tiny_model().eval(), DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    (index,) = (tmp_path / "transformer").glob("*.index*.json")
    assert f"transformer/{index.name}" in hub.files_to_publish(tmp_path)
    shard = next((tmp_path / "transformer").glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks transformer/{shard.name}"):
        hub.files_to_publish(tmp_path)


def test_a_pipeline_with_other_parts_is_refused(tmp_path):
    MPDiTPipeline(tiny_model().eval(), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must hold a pipeline of transformer, .* has text_encoder as well"):
        hub.files_to_publish(tmp_path)


def test_a_pipeline_that_does_not_name_its_swapped_class_is_refused(tmp_path):
    transformer = DiTTransformer2DModel(**DIT_OPTIONS, out_channels=8, num_embeds_ada_norm=3)
    pipe = DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False))
    swap_adaln_for_rotation(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DiTTransformer2DModel as the transformer .* RotationDiTTransformer2DModel"):
        hub.files_to_publish(tmp_path)
    pipe.transformer = pipe.transformer  # as the message says
    pipe.save_pretrained(tmp_path)
    assert "transformer/config.json" in hub.files_to_publish(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    assert type(again.transformer).__name__ == "RotationDiTTransformer2DModel"


def test_the_id_of_a_base_on_the_hub_is_kept(swapped, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.link(swapped.base / "adapter" / name, tmp_path / name)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    rewrite(tmp_path / "adapter_config.json", json.dumps({**config, "base_model_name_or_path": "owner/dit"}))
    names = hub.files_to_publish(tmp_path)
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert hub._content(tmp_path, "adapter_config.json", names) == tmp_path / "adapter_config.json"


def test_incomplete_or_ambiguous_adapters_are_refused(swapped, tmp_path):
    os.link(swapped.base / "adapter" / "adapter_config.json", tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match=r"must hold a complete adapter, .* lacks adapter_model.safetensors"):
        hub.files_to_publish(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a pipeline or an adapter, .* holds both"):
        hub.files_to_publish(tmp_path)
