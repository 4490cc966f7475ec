"""Statistics of real images: computed once by any number of processes, kept by content, checked."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import means_of_blocks, random_image, tiny_vae
from PIL import Image

from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.pixels import prepare_image
from diffusers_mp.evaluation import reference as reference_module
from diffusers_mp.evaluation.features import FeatureExtractor
from diffusers_mp.evaluation.frechet import RunningStatistics
from diffusers_mp.evaluation.reference import (
    Processes,
    RealImages,
    ReferenceStatistics,
    drawn,
    image_metrics,
    reference_statistics,
)


BLOCKS = FeatureExtractor(means_of_blocks, {"id": "means of blocks"})


def test_images_compared_are_drawn_from_all_classes():
    # Of classes in turn, evenly spaced numbers are all of one.
    numbers = drawn(1000, 100)
    assert numbers == sorted(set(numbers))
    assert np.bincount(np.array(numbers) % 10, minlength=10).min() >= 4
    assert np.bincount(np.array(numbers) // 100, minlength=10).min() >= 4
    assert drawn(7, 50_000) == list(range(7))


@pytest.fixture
def reference_of(image_data, tmp_path):
    def compute(dataset=image_data[0], extractor=BLOCKS, resolution=16, num_channels=3, class_counts=None, **options):
        options = {"cache_dir": tmp_path / "statistics", "batch_size": 3} | options
        images = RealImages(dataset, class_counts=class_counts)
        return reference_statistics(images, extractor, resolution=resolution, num_channels=num_channels, **options)

    return compute


def test_reference_is_that_of_the_prepared_images(reference_of, image_folder):
    paths = sorted(image_folder.rglob("*.png"))
    images = torch.stack([prepare_image(Image.open(path), 16, 3) for path in paths])
    features = means_of_blocks(images).double()
    reference = reference_of()
    assert torch.allclose(reference.mean, features.mean(0), atol=1e-7)
    assert torch.allclose(reference.covariance, features.T.cov(), atol=1e-7)
    assert torch.allclose(reference.features.double(), features, atol=1e-7)
    assert reference.description["num_images"] == 10
    assert any("10 reference images for 48 features" in warning for warning in reference.description["warnings"])


def test_processes_share_the_reference(reference_of, tmp_path):
    whole, barrier, parts = reference_of(), threading.Barrier(3), [None] * 3

    def process(index):
        def gather(part):
            parts[index] = part
            barrier.wait(timeout=60)
            gathered = list(parts)
            barrier.wait(timeout=60)
            return gathered

        return reference_of(cache_dir=tmp_path / "shared", processes=Processes(3, index, gather))

    with ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(process, range(3)))
    for one in shared:
        assert torch.equal(one.features, whole.features)
        assert torch.allclose(one.covariance, whole.covariance, rtol=1e-12)
        assert torch.equal(one.covariance, shared[0].covariance)
        assert one.description == whole.description
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_cache_goes_by_content(reference_of, image_data, image_folder, tmp_path):
    first = reference_of()
    files = list((tmp_path / "statistics").iterdir())
    assert len(files) == 1

    def never(images):
        raise AssertionError("computed again")

    # The same images in another place, by another extractor object: nothing is computed.
    copies = tmp_path / "copies"
    for path in image_folder.rglob("*.png"):
        (copies / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copies / path.parent.name / path.name).write_bytes(path.read_bytes())
    dataset, *_ = load_image_dataset(copies, cache_dir=str(tmp_path / "cache"))
    again = reference_of(dataset, FeatureExtractor(never, {"id": "means of blocks"}))
    assert torch.equal(again.covariance, first.covariance)
    assert again.description == json.loads(json.dumps(first.description))

    random_image(np.random.default_rng(1)).save(copies / "cat" / "0.png")
    dataset, *_ = load_image_dataset(copies, cache_dir=str(tmp_path / "cache"))
    assert not torch.equal(reference_of(dataset).covariance, first.covariance)
    reference_of(resolution=8)
    reference_of(extractor=FeatureExtractor(means_of_blocks, {"id": "another"}))
    assert len(list((tmp_path / "statistics").iterdir())) == 4


def test_two_jobs_may_write_the_same_statistics(reference_of, tmp_path, monkeypatch):
    reference, path, save_file = (
        reference_of(),
        tmp_path / "jobs" / "statistics.safetensors",
        reference_module.save_file,
    )

    def save_while_another_does(tensors, unfinished, metadata):
        save_file(tensors, unfinished, metadata=metadata)
        monkeypatch.setattr(reference_module, "save_file", save_file)
        with monkeypatch.context() as another:
            another.setattr(os, "getpid", lambda: 0)
            reference.save(path)

    monkeypatch.setattr(reference_module, "save_file", save_while_another_does)
    reference.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["statistics.safetensors"]
    assert torch.equal(ReferenceStatistics.load(path).covariance, reference.covariance)


def test_damaged_and_foreign_statistics_are_refused(reference_of, tmp_path):
    reference_of()
    (path,) = (tmp_path / "statistics").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, remove it: its tensors are not those that were written"):
        reference_of()
    path.write_bytes(content[:50])
    with pytest.raises(ValueError, match="is damaged, remove it"):
        reference_of()
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="must hold reference statistics that `evaluate.py` wrote"):
        ReferenceStatistics.load(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")


def test_statistics_of_another_kind_are_refused(reference_of):
    reference = reference_of()
    reference.check(BLOCKS, 16, 3)
    with pytest.raises(ValueError, match="must be of resolution 32, which the pipeline generates, got 16"):
        reference.check(BLOCKS, 32, 3)
    with pytest.raises(ValueError, match="must be of num_channels 1, .* got 3"):
        reference.check(BLOCKS, 16, 1)
    other = FeatureExtractor(means_of_blocks, {"id": "another"})
    with pytest.raises(ValueError, match="they differ in id: means of blocks and another"):
        reference.check(other, 16, 3)


def test_images_that_are_prepared_otherwise_are_told(reference_of, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "mixed"
    folder.mkdir()
    for k, (width, height) in enumerate(((20, 18), (40, 40), (64, 48))):
        random_image(rng, width, height).save(folder / f"{k}.png")
    dataset, *_ = load_image_dataset(folder, cache_dir=str(tmp_path / "cache"))
    warnings = " ".join(reference_of(dataset, resolution=32, num_channels=1).description["warnings"])
    assert "1 of 3 reference images are smaller than 32 pixels and were enlarged" in warnings
    assert "reference images are of 3 sizes, from 20x18 to 64x48" in warnings
    assert "3 of 3 reference images have colours, the pipeline's are grey" in warnings
    (folder / "1.png").write_bytes(b"no image")
    dataset, *_ = load_image_dataset(folder, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"must be readable, number 1 \(1.png\) is not: UnidentifiedImageError"):
        reference_of(dataset)
    with pytest.raises(ValueError, match="must hold at least 2 images, got 1"):
        reference_of(dataset.select([0]))


def test_metrics_of_a_set_against_itself_and_others(reference_of, image_data):
    reference = reference_of()
    same = image_metrics(reference, RunningStatistics().update(reference.features), reference.features, k=3)
    assert same["frechet_distance"] < 1e-6
    assert (same["precision"], same["recall"], same["num_images_compared"]) == (1, 1, 10)
    assert "10 generated images for 48 features" in same["warnings"][0]
    noise = torch.rand(60, 48)
    other = image_metrics(reference, RunningStatistics().update(noise), noise, k=0)
    assert other["frechet_distance"] > 1
    assert other.keys() == {"frechet_distance", "warnings"}
    assert other["warnings"] == []
