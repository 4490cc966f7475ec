"""Distances against closed forms and other algorithms, statistics against NumPy, and what bad input is told."""

import copy
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler
from helpers import random_picture, tiny_model, tiny_vae
from PIL import Image
from scipy.linalg import sqrtm

from diffusers_mp import MPDiTPipeline, frechet_distance
from diffusers_mp.data.images import load_image_dataset, prepare_image
from diffusers_mp.evaluation import reference as reference_module
from diffusers_mp.evaluation.features import (
    FeatureExtractor,
    inception_extractor,
    load_extractor,
    prepare_pixels,
    transformers_extractor,
)
from diffusers_mp.evaluation.frechet import RunningStatistics, rank_warning
from diffusers_mp.evaluation.generation import NonFiniteImageError, generate_images, image_generator
from diffusers_mp.evaluation.precision_recall import precision_recall
from diffusers_mp.evaluation.reference import ReferenceStatistics, drawn, image_metrics, reference_statistics
from diffusers_mp.training import sample_generator


def rows(count, size, seed=0, scale=1.0, offset=0.0):
    return (
        torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + offset
    )


def random_covariance(size, rank, seed):
    factor = rows(size, rank, seed)
    return factor @ factor.T / rank


def means_of_blocks(images):
    """Features of a function of one's own: 48 for RGB."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 255


BLOCKS = FeatureExtractor(means_of_blocks, {"id": "means of blocks"})


# The distance.


def test_distance_of_gaussians_with_commuting_covariances():
    # Σ = Q diag(a) Qᵀ, Σ' = Q diag(b) Qᵀ: the sum of (√a - √b)² and of the squared differences of the means.
    basis = torch.linalg.qr(rows(12, 12))[0]
    a, b = rows(12, 1, seed=1).flatten().abs(), rows(12, 1, seed=2).flatten().abs()
    a[:4], b[3:6] = 0, 0
    mean, other = rows(12, 1, seed=3).flatten(), rows(12, 1, seed=4).flatten()
    expected = (a.sqrt() - b.sqrt()).square().sum() + (mean - other).square().sum()
    distance = frechet_distance(mean, basis @ a.diag() @ basis.T, other, basis @ b.diag() @ basis.T)
    assert distance == pytest.approx(expected.item(), rel=1e-12)


def test_distance_in_two_dimensions():
    # tr √M = √(tr M + 2 √det M) for 2x2.
    first, second = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, -0.7], [-0.7, 3.0]])
    product = first.double() @ second.double()
    cross = (product.trace() + 2 * (product[0, 0] * product[1, 1] - product[0, 1] * product[1, 0]).sqrt()).sqrt()
    tensors = torch.zeros(2), first, torch.tensor([3.0, 4.0]), second
    # Arrays too, as files of FID's statistics hold them.
    for arguments in (tensors, [tensor.numpy() for tensor in tensors], [tensor.tolist() for tensor in tensors]):
        assert frechet_distance(*arguments) == pytest.approx(25 + 3 + 4 - 2 * cross.item(), rel=1e-12)


@pytest.mark.parametrize("rank", [40, 8])
def test_distance_equals_the_square_root_by_schur(rank):
    first, second = random_covariance(24, rank, 1), random_covariance(24, rank, 2)
    mean, other = rows(24, 1, seed=3).flatten(), rows(24, 1, seed=4).flatten()
    # Without full rank the root of the product, which is not symmetric, is computed badly: hence the ridge.
    ridge = (1e-9 if rank < 24 else 0) * torch.eye(24, dtype=torch.float64)
    root = np.trace(sqrtm(((first + ridge) @ (second + ridge)).numpy())).real
    expected = (mean - other).square().sum() + first.trace() + second.trace() - 2 * root
    tolerance = 1e-5 if rank < 24 else 1e-11
    assert frechet_distance(mean, first, other, second) == pytest.approx(expected.item(), rel=tolerance)


def test_distance_is_a_metric_s_square():
    covariances = [random_covariance(6, rank, rank) for rank in (2, 4, 9)]
    means = [rows(6, 1, seed=seed).flatten() for seed in range(3)]
    gaussians = list(zip(means, covariances, strict=True))
    distance = {(i, j): frechet_distance(*gaussians[i], *gaussians[j]) for i in range(3) for j in range(3)}
    for i in range(3):
        assert distance[i, i] < 1e-12 * covariances[i].trace()
        for j in range(3):
            assert distance[i, j] == pytest.approx(distance[j, i], rel=1e-12, abs=1e-12)
            assert all(distance[i, j] ** 0.5 <= distance[i, m] ** 0.5 + distance[m, j] ** 0.5 + 1e-6 for m in range(3))


def test_distance_of_samples_approaches_that_of_their_gaussians():
    first, second = (RunningStatistics().update(rows(20_000, 5, k, scale=k, offset=k)) for k in (1, 2))
    estimate = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    # 5 · ((2 - 1)² + (1 - 0)²); errors of 1 / √20000 in each mean and std.
    assert estimate == pytest.approx(10, rel=0.03)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mean": torch.zeros(3)}, r"`covariance` must have shape \(3, 3\), got \(2, 2\)"),
        ({"other_mean": torch.tensor([0.0, torch.nan])}, "`other_mean` must be finite"),
        ({"covariance": -torch.eye(2)}, "`covariance` must be symmetric and positive semi-definite, .* from -1 to -1"),
        ({"other_covariance": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "got an asymmetry of 0.5"),
        ({"mean": torch.zeros(1, 2)}, r"`mean` must have shape \('D',\), got \(1, 2\)"),
    ],
)
def test_what_is_no_gaussian_is_refused(changes, message):
    gaussians = {"mean": torch.zeros(2), "covariance": torch.eye(2)}
    gaussians |= {f"other_{name}": tensor for name, tensor in gaussians.items()}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**gaussians | changes)


# Moments.


def test_moments_of_merged_batches_are_those_of_all_rows():
    # A mean of 1e6 times the deviation: sums of squares in float64 would keep 4 digits.
    features = rows(100, 7, offset=1e6)
    parts = [RunningStatistics() for _ in range(4)]
    for part, start, end in zip(parts, (0, 1, 50, 100), (1, 50, 100, 100), strict=True):
        for batch in features[start:end].split(9):
            part.update(batch)
    merged = RunningStatistics()
    for part in parts:
        before = copy.deepcopy(part)
        merged.merge(part)
        assert part.count == before.count
        assert part.mean is before.mean or torch.equal(part.mean, before.mean)
    assert merged.count == 100
    assert torch.allclose(merged.mean, torch.from_numpy(features.numpy().mean(0)), rtol=1e-15)
    assert np.allclose(merged.covariance, np.cov(features.numpy().T), rtol=1e-8, atol=1e-9)


def test_moments_refuse_what_they_cannot_take():
    statistics = RunningStatistics()
    with pytest.raises(ValueError, match="at least 2 rows, got 0"):
        _ = statistics.covariance
    statistics.update(rows(1, 3))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match=r"must have shape \(B, 3\), got \(2, 4\)"):
        statistics.update(rows(2, 4))
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        statistics.update(torch.full((1, 3), torch.nan))
    assert statistics.count == 1


def test_rank_warning_says_when_the_covariance_cannot_have_full_rank():
    for count in (8, 9):
        rank = torch.linalg.matrix_rank(RunningStatistics().update(rows(count, 8)).covariance)
        assert (rank < 8) == (rank_warning(count, 8, "images") is not None)
    assert "8 images for 8 features: their covariance has rank 7 at most" in rank_warning(8, 8, "images")


# Precision and recall.


def brute_force(points, queries, k):
    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    radii = [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]
    return np.mean([any(distance(q, p) <= r for p, r in zip(points, radii, strict=True)) for q in queries])


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_hand(k, monkeypatch):
    real, made = rows(40, 3), rows(30, 3, seed=1, scale=0.6, offset=0.3)
    made[:5] += 50
    expected = brute_force(real.numpy(), made.numpy(), k), brute_force(made.numpy(), real.numpy(), k)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(real, made, k) == pytest.approx(expected)
    monkeypatch.setattr(sys.modules["diffusers_mp.evaluation.precision_recall"], "_BLOCK_SIZE", 100)
    assert precision_recall(real, made, k) == pytest.approx(expected)


def test_precision_and_recall_at_their_ends():
    real = rows(50, 4, offset=1e4)
    assert precision_recall(real, real.clone()) == (1, 1)
    assert precision_recall(real, real + 1e3) == (0, 0)
    # A single mode out of two: all that is generated is real, half of what is real is generated.
    modes = torch.cat([rows(50, 4, seed=1), rows(50, 4, seed=2) + 100])
    assert precision_recall(modes, modes[:50]) == (1, 0.5)
    # Copies of one image: radii are 0, and so are distances.
    same = rows(1, 4, offset=1e4).expand(10, 4)
    assert precision_recall(same, same.clone()) == (1, 1)


def test_precision_needs_more_images_than_neighbours():
    with pytest.raises(ValueError, match="less than the number of images, got 3 for 5 real and 3 generated"):
        precision_recall(rows(5, 2), rows(3, 2))
    with pytest.raises(ValueError, match=r"got \(5, 2\) and \(5, 3\)"):
        precision_recall(rows(5, 2), rows(5, 3))


# Extractors.


def test_features_are_those_of_the_model(dinov2):
    extractor = transformers_extractor(dinov2)
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    processor = transformers.BitImageProcessorPil.from_pretrained(dinov2)
    # Of the processor's own size nothing is resized or cropped: both must prepare alike.
    pixels = processor(list(images), do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.allclose(prepare_pixels(images, extractor.description["preprocessing"]), pixels, atol=1e-6)
    with torch.no_grad():
        expected = transformers.Dinov2Model.from_pretrained(dinov2).eval()(pixels).last_hidden_state[:, 0]
    features, logits = extractor(images)
    assert torch.allclose(features, expected, atol=1e-5)
    assert logits is None
    assert extractor(torch.zeros(2, 1, 9, 9, dtype=torch.uint8))[0].shape == (2, 8)


def test_the_whole_image_is_seen(dinov2):
    extractor, image = transformers_extractor(dinov2), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    framed = image.clone()
    framed[..., :2, :] = 255
    assert not torch.allclose(extractor(image)[0], extractor(framed)[0], atol=1e-3)


def test_description_declares_what_features_depend_on(dinov2, tmp_path):
    extractor = transformers_extractor(dinov2)
    assert extractor.description["class"] == "Dinov2Model"
    assert extractor.description["preprocessing"]["size"] == [28, 28]
    assert extractor.description["preprocessing"]["resample"] == "bicubic"
    model = transformers.Dinov2Model.from_pretrained(dinov2)
    model.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessorPil.from_pretrained(dinov2)
    processor.save_pretrained(tmp_path)
    # The same weights elsewhere are the same extractor; other weights, or other pixels, are not.
    assert transformers_extractor(tmp_path).fingerprint == extractor.fingerprint
    processor.resample = 2
    processor.save_pretrained(tmp_path)
    assert transformers_extractor(tmp_path).fingerprint != extractor.fingerprint
    processor.resample = 3
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        model.layernorm.bias += 1e-3
    model.save_pretrained(tmp_path)
    assert transformers_extractor(tmp_path).fingerprint != extractor.fingerprint


def test_extractors_that_would_mislead_are_refused(dinov2, tmp_path):
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \['pooler.dense.bias', 'pooler.dense.weight'\]: .* random ones"):
        transformers_extractor(tmp_path)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"`output` must be one of \['last_hidden_state', 'pooler_output'\]"):
        transformers_extractor(dinov2, output="pooled")(images)
    with pytest.raises(ValueError, match=r"must return features of shape \(2, D\), got \(2, 5, 8\)"):
        transformers_extractor(dinov2, output="last_hidden_state")(images)


def test_an_extractor_out_of_reach_is_named(tmp_path):
    with pytest.raises(OSError, match=r"an extractor must be .* 'torch-fidelity', got '.*nowhere'"):
        load_extractor(str(tmp_path / "nowhere"))


def test_a_function_of_one_s_own(tmp_path, monkeypatch):
    source = "import torch\ndef colours(images):\n    return images.float().mean((2, 3))\nnumber = 3\n"
    (tmp_path / "my_features.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    extractor = load_extractor("my_features:colours")
    features, _ = extractor(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8))
    assert features.tolist() == [[7, 7, 7]] * 2
    assert extractor.description["id"] == "my_features:colours"
    assert len(extractor.description["source_sha256"]) == 64
    with pytest.raises(ImportError, match="my_features must have a function 'number'"):
        load_extractor("my_features:number")
    # What its source does not tell.
    before = load_extractor("my_features:colours").fingerprint
    sys.modules["my_features"].colours.description = {"weights_sha256": "0123"}
    told = load_extractor("my_features:colours")
    assert told.description["weights_sha256"] == "0123"
    assert told.fingerprint != before


def test_images_compared_are_drawn_from_all_classes():
    # Of classes in turn, evenly spaced numbers are all of one.
    numbers = drawn(1000, 100)
    assert numbers == sorted(set(numbers))
    assert np.bincount(np.array(numbers) % 10, minlength=10).min() >= 4
    assert np.bincount(np.array(numbers) // 100, minlength=10).min() >= 4
    assert drawn(7, 50_000) == list(range(7))


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 3, 8, 8), r"uint8 tensor of .* got torch.float32 of shape \(2, 3, 8, 8\)"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], "all of one size .* got list"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), "must have 1 or 3 channels"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        BLOCKS(images)


def test_features_that_are_not_finite_are_refused():
    extractor = FeatureExtractor(lambda images: images[:, :, 0, 0].float() / 0, {"id": "division"})
    with pytest.raises(ValueError, match="'division' returned features that are not finite"):
        extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must name the extractor under 'id'"):
        FeatureExtractor(means_of_blocks, {})


def test_inception_needs_its_package():
    # torch-fidelity cannot be installed here: what happens without it is all that is tested.
    with pytest.raises(ImportError, match="need two packages: `pip install torch-fidelity torchvision`"):
        inception_extractor()


# Reference.


@pytest.fixture
def reference_of(pictures, tmp_path):
    def compute(dataset=pictures[0], extractor=BLOCKS, resolution=16, num_channels=3, **options):
        options = {"cache_dir": tmp_path / "statistics", "batch_size": 3} | options
        return reference_statistics(dataset, extractor, resolution=resolution, num_channels=num_channels, **options)

    return compute


def test_reference_is_that_of_the_prepared_images(reference_of, picture_folder):
    paths = sorted(picture_folder.rglob("*.png"))
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

        options = {"num_processes": 3, "process_index": index, "gather": gather}
        return reference_of(cache_dir=tmp_path / "shared", **options)

    with ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(process, range(3)))
    for one in shared:
        assert torch.equal(one.features, whole.features)
        assert torch.allclose(one.covariance, whole.covariance, rtol=1e-12)
        assert torch.equal(one.covariance, shared[0].covariance)
        assert one.description == whole.description
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_cache_goes_by_content(reference_of, pictures, picture_folder, tmp_path):
    first = reference_of()
    files = list((tmp_path / "statistics").iterdir())
    assert len(files) == 1

    def never(images):
        raise AssertionError("computed again")

    # The same images in another place, by another extractor object: nothing is computed.
    copies = tmp_path / "copies"
    for path in picture_folder.rglob("*.png"):
        (copies / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copies / path.parent.name / path.name).write_bytes(path.read_bytes())
    dataset, _ = load_image_dataset(copies, cache_dir=str(tmp_path / "cache"))
    again = reference_of(dataset, FeatureExtractor(never, {"id": "means of blocks"}))
    assert torch.equal(again.covariance, first.covariance)
    assert again.description == json.loads(json.dumps(first.description))

    random_picture(np.random.default_rng(1)).save(copies / "cat" / "0.png")
    dataset, _ = load_image_dataset(copies, cache_dir=str(tmp_path / "cache"))
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
        random_picture(rng, width, height).save(folder / f"{k}.png")
    dataset, _ = load_image_dataset(folder, cache_dir=str(tmp_path / "cache"))
    warnings = " ".join(reference_of(dataset, resolution=32, num_channels=1).description["warnings"])
    assert "1 of 3 reference images are smaller than 32 pixels and were enlarged" in warnings
    assert "reference images are of 3 sizes, from 20x18 to 64x48" in warnings
    assert "3 of 3 reference images have colours, the pipeline's are grey" in warnings
    (folder / "1.png").write_bytes(b"no image")
    dataset, _ = load_image_dataset(folder, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"must be readable, number 1 \(1.png\) is not: UnidentifiedImageError"):
        reference_of(dataset)
    with pytest.raises(ValueError, match="must hold at least 2 images, got 1"):
        reference_of(dataset.select([0]))


# Generated images.


@pytest.fixture(scope="module")
def pipe():
    pipe = MPDiTPipeline(
        tiny_model(class_dropout_prob=0.1).eval(),
        DDIMScheduler(clip_sample=False),
        tiny_vae(),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = {"seed": 3, "class_ids": [0, 4, 7], "num_inference_steps": 3, "guidance_scale": 2.0}


def test_batches_of_any_size_give_the_same_images(pipe):
    together = generate_images(pipe, range(7), **CALL)
    assert together.dtype == torch.uint8
    assert together.shape == (7, 3, 32, 32)
    for size in (1, 2, 5):
        parts = [generate_images(pipe, list(range(7))[start : start + size], **CALL) for start in range(0, 7, size)]
        difference = (torch.cat(parts).int() - together.int()).abs()
        # Sums of another order may round a value to the byte beside it.
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3
    images = generate_images(pipe, [5, 1], **CALL)
    assert ((images.int() - together[[5, 1]].int()).abs() <= 1).all()
    assert (together[0] != together[3]).any()  # of one class, of other seeds


def test_an_image_is_what_the_pipeline_makes_of_its_seed_and_class(pipe):
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    image = pipe([7], generator=image_generator(3, 5), **options).images[0]
    assert np.array_equal(np.asarray(image), generate_images(pipe, [5], **CALL)[0].permute(1, 2, 0))


def test_seeds_are_unrelated_to_each_other_and_to_training():
    draws = [image_generator(seed, index).initial_seed() for seed in (0, 1) for index in range(50)]
    draws += [sample_generator(0, epoch, index).initial_seed() for epoch in range(3) for index in range(50)]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_named(pipe, value):
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias[0] = value
    message = r"image 4 \(seed 3, class 4\) is not finite with guidance scale 2 and 3 steps in torch.float32; 2 of its"
    with pytest.raises(NonFiniteImageError, match=message):
        generate_images(broken, [4, 5], **CALL)


def test_metrics_of_a_set_against_itself_and_others(reference_of, pictures):
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


def test_extractors_of_another_name_or_revision_share_no_statistics():
    of_name, of_revision, of_content = (
        [FeatureExtractor(lambda images: images, {**plain, **facts}).fingerprint for facts in ({}, {changed: "other"})]
        for plain, changed in (
            ({"id": "net", "size": 224}, "id"),
            ({"id": "net", "size": 224}, "revision"),
            ({"id": "folder", "weights_sha256": "0"}, "id"),  # the same weights in another place
        )
    )
    assert of_name[0] != of_name[1]
    assert of_revision[0] != of_revision[1]
    assert of_content[0] == of_content[1]
