"""The latent cache on real images and a tiny AutoencoderKL; expected values are computed directly from both."""

import json
import logging
import multiprocessing
import os
import pickle
import random
import signal

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import encode, random_picture, tiny_vae
from PIL import Image
from processes import PRELOADED, TIMEOUT

from diffusers_mp.data import encoding, shards
from diffusers_mp.data.images import load_image_dataset, prepare_image
from diffusers_mp.data.latents import LatentDataset, vae_fingerprint
from diffusers_mp.data.shards import ChannelStatistics


RESOLUTION = 16


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def encoded(pictures, vae, tmp_path_factory):
    dataset, id2label = pictures
    folder = tmp_path_factory.mktemp("encoded")
    options = {"random_flip": True, "batch_size": 2, "shard_size": 3}
    return encode(dataset, folder, vae=vae, id2label=id2label, vae_id="tiny", **options)


def pixels_of(dataset, num_channels=3):
    prepared = []
    for row in dataset:
        with Image.open(row["image"]["path"]) as image:
            prepared.append(prepare_image(image, RESOLUTION, num_channels))
    return torch.stack(prepared).float() / 127.5 - 1


def test_a_folder_without_classes_is_unlabelled(tmp_path, vae):
    rng = np.random.default_rng(1)
    (tmp_path / "flat").mkdir()
    for k in range(3):
        random_picture(rng).save(tmp_path / "flat" / f"{k}.png")
    dataset, id2label = load_image_dataset(tmp_path / "flat", cache_dir=str(tmp_path / "cache"))
    assert id2label is None
    latents = encode(dataset, tmp_path / "encoded", vae=vae, id2label=id2label)
    assert latents.id2label is None
    assert set(latents[0]) == {"mean", "std"}


@torch.no_grad()
def test_moments_are_those_of_the_vae_across_shard_borders(encoded, pictures, vae):
    dataset, _ = pictures
    pixels = pixels_of(dataset)
    assert [shard["num_samples"] for shard in encoded.index["shards"]] == [3, 3, 3, 1]
    assert len(encoded) == 10
    assert encoded.latent_shape == (4, 4, 4)
    for flip, variant in ((False, pixels), (True, pixels.flip(-1))):
        posterior = vae.encode(variant).latent_dist
        for index in (0, 2, 3, 5, 6, 8, 9):
            sample = encoded.read(index, flip=flip)
            # a batch of another size may sum in another order
            torch.testing.assert_close(sample["mean"], posterior.mean[index], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sample["std"], posterior.std[index], rtol=1e-5, atol=1e-5)
            assert sample["label"] == dataset[index]["label"]
    assert not torch.allclose(encoded.read(0, flip=True)["mean"], encoded.read(0)["mean"].flip(-1), atol=1e-3)
    assert torch.equal(encoded[4]["mean"], encoded.read(4)["mean"])
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"must be in \[0, 10\)"):
            encoded[index]


@torch.no_grad()
def test_statistics_are_those_of_the_drawn_latents(encoded, pictures, vae):
    pixels = pixels_of(pictures[0])
    posterior = vae.encode(torch.cat([pixels, pixels.flip(-1)])).latent_dist
    # a mixture of Gaussians: E[x] = E[mean], E[x²] = E[mean² + std²]
    mean, std = posterior.mean.double(), posterior.std.double()
    expected_mean = mean.mean((0, 2, 3))
    expected_std = ((mean.square() + std.square()).mean((0, 2, 3)) - expected_mean.square()).sqrt()
    torch.testing.assert_close(torch.tensor(encoded.latents_mean).double(), expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(encoded.latents_std).double(), expected_std, rtol=1e-5, atol=1e-6)


def test_index_explains_itself_and_survives_reloading(encoded):
    again = LatentDataset(encoded.folder)
    index = json.loads((encoded.folder / "index.json").read_text())
    assert index["vae"]["id"] == "tiny"
    assert index["resolution"] == RESOLUTION
    assert index["skipped"] == []
    assert again.id2label == {0: "cat", 1: "dog", 2: "test"}
    assert again.latents_std == encoded.latents_std
    assert not list(encoded.folder.glob("*.unfinished"))


