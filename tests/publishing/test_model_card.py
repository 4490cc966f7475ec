import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import random_image, tiny_vae
from hub_client import TOKEN, blocks_of, make_pipeline, rewrite
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_mp.publishing import hub
from diffusers_mp.publishing.hub import files_to_publish
from diffusers_mp.publishing.model_card import write_model_card


def test_card_tells_the_facts_of_the_run(made):
    card, text = ModelCard.load(made.folder / "README.md"), (made.folder / "README.md").read_text()
    assert card.data.library_name == "diffusers"
    assert card.data.license == "mit"
    assert {"diffusers", "diffusers-mp", "class-conditional", "arxiv:2505.19122"} <= set(card.data.tags)
    assert card.data.datasets is None
    assert f"{made.pipe.transformer.num_parameters():,} parameters (without the VAE)" in text
    assert f"factor 4, {made.pipe.vae.num_parameters():,} parameters" in text
    for fact in (
        "| updates | 100 |",
        "| images seen | 1,600 |",
        # 16 images in an update: 50 updates at 40 images per second, 50 at 80.
        "| seconds in updates | 30 |",
        "| trained on | 2 CPU cores |",
        "| learning_rate | 0.01 |",
        "| validation loss at update 100 | 0.01 |",
        "| modulation | \\['scale', 'rotate', 'gate'\\] |",
        "- images: 1,234",
        "- resolution: 32 pixels",
        "- classes: 3 (cat, dog, a \\| b)",
        "Licence of the weights\n\nmit",
        "arXiv preprint arXiv:2505.19122",
        "Bill, Eric Tillman and Perez Jensen, Cristian and Anagnostidis, Sotiris",
        "![samples](sample_grid.png)",
        "![training curve](training_curve.png)",
        'MPDiTPipeline.from_pretrained("user/name")',
        "50 steps, guidance scale as the pipeline has it, not selected",
    ):
        assert fact in text, fact


def test_curve_rows_are_means_of_the_log(made):
    rows = re.findall(r"^\| (\d+) \| ([\d.e-]+) \| ([\d.e-]*) ?\|$", (made.folder / "README.md").read_text(), re.M)
    assert [int(row[0]) for row in rows] == list(range(10, 101, 10))
    for update, loss, validation in rows:
        update = int(update)
        assert float(loss) == pytest.approx((10 / (update - 5) + 10 / update) / 2, rel=1e-4)
        assert validation == ({50: "0.02", 100: "0.01"}.get(update, ""))


def test_card_and_images_tell_nothing_private(made):
    text = (made.folder / "README.md").read_text()
    assert "home of the author" not in text
    assert str(made.base) not in text
    for name in ("sample_grid.png", "training_curve.png"):
        assert b"private" not in (made.folder / name).read_bytes()
    with Image.open(made.folder / "sample_grid.png") as grid:
        # The last by number, not by name.
        assert grid.tobytes() == made.image.tobytes()


def test_files_among_the_samples_that_the_trainer_did_not_make_are_ignored(made, run):
    for name in ("step-best.png", "step-0000100 (copy).png", "step-.png", "notes.txt"):
        (run / "samples" / name).write_text("not an image")
    write_model_card(run)
    with Image.open(run / "sample_grid.png") as grid:
        assert grid.tobytes() == made.image.tobytes()


