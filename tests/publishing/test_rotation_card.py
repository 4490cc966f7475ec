"""What the card of a rotation swap tells, and that its code runs."""

import os

import rotation_pipelines
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from helpers import tiny_vae
from hub_client import RECORD, blocks_of

from diffusers_mp import save_rotation_adapter, swap_adaln_for_rotation
from diffusers_mp.publishing.rotation_card import write_rotation_card


def test_code_of_a_rotation_card_loads_a_variant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=3
    )
    swap_adaln_for_rotation(model)
    DiTPipeline(model, tiny_vae(), DDIMScheduler()).save_pretrained("folder", variant="fp16")
    (block,) = blocks_of(str(write_rotation_card("folder")))
    names = {}
    exec(block, names)
    loaded = names["pipe"].transformer
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_the_card_of_an_adapter_is_that_of_its_class(tmp_path):
    rotation_pipelines.make_pipeline("SD3", lambda transformer: None).save_pretrained(tmp_path / "base")
    transformer = rotation_pipelines.make_pipeline("SD3", swap_adaln_for_rotation).transformer
    save_rotation_adapter(transformer, tmp_path / "adapter", base_model_name_or_path="owner/base")
    card = write_rotation_card(tmp_path / "adapter", base_model="owner/base")
    text = str(card)
    assert "# SD3Transformer2DModel with rotation modulation" in text
    assert "Adapter for [owner/base](https://huggingface.co/owner/base), `SD3Transformer2DModel`, whose" in text
    assert "DiT" not in text
    assert "class-conditional" not in card.data.tags
    (block,) = blocks_of(text)
    block = block.replace('"owner/base"', "base, **absent").replace('"folder"', "adapter")
    names = {"base": tmp_path / "base", "adapter": tmp_path / "adapter", "absent": rotation_pipelines.absent("SD3")}
    exec(block, names)
    assert type(names["pipe"].transformer) is type(transformer)


def test_the_card_of_a_control_says_that_nothing_was_swapped(swapped, tmp_path):
    for path in (swapped.base / "stock").rglob("*"):
        if path.is_file():
            link = tmp_path / path.relative_to(swapped.base / "stock")
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
    card = write_rotation_card(tmp_path, base_model="owner/dit", record=RECORD).content
    assert "fine-tuned, without a swap" in card
    assert "rotation-modulation" not in card
    assert "## Swap" not in card
    assert "https://huggingface.co/owner/dit" in card