def test_pickled_after_reading(encoded):
    encoded[0]
    again = pickle.loads(pickle.dumps(encoded))
    assert all(torch.equal(again[index]["mean"], encoded[index]["mean"]) for index in range(10))


@pytest.mark.parametrize("key", ["mean", "std"])
def test_writing_to_a_sample_changes_nothing(encoded, key):
    before = encoded[0][key].clone()
    encoded[0][key].zero_()
    assert torch.equal(encoded[0][key], before)


def test_pixels_are_stored_as_bytes_and_mirrored_on_reading(pictures, tmp_path):
    dataset, id2label = pictures
    encoded = encode(dataset, tmp_path / "a", id2label=id2label, shard_size=4, num_workers=2)
    pixels = pixels_of(dataset)
    assert encoded.latent_shape == (3, RESOLUTION, RESOLUTION)
    for index in range(10):
        sample = encoded.read(index, flip=index % 2 == 1)
        assert set(sample) == {"mean", "label"}
        assert torch.equal(sample["mean"], pixels[index].flip(-1) if index % 2 else pixels[index])
    num_bytes = sum(shard["num_bytes"] for shard in encoded.index["shards"])
    assert num_bytes < 1.2 * pixels.numel()
    expected_std, expected_mean = torch.std_mean(pixels.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(encoded.latents_mean).double(), expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(encoded.latents_std).double(), expected_std, rtol=1e-6, atol=1e-6)
    encoded.validate(vae=None, resolution=RESOLUTION, random_flip=True)
    grey = encode(dataset, tmp_path / "b", num_channels=1)
    assert torch.equal(grey[3]["mean"], pixels_of(dataset, 1)[3])


@pytest.fixture
def damaged_folder(tmp_path):
    folder, rng = tmp_path / "pictures", np.random.default_rng(5)
    folder.mkdir()
    for k in range(6):
        random_picture(rng).save(folder / f"{k}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "4.png").write_text("not an image")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named(damaged_folder, tmp_path, vae, num_workers):
    dataset, _ = load_image_dataset(damaged_folder, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Cannot read .*[/\\]1\.png: OSError.*--skip_corrupt"):
        encode(dataset, tmp_path / "encoded", vae=vae, num_workers=num_workers)
    with pytest.raises(FileNotFoundError, match="must hold a finished encoded data set"):
        LatentDataset(tmp_path / "encoded")


def test_corrupt_images_are_left_out_when_asked(damaged_folder, tmp_path, vae, caplog):
    dataset, _ = load_image_dataset(damaged_folder, cache_dir=str(tmp_path / "cache"))
    options = {"vae": vae, "skip_corrupt": True, "batch_size": 1, "shard_size": 2}
    with caplog.at_level(logging.WARNING, logger="diffusers_mp.data"):
        encoded = encode(dataset, tmp_path / "encoded", **options)
    assert len(encoded) == 4
    assert [os.path.basename(name) for name in encoded.index["skipped"]] == ["1.png", "4.png"]
    assert [str(damaged_folder / f"{k}.png") in caplog.text for k in range(6)] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    kept = pixels_of(dataset.select([0, 2, 3, 5]))
    with torch.no_grad():
        expected = vae.encode(kept).latent_dist.mean
    torch.testing.assert_close(torch.stack([encoded[k]["mean"] for k in range(4)]), expected, rtol=1e-5, atol=1e-5)
    # shards hold their own rows only: here rows 0-1 without 1, 2-3, 4-5 without 4
    assert [shard["num_samples"] for shard in encoded.index["shards"]] == [1, 2, 1]
    with pytest.raises(ValueError, match="None of the 2 images could be read"):
        encode(dataset.select([1, 4]), tmp_path / "none", **options)
    # Who did not ask is told.
    for asked, told in ((True, False), (False, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="diffusers_mp.data"):
            encode(dataset, tmp_path / "encoded", **{**options, "skip_corrupt": asked})
        assert ("lacks images that could not be read when it was encoded: 2 of them, such as" in caplog.text) is told


def test_a_corrupt_image_without_a_path_is_named_by_its_row(tmp_path):
    columns = {"image": [{"bytes": b"nonsense", "path": None}, None]}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(decode=False)}))
    for row in range(2):
        with pytest.raises(ValueError, match="Cannot read row 0: UnidentifiedImageError"):
            encode(dataset.select([row]), tmp_path / "a")