def test_card_without_matplotlib_has_the_table_alone(run, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    (run / "README.md").unlink()
    text = str(write_model_card(run))
    assert "training_curve" not in text
    assert not (run / "training_curve.png").exists()
    assert "| update | training loss since the row above | validation loss |" in text
    assert 'MPDiTPipeline.from_pretrained("folder")' in text
    assert "None was given: ask the author" in text
    assert "| images seen | not recorded |" in text


def test_card_of_a_bare_unconditional_pipeline_of_pixels(tmp_path):
    make_pipeline(tmp_path / "run", num_classes=None)
    card = write_model_card(
        tmp_path / "run",
        "user/name",
        revision="draft",
        license="other",
        license_name="own",
        license_link="LICENSE.md",
        data="drawings | mine",
        metrics={"FID, 50 000 samples": 12.345},
    )
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "own", "LICENSE.md")
    text = str(card)
    for fact in (
        'from_pretrained("user/name", revision="draft")',
        "pipe(num_images_per_class=2",
        "None: the transformer works on pixels",
        "- source: drawings \\| mine",
        "[own](LICENSE.md)",
        "| FID, 50 000 samples | 12.345 |",
        "| updates | not recorded |",
    ):
        assert fact in text, fact
    assert not (tmp_path / "run" / "sample_grid.png").exists()
    assert files_to_publish(tmp_path / "run") == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]


def test_a_card_written_anew_keeps_the_grid(tmp_path):
    rng = np.random.default_rng(0)
    first, second = random_image(rng), random_image(rng)
    folder, grid = tmp_path / "run", tmp_path / "run" / "sample_grid.png"
    make_pipeline(folder)
    first.save(tmp_path / "grid.png")
    write_model_card(folder, sample_grid=tmp_path / "grid.png")
    assert "![samples](sample_grid.png)\n\nSamples.\n" in str(write_model_card(folder, license="mit"))
    with Image.open(grid) as kept:
        assert kept.tobytes() == first.tobytes()
    # What there is to take one from comes first.
    (folder / "samples").mkdir()
    second.save(folder / "samples" / "step-10.png")
    write_model_card(folder)
    with Image.open(grid) as taken:
        assert taken.tobytes() == second.tobytes()


def test_parameters_are_those_of_one_variant(tmp_path):
    pipe = make_pipeline(tmp_path, vae=tiny_vae())
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len([*(tmp_path / "transformer").glob("*fp16-*.safetensors")]) > 1
    text = str(write_model_card(tmp_path))
    assert f"{pipe.transformer.num_parameters():,} parameters (without the VAE)" in text
    assert f"factor 4, {pipe.vae.num_parameters():,} parameters" in text
    assert "variant" not in blocks_of(text)[0].replace("variance", "")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=str)
@pytest.mark.parametrize("in_variant", ["transformer", "vae", "transformer and vae"])
def test_code_of_a_card_loads_weights_that_are_there_in_a_variant_alone(tmp_path, monkeypatch, in_variant, shards):
    monkeypatch.chdir(tmp_path)
    pipe = make_pipeline("folder", vae=tiny_vae())
    for name in in_variant.split(" and "):
        shutil.rmtree(f"folder/{name}")
        pipe.components[name].save_pretrained(f"folder/{name}", variant="fp16", **shards)
    pipe.transformer.save_pretrained("folder/transformer_ema_0.1", variant="bf16", **shards)
    text = str(write_model_card("folder"))
    assert f"{pipe.transformer.num_parameters():,} parameters (without the VAE)" in text
    whole, average = blocks_of(text)
    assert 'from_pretrained("folder", variant="fp16")' in whole
    assert 'from_pretrained("folder", subfolder="transformer_ema_0.1", variant="bf16")' in average
    for block in (whole, average):
        names = {}
        exec(block.replace("num_inference_steps=50", "num_inference_steps=2"), names)
        for loaded, part in ((names["pipe"].transformer, pipe.transformer), (names["pipe"].vae, pipe.vae)):
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), part.parameters(), strict=True))


@pytest.mark.parametrize(
    "num_classes, kind, tags",
    [
        (None, "Vector-conditional", {"vector-conditional"}),
        (3, "Class- and vector-conditional", {"class-conditional", "vector-conditional"}),
    ],
)
def test_code_of_a_card_gives_condition_vectors(tmp_path, monkeypatch, num_classes, kind, tags):
    monkeypatch.chdir(tmp_path)
    make_pipeline("folder", num_classes=num_classes, pooled_projection_dim=6)
    card = write_model_card("folder")
    assert f"{kind} image generation" in str(card)
    assert card.data.pipeline_tag is None
    assert tags < set(card.data.tags)
    assert "unconditional-image-generation" not in card.data.tags
    names = {}
    exec(blocks_of(str(card))[0].replace("num_inference_steps=50", "num_inference_steps=2"), names)
    assert len(names["images"]) == 2


