"""Per-sample randomness and the order of the stream, on a small encoded data set in a folder."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import encode
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_mp.data.draws import sample_draws
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.training.samples import (
    StreamBatchSampler,
    TrainingSamples,
    conditions_of,
    hold_out,
    split_validation,
)


NUM_SAMPLES, NUM_CLASSES = 12, 3


@pytest.fixture(scope="module")
def image_data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(NUM_SAMPLES):
        (folder / f"class{k % NUM_CLASSES}").mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image.save(folder / f"class{k % NUM_CLASSES}" / f"{k}.png")
    return load_image_dataset(folder)[:2]


@pytest.fixture(scope="module")
def latents(image_data, tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    dataset, id2label = image_data
    options = {"vae": vae, "resolution": 16, "id2label": id2label, "random_flip": True, "shard_size": 5}
    return encode(dataset, tmp_path_factory.mktemp("latents"), **options)


def samples_of(latents, **options):
    defaults = {"seed": 7, "num_classes": NUM_CLASSES, "class_dropout_prob": 0.5, "random_flip": True}
    return TrainingSamples(latents, **(defaults | options))


def assert_equal_samples(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


# --- one sample ---------------------------------------------------------------------------------------------------


def test_a_sample_is_what_the_formula_says(latents):
    samples = samples_of(latents, class_dropout_prob=0.0)
    mean, std = (torch.tensor(x).view(4, 1, 1) for x in (latents.latents_mean, latents.latents_std))
    flips = set()
    for epoch in range(60):
        sample = samples[(epoch, 5)]
        uniform, noise, draw = sample_draws(7, np.array([epoch]), np.array([5]), 64)
        (time, flip, _), noise, draw = uniform[0].tolist(), noise.view(4, 4, 4), draw.view(4, 4, 4)
        posterior = latents.read(5, flip=flip < 0.5)
        torch.testing.assert_close(sample["latents"], (posterior["mean"] + posterior["std"] * draw - mean) / std)
        assert torch.equal(sample["noise"], noise)
        assert sample["time"].item() == time
        assert sample["class_label"] == posterior["label"]
        assert sample["index"] == 5
        assert sample["latents"].dtype == torch.float32
        assert sample["class_label"].dtype == torch.int64
        assert sample["time"].dtype == torch.float64
        flips.add(flip < 0.5)
    assert flips == {True, False}


def test_a_batch_is_its_samples(latents):
    """Of several shards and epochs, one of them twice, mirrored or not, with and without a label."""
    samples = samples_of(latents)
    keys = [(0, 11), (3, 2), (0, 0), (1, 4), (3, 2), (2, 7), (0, 5)]
    batch = samples[keys]
    for row, key in enumerate(keys):
        assert_equal_samples({name: values[row] for name, values in batch.items()}, samples[key])
    assert {NUM_CLASSES} < {*batch["class_label"].tolist()}
    for name, values in batch.items():  # what goes to a worker's queue is no part of something larger
        assert values.is_contiguous(), name
        assert values.untyped_storage().nbytes() == values.nbytes, name
    for values in batch.values():
        values.zero_()
    assert samples[keys]["latents"].abs().max() > 0


def test_samples_are_functions_of_their_key_alone(latents):
    samples, others = samples_of(latents), samples_of(latents)
    for key in ((3, 2), (0, 0), (3, 1)):  # another order, another object, another global state
        torch.manual_seed(key[1])
        others[key]
    assert_equal_samples(samples[(3, 2)], others[(3, 2)])
    for key, seed in (((3, 3), 7), ((4, 2), 7), ((3, 2), 8)):
        assert not torch.equal(samples_of(latents, seed=seed)[key]["noise"], samples[(3, 2)]["noise"])


def test_a_pretrained_models_units_stand_in_for_those_of_the_data(latents):
    own, shape = samples_of(latents), (-1, 1, 1)
    means, stds = [float(k) for k in range(len(latents.latents_mean))], [2.0] * len(latents.latents_mean)
    first, second = own[3, 2], samples_of(latents, latents_mean=means, latents_std=stds)[3, 2]
    raw = first.pop("latents") * own.latents_std + own.latents_mean
    torch.testing.assert_close(second.pop("latents"), (raw - torch.tensor(means).view(shape)) / 2)
    assert_equal_samples(first, second)
    assert latents.latents_mean == latents.index["latents_mean"]


def test_latents_are_standardised(latents):
    samples = samples_of(latents)
    draws = torch.stack([samples[(epoch, index)]["latents"] for epoch in range(200) for index in range(NUM_SAMPLES)])
    std, mean = torch.std_mean(draws, (0, 2, 3))
    # Every image comes up equally often, so the error is at most that of independent draws of variance 1.
    error = 4 / math.sqrt(200 * NUM_SAMPLES * 16)
    assert mean.abs().max() < error
    assert (std - 1).abs().max() < error


def test_times_are_uniform(latents):
    samples = samples_of(latents)
    count = 200 * NUM_SAMPLES
    times = torch.stack([samples[(e, i)]["time"] for e in range(200) for i in range(NUM_SAMPLES)])
    assert 0 <= times.min() <= times.max() < 1
    error = 4 * math.sqrt(0.25 * 0.75 / count)
    assert (((4 * times).long().bincount(minlength=4) / count - 0.25).abs() < error).all()


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_label_dropout_frequency(latents, probability):
    samples = samples_of(latents, class_dropout_prob=probability)
    labels = torch.stack([samples[(e, i)]["class_label"] for e in range(150) for i in range(NUM_SAMPLES)])
    count = len(labels)
    frequency = (labels == NUM_CLASSES).double().mean().item()
    assert abs(frequency - probability) <= 4 * math.sqrt(probability * (1 - probability) / count)
    kept = labels[labels != NUM_CLASSES].view(-1)
    assert set(kept.tolist()) == (set() if probability == 1 else {0, 1, 2})


@pytest.mark.parametrize(
    ("option", "moved"),
    [
        ({"class_dropout_prob": 0.0}, {"class_label"}),
        ({"random_flip": False}, {"latents"}),
        ({"num_classes": 5}, {"class_label"}),
        ({"num_classes": None, "class_dropout_prob": 0.0}, {"class_label"}),
    ],
)
def test_an_option_leaves_the_other_draws_untouched(latents, option, moved):
    full, changed = samples_of(latents), samples_of(latents, **option)
    differing = set()
    for epoch in range(8):
        first, second = full[(epoch, 4)], changed[(epoch, 4)]
        differing |= {key for key in first if key not in second or not torch.equal(first[key], second[key])}
    assert differing == moved


def test_without_flips_only_flipped_samples_change(latents):
    full, unflipped = samples_of(latents), samples_of(latents, random_flip=False)
    same = [torch.equal(full[(e, 4)]["latents"], unflipped[(e, 4)]["latents"]) for e in range(200)]
    assert abs(sum(same) / 200 - 0.5) < 4 * math.sqrt(0.25 / 200)


def test_a_hold_out_changes_no_other_sample(latents):
    train, validation = split_validation(NUM_SAMPLES, 4, seed=0)
    whole, part = samples_of(latents), samples_of(latents, indices=train)
    assert len(part) == NUM_SAMPLES - 4
    for position, index in enumerate(train.tolist()):
        assert_equal_samples(part[(1, position)], whole[(1, index)])
    held_out = samples_of(latents, indices=validation.tolist())
    assert {held_out[(0, k)]["index"].item() for k in range(4)} == set(validation.tolist())


def test_split_validation_is_a_partition():
    train, validation = split_validation(20, 5, seed=3)
    assert sorted(train.tolist() + validation.tolist()) == list(range(20))
    assert len(validation) == 5
    assert torch.equal(split_validation(20, 5, seed=3)[1], validation)
    assert not torch.equal(split_validation(20, 5, seed=4)[1], validation)
    assert set(validation.tolist()) < set(split_validation(20, 8, seed=3)[1].tolist())
    assert len(split_validation(20, 0, seed=3)[1]) == 0
    for count in (20, -1):
        with pytest.raises(ValueError, match=r"`num_validation` must be in \[0, 20\), got"):
            split_validation(20, count, seed=3)


def test_a_class_keeps_its_last_image():
    alone = torch.arange(40)
    train, validation = split_validation(40, 39, seed=0, labels=alone)
    assert (len(train), len(validation)) == (40, 0)
    # Ids need not all occur, nor come in order.
    labels = torch.tensor([7, 2, 7, 2, 2, 5, 7, 2])
    for seed in range(20):
        train, validation = split_validation(8, 7, seed=seed, labels=labels)
        assert sorted(labels[train].tolist()) == [2, 5, 7]
        assert sorted(train.tolist() + validation.tolist()) == list(range(8))
        assert set(split_validation(8, 3, seed=seed, labels=labels)[1].tolist()) < set(validation.tolist())


def test_large_classes_are_held_out_as_if_there_were_none():
    labels = torch.arange(1000) % 3
    for train, labelled in zip(split_validation(1000, 50, 1), split_validation(1000, 50, 1, labels), strict=True):
        assert torch.equal(train, labelled)


def test_a_hold_out_of_encoded_images(latents, image_data, tmp_path):
    assert latents.labels().tolist() == [latents[index]["label"] for index in range(NUM_SAMPLES)]
    # Twelve images in classes of four: one in 20 is none.
    assert [len(part) for part in hold_out(latents, None, 0)] == [12, 0]
    train, validation = hold_out(latents, 11, 0)
    assert latents.labels()[train].sort().values.tolist() == [0, 1, 2]
    unlabelled = encode(image_data[0], tmp_path)
    assert unlabelled.labels() is None
    assert [len(part) for part in hold_out(unlabelled, 11, 0)] == [1, 11]


def test_pixels_and_unlabelled_data(image_data, tmp_path):
    pixels = encode(image_data[0], tmp_path)
    samples = TrainingSamples(pixels, seed=0, random_flip=True)
    sample = samples[(0, 1)]
    assert set(sample) == {"latents", "noise", "time", "index"}
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pixels.latents_mean, pixels.latents_std))
    flip = sample_draws(0, np.array([0]), np.array([1]), 1)[0][0, 1] < 0.5
    torch.testing.assert_close(sample["latents"] * std + mean, pixels.read(1, flip=bool(flip))["mean"])
    with pytest.raises(ValueError, match="`num_classes` must be None for unlabelled data, got 3"):
        TrainingSamples(pixels, seed=0, num_classes=3)


def test_what_the_data_cannot_give_is_refused(latents, image_data, tmp_path):
    with pytest.raises(ValueError, match="`num_classes` must be at least 3, got 2"):
        samples_of(latents, num_classes=2)
    for options in ({"class_dropout_prob": 1.5}, {"num_classes": None, "class_dropout_prob": 0.1}):
        with pytest.raises(ValueError, match=r"`class_dropout_prob` must be in \[0, 1\], and 0 without conditions"):
            samples_of(latents, **options)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    unflipped = encode(image_data[0], tmp_path, vae=vae)
    with pytest.raises(ValueError, match="needs data encoded with `random_flip=True`"):
        TrainingSamples(unflipped, seed=0, random_flip=True)


# --- the stream ---------------------------------------------------------------------------------------------------


def stream(num_samples=NUM_SAMPLES, *, seed=1, train_batch_size=4, max_train_steps=10, **options):
    sampler = StreamBatchSampler(
        num_samples, seed=seed, train_batch_size=train_batch_size, max_train_steps=max_train_steps, **options
    )
    batches = list(sampler)
    assert len(sampler) == len(batches)
    assert batches == list(sampler)  # iterating again starts again
    return batches


@pytest.mark.parametrize("num_samples", [1, 3, 12, 13, 100])
def test_the_stream_is_one_permutation_after_another(num_samples):
    batches = stream(num_samples, train_batch_size=5, max_train_steps=60)
    assert [len(batch) for batch in batches] == [5] * 60
    places = sum(batches, [])
    orders = []
    for epoch in range(len(places) // num_samples):
        visit = places[epoch * num_samples : (epoch + 1) * num_samples]
        assert {e for e, _ in visit} == {epoch}
        orders.append([position for _, position in visit])
        assert sorted(orders[-1]) == list(range(num_samples))
    if num_samples >= 12 and len(orders) > 1:
        assert orders[0] != orders[1] != list(range(num_samples))
        other_seed = stream(num_samples, seed=2, train_batch_size=num_samples, max_train_steps=1)[0]
        assert orders[0] != [position for _, position in other_seed]


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (1, 2)])
def test_any_division_of_the_work_consumes_the_same_steps(num_processes, accumulation):
    whole = stream(13, train_batch_size=8)
    ranks = [
        stream(
            13,
            train_batch_size=8 // (num_processes * accumulation),
            num_processes=num_processes,
            process_index=rank,
            gradient_accumulation_steps=accumulation,
        )
        for rank in range(num_processes)
    ]
    assert all(len(batches) == 10 * accumulation for batches in ranks)
    for step, expected in enumerate(whole):
        # micro batches in order, within each the processes in order: not only the same set but the same order
        parts = [batches[step * accumulation + m] for m in range(accumulation) for batches in ranks]
        assert sum(parts, []) == expected


@pytest.mark.parametrize("start_step", [0, 1, 4, 10])
def test_a_resumed_stream_continues(start_step):
    options = {"num_processes": 2, "process_index": 1, "gradient_accumulation_steps": 3, "train_batch_size": 3}
    resumed = stream(7, start_step=start_step, **options)
    assert resumed == stream(7, **options)[start_step * 3 :]
    assert len(resumed) == (10 - start_step) * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"train_batch_size": 0}, "`train_batch_size` must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1"),
        ({"num_processes": 2, "process_index": 2}, r"`process_index` must be in \[0, 2\), got 2"),
        ({"start_step": 11}, r"`start_step` must be in \[0, 10\], got 11"),
    ],
)
def test_wrong_counts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options)


def test_workers_give_the_same_batches(latents):
    """Two data workers, and one that is no copy of this process (which pickles the data set), against none."""
    samples = samples_of(latents)
    latents[0]  # files already mapped in this process must not travel
    for context, num_workers in (("fork", 2), ("forkserver", 1)):
        sampler = StreamBatchSampler(len(samples), seed=1, train_batch_size=5, max_train_steps=4)
        alone = list(DataLoader(samples, sampler=sampler, batch_size=None))
        workers = {"num_workers": num_workers, "multiprocessing_context": context}
        shared = list(DataLoader(samples, sampler=sampler, batch_size=None, **workers))
        assert len(alone) == len(shared) == 4
        assert alone[0]["latents"].shape == (5, 4, 4, 4)
        for first, second in zip(alone, shared, strict=True):
            assert_equal_samples(first, second)


# --- condition vectors --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_vectors(image_data, tmp_path_factory):
    dataset, id2label = image_data
    vectors = np.random.default_rng(3).normal(size=(len(dataset), 5)).tolist()
    dataset = dataset.add_column("clip", vectors)
    latents = encode(
        dataset,
        tmp_path_factory.mktemp("with_vectors"),
        vae=None,
        resolution=16,
        id2label=id2label,
        shard_size=5,
        pooled_column="clip",
    )
    return latents, torch.tensor(vectors)


@pytest.mark.parametrize("num_classes", [NUM_CLASSES, None])
def test_vectors_come_with_their_images_and_are_dropped_with_the_labels(with_vectors, num_classes):
    latents, vectors = with_vectors
    assert latents.pooled_projection_dim == 5
    samples = samples_of(latents, num_classes=num_classes)
    dropped = []
    for position in range(NUM_SAMPLES):
        sample = samples[0, position]
        dropped.append(not sample["pooled_projections"].any())
        if num_classes is not None:
            assert dropped[-1] == (sample["class_label"] == NUM_CLASSES)
        if not dropped[-1]:
            assert torch.equal(sample["pooled_projections"], vectors[position])
    assert set(dropped) == {True, False}
    conditions = conditions_of(samples[0, 0])
    assert set(conditions) == {"pooled_projections"} | ({"class_labels"} if num_classes else set())


def test_vectors_move_no_other_draw(with_vectors, image_data, tmp_path):
    latents, _ = with_vectors
    dataset, id2label = image_data
    without = encode(dataset, tmp_path, id2label=id2label)
    first, second = samples_of(latents)[1, 4], samples_of(without)[1, 4]
    del first["pooled_projections"]
    assert_equal_samples(first, second)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda vectors: [*vectors[:7], vectors[7][:3], *vectors[8:]], "all of one length"),
        (lambda vectors: [[0.0, float("nan")]] * NUM_SAMPLES, r"finite in float32, .* is \[0.0, NaN\]"),
        (lambda vectors: [[1e300, 1.0]] * NUM_SAMPLES, r"finite in float32, .* is \[1e\+300, 1.0\]"),
        (lambda vectors: [None] + vectors[1:], r"all of one length, that of .*0\.png is null"),
    ],
)
def test_what_is_no_vector_is_refused(with_vectors, image_data, tmp_path, change, message):
    dataset, id2label = image_data
    dataset = dataset.add_column("clip", change(with_vectors[1].tolist()))
    with pytest.raises(ValueError, match=message):
        encode(dataset, tmp_path, shard_size=7, pooled_column="clip")


def test_another_column_is_other_data(with_vectors, image_data):
    dataset, id2label = image_data
    with pytest.raises(ValueError, match='`pooled_column` "clip" \\(now null\\)'):
        encode(dataset, with_vectors[0].folder, id2label=id2label, shard_size=5)