def test_latents_that_are_not_finite_are_named(picture_folder, tmp_path, vae, monkeypatch):
    dataset, _ = load_image_dataset(picture_folder, cache_dir=str(tmp_path / "cache"))
    encode_batch, batches = vae.encode, []

    def encode_with_a_hole(pixels):
        batches.append(len(pixels))
        if len(batches) == 2:
            pixels[1] = float("nan")
        return encode_batch(pixels)

    monkeypatch.setattr(vae, "encode", encode_with_a_hole)
    name = os.path.basename(dataset[3]["image"]["path"])
    with pytest.raises(ValueError, match=f"`vae` must make finite latents, in .*32 those of .*{name} are not"):
        encode(dataset, tmp_path / "encoded", vae=vae, batch_size=2)
    assert len(batches) == 2
    # Nothing of it stays: made anew, it is whole.
    monkeypatch.undo()
    assert len(encode(dataset, tmp_path / "encoded", vae=vae)) == len(dataset)


def test_an_encoder_that_another_one_overtakes_goes_on(pictures, tmp_path, vae, monkeypatch):
    dataset, id2label = pictures
    options = {"vae": vae, "id2label": id2label, "shard_size": 3}
    save, overtaken = shards.save_file, []

    def save_and_be_overtaken(tensors, path):
        save(tensors, path)
        if not overtaken:
            overtaken.append(path)
            monkeypatch.setattr(shards.os, "getpid", lambda: 0)
            encode(dataset, tmp_path / "encoded", **options)

    monkeypatch.setattr(shards, "save_file", save_and_be_overtaken)
    encoded = encode(dataset, tmp_path / "encoded", **options)
    assert not os.path.exists(overtaken[0])
    encoded.verify()
    monkeypatch.undo()
    alone = encode(dataset, tmp_path / "alone", **options)
    assert encoded.index == alone.index


