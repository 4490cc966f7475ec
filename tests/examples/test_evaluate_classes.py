"""Which classes an evaluation draws: by names, as often as in the reference, which need not have any."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from evaluation_runs import NUM_PHOTOS, evaluate, make_pipeline
from helpers import tiny_vae
from PIL import Image

from diffusers_mp.evaluation import cells


pytestmark = pytest.mark.usefixtures("examples_run_here")


def test_numbers_on_the_command_line_are_names_first(arguments, tmp_path, capsys):
    names = sorted(map(str, range(12)))  # as class folders are sorted as texts
    make_pipeline(tiny_vae(), num_classes=12, names=names).save_pretrained(tmp_path / "numbers")
    call = [*arguments, "--pretrained_model_name_or_path", tmp_path / "numbers", "--class_labels", 2, 10, 9]
    results = evaluate(call)
    assert results["settings"]["classes"]["counts"] == {"2": 4, "10": 4, "9": 4}
    assert "Classes, in turn: 2 (id 4) 4, 10 (id 2) 4, 9 (id 11) 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"must be ids in \[0, 11\] or names, got 12"):
        evaluate(arguments, "--pretrained_model_name_or_path", tmp_path / "numbers", "--class_labels", 12)


def tones(rng, class_ids):
    """Images of a class that is nearly black, and of one that is nearly white."""
    noise = torch.from_numpy(rng.integers(0, 20, (len(class_ids), 3, 16, 16), dtype=np.uint8))
    return noise + torch.tensor([0 if id_ == 0 else 235 for id_ in class_ids], dtype=torch.uint8).view(-1, 1, 1, 1)


def test_classes_come_as_often_as_in_the_reference(arguments, dinov2, tmp_path, monkeypatch, capsys):
    source = "def blocks(images):\n    return images.float().unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(1)\n"
    (tmp_path / "blocks_features.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(0)
    for name, count, id_ in (("dark", 270, 0), ("light", 30, 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k, image in enumerate(tones(rng, [id_] * count)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "data" / name / f"{k}.png")
    shape = {"in_channels": 3, "out_channels": 3, "sample_size": 16}
    make_pipeline(num_classes=2, names=("dark", "light"), **shape).save_pretrained(tmp_path / "tones")

    # As a sampler would be that has learned each class perfectly.
    def sample(pipe, indices, *, seed, class_ids, **options):
        return tones(np.random.default_rng([seed, *indices]), [class_ids[index % len(class_ids)] for index in indices])

    monkeypatch.setattr(cells, "generate_images", sample)
    call = [
        *arguments,
        "--pretrained_model_name_or_path",
        tmp_path / "tones",
        "--extractors",
        "blocks_features:blocks",
    ]
    call += ["--reference_dir", tmp_path / "data", "--num_samples", 300]

    def measured(name, *more):
        results = evaluate([*call, *more], "--output_dir", tmp_path / name)
        return results, results["best"]["metrics"][0]["frechet_distance"]

    results, proportional = measured("proportional")
    assert results["settings"]["classes"] == {
        "drawn": "in the reference's proportion",
        "counts": {"dark": 270, "light": 30},
    }
    assert results["settings"]["references"][0]["class_counts"] == {"dark": 270, "light": 30}
    assert results["warnings"] == []
    assert "Classes, in the reference's proportion: dark (id 0) 270, light (id 1) 30" in capsys.readouterr().out
    results, in_turn = measured("in turn", "--label_column", "none")
    assert results["settings"]["classes"]["counts"] == {"dark": 150, "light": 150}
    assert "classes come in turn" in results["warnings"][0]
    # 0.4 of the images are of another class, a distance of 235 in each of 12 features.
    assert in_turn > (0.4 * 235) ** 2 * 12
    assert proportional < in_turn / 10_000
    # Statistics keep the counts; they are of the images that were drawn.
    (path,) = (tmp_path / "proportional" / "reference").iterdir()
    start = call.index("--reference_dir", call.index("--reference_dir") + 1)
    kept = [*call[:start], *call[start + 2 :], "--reference_statistics", path]
    del kept[kept.index("--reference_dir") : kept.index("--reference_dir") + 2]
    again = evaluate(kept, "--output_dir", tmp_path / "kept")
    assert (
        again["best"]["images_sha256"]
        == json.loads((tmp_path / "proportional" / "results.json").read_text())["best"]["images_sha256"]
    )
    results, _ = measured("few", "--max_reference_images", 50)
    assert sum(results["settings"]["references"][0]["class_counts"].values()) == 50
    assert results["settings"]["classes"]["counts"]["dark"] > 240


def test_the_reference_needs_no_labels(arguments, photos, tmp_path, capsys):
    # Folders of unequal depth are no classes: training refuses them.
    (tmp_path / "deep" / "b" / "c").mkdir(parents=True)
    for number, photo in enumerate(sorted(photos.iterdir())):
        shutil.copy(photo, tmp_path / "deep" / ("b" if number < 12 else "b/c"))
    # Labels that tell nothing, as those of ImageNet's test split.
    images = [{"path": path.name, "bytes": path.read_bytes()} for path in sorted(photos.iterdir())]
    rows = datasets.Dataset.from_dict({"image": images, "label": [-1] * NUM_PHOTOS})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "table" / "data.parquet")
    expected = evaluate(arguments)["best"]["metrics"]
    for place, source in (("deep", "--reference_dir"), ("table", "--dataset_name")):
        start = arguments.index("--reference_dir")
        call = [*arguments[:start], *arguments[start + 2 :], source, tmp_path / place]
        assert evaluate(call, "--output_dir", tmp_path / f"by-{place}")["best"]["metrics"] == expected
        printed = capsys.readouterr().out
        assert f"Reference: {tmp_path / place}: {NUM_PHOTOS} images" in printed
        assert "warning: taken without classes: " in printed