def test_card_names_data_and_vae_of_the_hub(run):
    arguments = {"dataset_name": "someone/birds", "split": "train", "vae": "someone/vae", "hub_token": TOKEN}
    rewrite(run / "training_arguments.json", json.dumps({**arguments, "preset": TOKEN}))
    for name in ("README.md", "sample_grid.png", "training_curve.png"):
        (run / name).unlink()
    card = write_model_card(run, "user/name")
    assert card.data.datasets == ["someone/birds"]
    assert "[someone/vae](../../someone/vae)" in str(card)
    assert TOKEN not in (run / "README.md").read_text()


@pytest.mark.parametrize("base, told", [("someone/mpdit", "[someone/mpdit](../../someone/mpdit)"), ("/home/me/a", "")])
def test_card_names_the_checkpoint_that_training_started_from(run, base, told):
    rewrite(run / "training_arguments.json", json.dumps({"pretrained_model_name_or_path": base}))
    (run / "README.md").unlink()
    card = write_model_card(run, "user/name")
    assert card.data.base_model == (base if told else None)
    assert f"starting from {told or 'weights of the author'}." in str(card)
    assert "home/me" not in str(card)


def test_relative_paths_of_the_author_are_told_nowhere(tmp_path, monkeypatch):
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "home")
    tiny_vae().save_pretrained("runs/vae")
    make_pipeline("run", vae=AutoencoderKL.from_pretrained("runs/vae"))
    for name in ("runs/base", "runs/photos"):
        Path(name).mkdir()
    sources = {"vae": "runs/vae", "pretrained_model_name_or_path": "runs/base", "dataset_name": "runs/photos"}
    rewrite(Path("run/training_arguments.json"), json.dumps(hub.public_arguments(sources)))
    # There, all three look like ids of the Hub.
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = tmp_path / "home" / "run"
    card = write_model_card(folder, "user/name")
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "starting from weights of the author" in str(card)
    names = files_to_publish(folder)
    for name in names:
        content = hub._content(folder, name, names)
        assert b"runs/" not in (content if isinstance(content, bytes) else content.read_bytes()), name


def test_secrets_are_in_neither_the_data_nor_the_text_of_a_card(run):
    token, link = "ghp_" + "aB3" * 12, "https://me:open@host/licence?token=abc"
    write_model_card(run, "user/name", license="other", license_name=token, license_link=link, data=f"of {token}")
    card = ModelCard.load(run / "README.md")
    assert card.data.license_name == "[removed]"
    assert card.data.license_link == "https://me:[removed]@host/licence?token=[removed]"
    assert "- source: of " in card.text
    for secret in (token, "open@", "token=abc"):
        assert secret not in str(card)


def test_files_of_the_user_beside_those_of_the_trainer_are_left_out(run):
    files = files_to_publish(run)
    for name in ("samples/step-best.png", "samples/step-1000 (copy).png", "transformer_ema_0.1.zip"):
        rewrite(run / name, "mine")
    (run / "transformer_ema_old").mkdir()
    rewrite(run / "transformer_ema_old" / "config.json", "{}")
    grid = (run / "sample_grid.png").read_bytes()
    text = str(write_model_card(run, "user/name"))
    assert files_to_publish(run) == files
    assert (run / "sample_grid.png").read_bytes() == grid
    assert "ema_old" not in text
    assert "ema_0.1.zip" not in text
    assert not hub._belongs("transformer_ema_old/config.json")  # nor deleted from a repository
    assert hub._belongs("transformer_ema_0.1/config.json")