@pytest.mark.parametrize("name", ["batch_size", "shard_size", "resolution"])
def test_sizes_of_nothing_leave_no_folder(picture_folder, tmp_path, name):
    dataset, _ = load_image_dataset(picture_folder, cache_dir=str(tmp_path / "cache"))
    options = {name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        encode(dataset, tmp_path / "encoded", **options)
    assert not (tmp_path / "encoded").exists()


def test_a_constant_channel_is_named(tmp_path):
    rng = np.random.default_rng(6)
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image[..., 1] = 77
        Image.fromarray(image).save(tmp_path / "pictures" / f"{k}.png")
    dataset, _ = load_image_dataset(tmp_path / "pictures", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Every channel must vary over the data, channels \[1\] have std"):
        encode(dataset, tmp_path / "encoded", resolution=16)
    assert not (tmp_path / "encoded" / "index.json").exists()


@pytest.mark.parametrize("square", [9.0 + 1e-14, float("nan")])
def test_rounding_does_not_hide_a_constant_channel(square):
    statistics = ChannelStatistics()
    statistics.count, statistics.sum = 1, torch.tensor([3.0, 3.0]).double()
    statistics.sum_of_squares = torch.tensor([square, 10.0], dtype=torch.float64)  # sums round in the 16th digit
    with pytest.raises(ValueError, match=r"channels \[0\] have std"):
        statistics.result()


def test_unfit_vaes_are_refused(pictures, tmp_path, vae):
    dataset, _ = pictures
    with pytest.raises(ValueError, match="`vae` must be in float32 to encode, got torch.bfloat16"):
        encode(dataset, tmp_path, vae=tiny_vae().to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"`num_channels`, .* must be 1 \(grey\) or 3 \(RGB\), got 4"):
        encode(dataset, tmp_path, vae=tiny_vae(in_channels=4))
    with pytest.raises(ValueError, match="must be a multiple of the VAE's factor 4, got 18"):
        encode(dataset, tmp_path, vae=vae, resolution=18)
    grey = encode(dataset, tmp_path / "grey", vae=tiny_vae(in_channels=1))
    assert len(grey) == 10


def test_fingerprint_tells_weights_and_configurations_apart(vae):
    same, other = vae_fingerprint(tiny_vae()), vae_fingerprint(tiny_vae(seed=1))
    assert same == vae_fingerprint(vae)
    assert other["config_hash"] == same["config_hash"]
    assert other["weights_hash"] != same["weights_hash"]
    assert vae_fingerprint(tiny_vae(in_channels=1))["config_hash"] != same["config_hash"]


def test_validate_accepts_a_reloaded_vae_and_names_each_difference(encoded, pictures, vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    reloaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    encoded.validate(vae=reloaded, resolution=RESOLUTION, random_flip=True)
    with pytest.raises(ValueError, match=r"weights_hash differs \(they were encoded with 'tiny'\); .* is 16, not 32"):
        encoded.validate(vae=tiny_vae(seed=1), resolution=32)
    with pytest.raises(ValueError, match="they hold latents"):
        encoded.validate(vae=None, resolution=RESOLUTION)
    unflipped = encode(pictures[0], tmp_path / "unflipped", vae=vae)
    with pytest.raises(ValueError, match="encoded without `random_flip`"):
        unflipped.validate(vae=vae, resolution=RESOLUTION, random_flip=True)
    with pytest.raises(ValueError, match="`flip=True` needs data encoded with `random_flip=True`"):
        unflipped.read(0, flip=True)


def test_an_unknown_format_is_refused(pictures, tmp_path):
    encode(pictures[0], tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format_version": 99}))
    with pytest.raises(ValueError, match="`folder` must have format version 3, .* has 99"):
        LatentDataset(tmp_path)


def test_truncated_shards_are_named_and_made_again(pictures, tmp_path, vae):
    options = {"vae": vae, "shard_size": 4}
    encode(pictures[0], tmp_path, **options)
    before, name = content_of(tmp_path), "shard-00001.safetensors"
    shard, num_bytes = tmp_path / name, len(before[name])
    for damage in (lambda: shard.write_bytes(before[name][:-5]), shard.unlink):
        damage()
        with pytest.raises(
            ValueError, match=f"{name} must have {num_bytes} bytes, found .*delete the file and encode"
        ):
            LatentDataset(tmp_path)
        encode(pictures[0], tmp_path, **options)
        assert content_of(tmp_path) == before


def test_a_shard_that_is_made_again_and_comes_out_otherwise_is_in_the_index(pictures, tmp_path, monkeypatch):
    options = {"shard_size": 4}
    before = encode(pictures[0], tmp_path, **options).index
    (tmp_path / "shard-00000.json").unlink()

    def wait(seconds):
        raise AssertionError("there is nobody to wait for")

    monkeypatch.setattr(encoding.time, "sleep", wait)
    others = pictures[0].select([1, 0, *range(2, len(pictures[0]))])
    after = encode(others, tmp_path, **options)
    assert after.index["shards"][0] != before["shards"][0]
    assert after.index["shards"][1:] == before["shards"][1:]
    after.verify()


def test_altered_files_are_named(pictures, tmp_path):
    encode(pictures[0], tmp_path, shard_size=2).verify()
    for number in (1, 4):
        path = tmp_path / f"shard-0000{number}.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    encoded = LatentDataset(tmp_path)  # sizes are right
    with pytest.raises(ValueError, match="differ from what was written: shard-00001.safetensors, shard-00004.safe"):
        encoded.verify()
    with pytest.raises(ValueError, match="written: shard-00001.safetensors: delete"):
        encoded.verify(num_processes=2, process_index=1)
    index = json.loads((tmp_path / "index.json").read_text())
    index["latents_std"][0] *= 2
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json must be as it was written, it was altered"):
        LatentDataset(tmp_path)


def content_of(folder, *without):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


# There is one server for all tests, which must not know this package: see `processes.py`.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(PRELOADED)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A table of 46 pictures, two of them damaged, and its encoding by one process that was left alone."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(8)
    rows = []
    for k in range(46):
        random_picture(rng).save(folder / "image.png")
        content = (folder / "image.png").read_bytes()
        rows.append({"path": f"{k}.png", "bytes": content[:150] if k in (7, 24) else content})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["elk", "owl", "ram", "yak"])}
    )
    table = datasets.Dataset.from_dict({"image": rows, "label": [k % 3 for k in range(46)]}, features=features)
    (folder / "table").mkdir()
    table.to_parquet(folder / "table" / "train.parquet")
    encode_many(folder, folder / "reference")
    return folder


def encode_many(source, folder, *, kill_at=None, kill_after=None, streaming=False, **options):
    """What the processes of these tests run.

    `kill_at` kills this one before or after that many renames, `kill_after` so many seconds of its own CPU time after
    so many renames, which the load of the machine does not change.
    """
    torch.set_num_threads(1)
    if kill_after is not None:
        rename, left = os.replace, iter(range(kill_after[0], -1000, -1))

        def replace_and_arm(*paths):
            rename(*paths)
            if next(left) == 0:
                # Nobody handles SIGPROF: it ends the process as SIGKILL does, in the middle of whatever it does.
                signal.setitimer(signal.ITIMER_PROF, kill_after[1])

        os.replace = replace_and_arm
    if kill_at is not None:
        replace, count = os.replace, iter(range(1000))

        def replace_or_die(*paths):
            number = next(count)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
            if number + 0.5 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_or_die
    encoding.POLL_SECONDS = 0.02
    dataset, id2label = load_image_dataset(
        dataset_name=str(source / "table"), cache_dir=str(source / "cache"), streaming=streaming
    )
    options = {"random_flip": True, "batch_size": 3, "shard_size": 4} | options
    vae = tiny_vae()
    return encode(dataset, folder, vae=vae, id2label=id2label, vae_id="tiny", skip_corrupt=True, **options)


def start(*arguments, **options):
    process = processes.Process(target=encode_many, args=arguments, kwargs=options)
    process.start()
    return process


def finish(*all_started):
    for process in all_started:
        process.join(TIMEOUT)
    assert [process.exitcode for process in all_started] == [0] * len(all_started)


def test_the_reference_counts_everything_once(many):
    encoded = LatentDataset(many / "reference")
    assert len(encoded) == 44
    assert encoded.index["skipped"] == ["7.png", "24.png"]
    assert [encoded[k]["label"] for k in range(44)] == [k % 3 for k in range(46) if k not in (7, 24)]
    assert encoded.index["num_samples_per_class"] == {"0": 15, "1": 14, "2": 15, "3": 0}  # 16, 15, 15 less 24 and 7


def test_killed_at_random_moments_nothing_is_lost_or_repeated(many, tmp_path):
    num_killed = 0
    while num_killed < 4:
        # After a rename of this process, so that a try goes on from where the last one was killed.
        process = start(many, tmp_path / "a", kill_after=(random.randint(0, 3), random.uniform(0.001, 0.02)))
        process.join(TIMEOUT)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGPROF
        num_killed += 1
    # Of the 26 renames there were, the first two tries made a few.
    assert num_killed > 1
    finish(start(many, tmp_path / "a"))
    assert content_of(tmp_path / "a") == content_of(many / "reference")


def test_killed_during_a_save_nothing_is_lost_or_repeated(many, tmp_path):
    # settings, then shard and sidecar in turn, then the index: 26 renames when nothing is interrupted
    for kill_at in (0, 0.5, 1, 1.5, 2, 2.5, 5):
        process = start(many, tmp_path / "a", kill_at=kill_at)
        process.join(TIMEOUT)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "a" / "index.json").exists()
    assert list((tmp_path / "a").glob("*.unfinished"))
    finish(start(many, tmp_path / "a"))
    assert content_of(tmp_path / "a") == content_of(many / "reference")


