"""The trainer on condition vectors: a column of the data, beside or instead of class labels."""

import json
import shutil

import pytest
import torch
from training_runs import metrics, train

from diffusers_mp import MPDiTPipeline
from diffusers_mp.data.latents import LatentDataset


pytestmark = pytest.mark.usefixtures("examples_run_here")


P = 3


@pytest.fixture(scope="module")
def data_with_vectors(data, tmp_path_factory):
    """The same images in one folder, described by metadata: a vector that tells dark from light."""
    folder = tmp_path_factory.mktemp("vectors")
    shutil.copytree(data / "vae", folder / "vae")
    shutil.copy(data / "model.json", folder / "model.json")
    (folder / "images").mkdir()
    rows = []
    for path in sorted((data / "images").rglob("*.png")):
        name = f"{path.parent.name}-{path.name}"
        shutil.copy(path, folder / "images" / name)
        is_light = path.parent.name == "light"
        rows.append({"file_name": name, "clip": [1.0, 0.0, 2.0] if is_light else [-1.0, 3.0, 0.0], "kind": is_light})
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_vectors_instead_of_labels(data_with_vectors, tmp_path):
    output_dir = train(data_with_vectors, tmp_path / "run", "--pooled_column", "clip", "--validation_steps", "3")
    pipe = MPDiTPipeline.from_pretrained(output_dir)
    config = pipe.transformer.config
    assert (config.pooled_projection_dim, config.num_classes, config.class_dropout_prob) == (P, None, 0.1)
    assert len(metrics(output_dir, "validation/loss")) == 2
    assert len(list((output_dir / "samples").glob("*.png"))) == 2
    pipe.set_progress_bar_config(disable=True)
    images = pipe(pooled_projections=torch.eye(P), num_inference_steps=2, guidance_scale=2.0).images
    assert len(images) == 3
    # All of the vectors were read.
    latents = LatentDataset(output_dir / "latents")
    assert {tuple(latents[index]["pooled_projections"].tolist()) for index in range(len(latents))} == {
        (1.0, 0.0, 2.0),
        (-1.0, 3.0, 0.0),
    }


def test_vectors_reach_the_model(data_with_vectors, tmp_path):
    output_dir = train(data_with_vectors, tmp_path / "run", "--pooled_column", "clip", "--learning_rate", "0.1")
    again = train(data_with_vectors, tmp_path / "again", "--pooled_column", "clip", "--learning_rate", "0.1")
    without = train(data_with_vectors, tmp_path / "without", "--learning_rate", "0.1")
    losses = [metrics(folder, "train/loss") for folder in (output_dir, again, without)]
    assert losses[0] == losses[1] != losses[2]
    weights = MPDiTPipeline.from_pretrained(output_dir).transformer.conditioning_embedder.pooled_embedder
    start = MPDiTPipeline.from_pretrained(without).transformer.conditioning_embedder.pooled_embedder
    assert start is None
    assert weights.linear_1.weight.shape == (16, P)


def test_resuming_with_another_column_is_refused(data_with_vectors, tmp_path):
    output_dir = train(data_with_vectors, tmp_path / "run", "--pooled_column", "clip")
    with pytest.raises(ValueError, match="pooled_column"):
        train(data_with_vectors, output_dir, "--resume_from_checkpoint", "latest", "--max_train_steps", "8")
