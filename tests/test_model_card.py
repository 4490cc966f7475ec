import json
import re
import sys

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from test_hub import TOKEN, made, make_pipeline, rewrite, run  # noqa: F401

from diffusers_mp.hub import files_to_publish
from diffusers_mp.model_card import write_model_card


def test_card_tells_the_facts_of_the_run(made):  # noqa: F811
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
        "MPDiTPipeline.from_pretrained('user/name')",
        "50 steps, guidance scale as the pipeline has it, not selected",
    ):
        assert fact in text, fact


def test_curve_rows_are_means_of_the_log(made):  # noqa: F811
    rows = re.findall(r"^\| (\d+) \| ([\d.e-]+) \| ([\d.e-]*) ?\|$", (made.folder / "README.md").read_text(), re.M)
    assert [int(row[0]) for row in rows] == list(range(10, 101, 10))
    for update, loss, validation in rows:
        update = int(update)
        assert float(loss) == pytest.approx((10 / (update - 5) + 10 / update) / 2, rel=1e-4)
        assert validation == ({50: "0.02", 100: "0.01"}.get(update, ""))


def test_card_and_pictures_tell_nothing_private(made):  # noqa: F811
    text = (made.folder / "README.md").read_text()
    assert "home of the author" not in text
    assert str(made.base) not in text
    for name in ("sample_grid.png", "training_curve.png"):
        assert b"private" not in (made.folder / name).read_bytes()
    with Image.open(made.folder / "sample_grid.png") as grid:
        # The last by number, not by name.
        assert grid.tobytes() == made.picture.tobytes()


def test_card_without_matplotlib_has_the_table_alone(run, monkeypatch):  # noqa: F811
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    (run / "README.md").unlink()
    text = str(write_model_card(run))
    assert "training_curve" not in text
    assert not (run / "training_curve.png").exists()
    assert "| update | training loss since the row above | validation loss |" in text
    assert "MPDiTPipeline.from_pretrained('folder')" in text
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
        "from_pretrained('user/name', revision='draft')",
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


def test_card_names_data_and_vae_of_the_hub(run):  # noqa: F811
    arguments = {"dataset_name": "someone/birds", "dataset_split": "train", "vae": "someone/vae", "hub_token": TOKEN}
    rewrite(run / "training_arguments.json", json.dumps({**arguments, "preset": TOKEN}))
    for name in ("README.md", "sample_grid.png", "training_curve.png"):
        (run / name).unlink()
    card = write_model_card(run, "user/name")
    assert card.data.datasets == ["someone/birds"]
    assert "[someone/vae](../../someone/vae)" in str(card)
    assert TOKEN not in (run / "README.md").read_text()