def test_finished_shards_are_not_made_again(many, tmp_path):
    process = start(many, tmp_path / "a", kill_at=9)
    process.join(TIMEOUT)
    shards = {path: path.stat().st_ino for path in (tmp_path / "a").glob("shard-*.safetensors")}
    assert len(shards) == 4
    finish(start(many, tmp_path / "a"))
    assert {path: path.stat().st_ino for path in shards} == shards


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_equal_one(many, tmp_path, num_processes):
    shares = [{"num_processes": num_processes, "process_index": k} for k in range(num_processes)]
    finish(*(start(many, tmp_path / "a", **share) for share in shares))
    assert content_of(tmp_path / "a") == content_of(many / "reference")


def test_killed_with_two_processes_and_finished_by_three(many, tmp_path):
    two = [start(many, tmp_path / "a", num_processes=2, process_index=k, kill_at=4 - k) for k in range(2)]
    for process in two:
        process.join(TIMEOUT)
    assert not (tmp_path / "a" / "index.json").exists()
    finish(*(start(many, tmp_path / "a", num_processes=3, process_index=k) for k in range(3)))
    assert content_of(tmp_path / "a") == content_of(many / "reference")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stream_equals_a_table(many, tmp_path, num_processes):
    for kill_at in (3, 4):
        process = start(many, tmp_path / "a", streaming=True, kill_at=kill_at)
        process.join(TIMEOUT)
        assert process.exitcode == -signal.SIGKILL
    shares = [{"num_processes": num_processes, "process_index": k} for k in range(num_processes)]
    finish(*(start(many, tmp_path / "a", streaming=True, **share) for share in shares))
    assert content_of(tmp_path / "a", "settings.json") == content_of(many / "reference", "settings.json")


def test_threads_change_nothing(many, tmp_path):
    for num_workers in (0, 3):  # a batch of 3 keeps 6 images ahead, of the 46 in this shard
        encode_many(many, tmp_path / str(num_workers), num_workers=num_workers, shard_size=46)
    assert content_of(tmp_path / "3") == content_of(tmp_path / "0")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_process_makes_its_own_shards_only(many, tmp_path, monkeypatch, streaming):
    def no_others(ready, path):
        if not ready():
            raise InterruptedError(path.name)

    monkeypatch.setattr(encoding, "_wait_until", no_others)
    for process_index, waits_for in ((0, "shard-00001.safetensors"), (2, "shard-00001.safetensors")):
        with pytest.raises(InterruptedError, match=waits_for):
            encode_many(many, tmp_path, num_processes=3, process_index=process_index, streaming=streaming)
        made = {int(path.stem.removeprefix("shard-")) for path in tmp_path.glob("shard-*.json")}
        assert made == {k for k in range(12) if k % 3 in (0, process_index)}


def test_a_stream_of_a_folder_and_of_bare_ids(pictures, picture_folder, tmp_path, vae, caplog):
    options = {"vae": vae, "shard_size": 5}
    whole = encode(pictures[0], tmp_path / "a", id2label=pictures[1], **options)
    stream, id2label = load_image_dataset(picture_folder, streaming=True)
    encode(stream, tmp_path / "b", id2label=id2label, **options)
    assert content_of(tmp_path / "b", "settings.json") == content_of(tmp_path / "a", "settings.json")

    rows = [{"image": row["image"], "label": 2 * row["label"]} for row in pictures[0]]
    ids = datasets.Dataset.from_list(
        rows, features=datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    )
    bare = encode(ids.to_iterable_dataset(), tmp_path / "c", id2label={}, **options)
    assert bare.id2label == {k: str(k) for k in range(5)}
    assert [bare[k]["label"] for k in range(10)] == [2 * whole[k]["label"] for k in range(10)]
    assert bare.index["num_samples_per_class"] == {"0": 4, "1": 0, "2": 3, "3": 0, "4": 3}
    with pytest.raises(ValueError, match=r"Labels must be ids of `id2label`, .*dog.*0.png has 2"):
        encode(ids.to_iterable_dataset(), tmp_path / "d", id2label={0: "a", 1: "b"}, **options)


def test_a_finished_folder_is_opened(encoded, pictures, vae):
    before = {path: path.stat().st_mtime_ns for path in encoded.folder.iterdir()}
    options = {"vae": vae, "vae_id": "another name", "id2label": pictures[1]}
    again = encode(pictures[0], encoded.folder, random_flip=True, shard_size=3, **options)
    assert again.index == encoded.index
    assert {path: path.stat().st_mtime_ns for path in encoded.folder.iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_begun_with_other_settings_is_refused(pictures, tmp_path, vae, finished):
    dataset, id2label = pictures
    options = {"vae": vae, "random_flip": True, "shard_size": 4, "id2label": id2label}
    encode(dataset, tmp_path, **options)
    if not finished:
        (tmp_path / "index.json").unlink()
    before = content_of(tmp_path)
    others = [
        ({"resolution": 32}, r"resolution 16 \(now 32\)"),
        ({"random_flip": False}, r"random_flip true \(now false\)"),
        ({"shard_size": 5}, r"shard_size 4 \(now 5\)"),
        ({"vae": tiny_vae(seed=1)}, r"vae .*weights_hash.* \(now .*weights_hash"),
        ({"vae": None, "num_channels": 1}, r"vae .* \(now null\), num_channels 3 \(now 1\)"),
        ({"id2label": None}, r"id2label .*cat.* \(now null\)"),
        ({"dataset": dataset.select(range(9))}, r"num_rows 10 \(now 9\)"),
    ]
    for other, message in others:
        with pytest.raises(ValueError, match=f"holds an encoding with {message}"):
            encode(**{"dataset": dataset, "folder": tmp_path, **options, **other})
    assert content_of(tmp_path) == before
    encode(dataset, tmp_path, **options, batch_size=1)
    if finished:
        assert content_of(tmp_path) == before


def test_a_folder_begun_with_other_data_is_refused(pictures, tmp_path):
    dataset, id2label = pictures
    options = {"shard_size": 4, "id2label": id2label}
    encode(dataset, tmp_path, **options)
    (tmp_path / "index.json").unlink()

    def changed(row, **columns):
        rows = dataset.to_list()
        rows[row] |= columns
        return datasets.Dataset.from_list(rows, features=dataset.features)

    resized = tmp_path / "elsewhere" / os.path.basename(dataset[6]["image"]["path"])
    resized.parent.mkdir()
    random_picture(np.random.default_rng(9), 30, 30).save(resized)
    cases = [
        (changed(1, label=2), "shard-00000"),
        (changed(6, image={"path": str(resized), "bytes": None}), "shard-00001"),
        (changed(9, image={"path": None, "bytes": b"nonsense"}), "shard-00002"),
        (dataset.select([1, 0, *range(2, 10)]), "shard-00000"),
        (dataset.to_iterable_dataset().take(9), "shard-00002"),
        (dataset.to_iterable_dataset().take(8), "these end before .*shard-00002"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=f"must have been begun with the same data: .*{message}"):
            encode(data, tmp_path, **options)
    encode(dataset, tmp_path, **options)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="`folder` must be new or hold settings.json beside its shards"):
        encode(dataset, tmp_path, **options)


def test_a_process_out_of_range_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"`process_index` must be in \[0, 2\), got 2"):
        encode(pictures[0], tmp_path, resolution=16, num_processes=2, process_index=2)


def anonymous_megabytes():
    """Memory that is no view of a file, which the system could drop."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def rows_that_watch(content, measured):
    for row in range(3000):
        if row % 100 == 99:
            measured.append(anonymous_megabytes())
        yield {"image": {"path": None, "bytes": content}}


def encode_and_watch(folder, queue):
    random_picture(np.random.default_rng(0), 64, 64).save(folder / "a.png")
    measured = []
    features = datasets.Features({"image": datasets.Image(decode=False)})
    arguments = {"content": (folder / "a.png").read_bytes(), "measured": measured}
    stream = datasets.IterableDataset.from_generator(rows_that_watch, features=features, gen_kwargs=arguments)
    encoded = encode(stream, folder / "encoded", resolution=64, shard_size=100, num_workers=1)
    reading = []
    for index in range(3000):
        encoded[index]
        if index % 100 == 99:
            reading.append(anonymous_megabytes())
    queue.put((len(encoded), measured, reading))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads RssAnon of Linux")
def test_memory_does_not_grow_with_the_data(tmp_path):
    queue = processes.Queue()
    process = processes.Process(target=encode_and_watch, args=(tmp_path, queue))
    process.start()
    num_samples, encoding, reading = queue.get(timeout=TIMEOUT)
    finish(process)
    assert num_samples == 3000
    megabytes_of_data = 1500 * 64 * 64 * 3 / 2**20  # between the middles of the two spans compared: 18 MiB
    for measured in (encoding, reading):  # the least, because freed memory returns to the system by fits and starts
        assert min(measured[20:]) - min(measured[5:15]) < megabytes_of_data / 3
