"""A folder that is filled: by one process or several, killed or not, from a table or a stream."""

import json
import multiprocessing
import os
import random
import signal
import threading

import datasets
import numpy as np
import pytest
import torch
from helpers import content_of, content_without_source, encode, random_image, tiny_vae
from processes import PRELOADED, TIMEOUT
from tqdm import tqdm

from diffusers_mp.data import encoding
from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.latents import LatentDataset


def test_a_folder_without_classes_is_unlabelled(tmp_path, vae):
    rng = np.random.default_rng(1)
    (tmp_path / "flat").mkdir()
    for k in range(3):
        random_image(rng).save(tmp_path / "flat" / f"{k}.png")
    dataset, id2label, _ = load_image_dataset(tmp_path / "flat", cache_dir=str(tmp_path / "cache"))
    assert id2label is None
    latents = encode(dataset, tmp_path / "encoded", vae=vae, id2label=id2label)
    assert latents.id2label is None
    assert set(latents[0]) == {"mean", "std"}


def test_truncated_shards_are_named_and_made_again(image_data, tmp_path, vae):
    options = {"vae": vae, "shard_size": 4}
    encode(image_data[0], tmp_path, **options)
    before, name = content_of(tmp_path), "shard-00001.safetensors"
    shard, num_bytes = tmp_path / name, len(before[name])
    for damage in (lambda: shard.write_bytes(before[name][:-5]), shard.unlink):
        damage()
        with pytest.raises(
            ValueError, match=f"{name} must have {num_bytes} bytes, found .*delete the file and encode"
        ):
            LatentDataset(tmp_path)
        encode(image_data[0], tmp_path, **options)
        assert content_of(tmp_path) == before


@pytest.mark.parametrize("name", ["settings.json", "shard-00001.json"])
@pytest.mark.parametrize("content", ["[]", "{", "null", ""])
def test_a_file_of_something_else_is_named_and_can_be_removed(image_data, tmp_path, name, content):
    encode(image_data[0], tmp_path, shard_size=4)
    before = content_of(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} .*remove"):
        encode(image_data[0], tmp_path, shard_size=4)
    if name != "settings.json":
        (tmp_path / name).unlink()
        encode(image_data[0], tmp_path, shard_size=4)
        assert content_of(tmp_path) == before


def test_a_shard_that_is_made_again_and_comes_out_otherwise_is_in_the_index(image_data, tmp_path, monkeypatch):
    options = {"shard_size": 4}
    before = encode(image_data[0], tmp_path, **options).index
    (tmp_path / "shard-00000.json").unlink()

    def wait(seconds):
        raise AssertionError("there is nobody to wait for")

    monkeypatch.setattr(encoding.time, "sleep", wait)
    others = image_data[0].select([1, 0, *range(2, len(image_data[0]))])
    after = encode(others, tmp_path, **options)
    assert after.index["shards"][0] != before["shards"][0]
    assert after.index["shards"][1:] == before["shards"][1:]
    after.verify()


# There is one server for all tests, which must not know this package: see `processes.py`.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(PRELOADED)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A table of 46 images, two of them damaged."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(8)
    rows = []
    for k in range(46):
        random_image(rng).save(folder / "image.png")
        content = (folder / "image.png").read_bytes()
        rows.append({"path": f"{k}.png", "bytes": content[:150] if k in (7, 24) else content})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["elk", "owl", "ram", "yak"])}
    )
    table = datasets.Dataset.from_dict({"image": rows, "label": [k % 3 for k in range(46)]}, features=features)
    (folder / "table").mkdir()
    table.to_parquet(folder / "table" / "train.parquet")
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
    dataset, id2label, _ = load_image_dataset(
        dataset_name=str(source / "table"), cache_dir=str(source / "cache"), streaming=streaming
    )
    options = {"random_flip": True, "batch_size": 3, "shard_size": 4} | options
    vae = tiny_vae()
    return encode(dataset, folder, vae=vae, id2label=id2label, vae_id="tiny", skip_corrupt=True, **options)


def fork_for_each(connection, source):
    """A process that has encoded `reference` and forks itself for what comes: they need not import anything again."""
    # tqdm's own lock is shared by all forks: one that is killed while it holds it would stop the others for ever, and
    # so would its thread that holds it at the moment of a fork.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    encode_many(source, source / "reference")
    fork = multiprocessing.get_context("fork")
    connection.send("ready")
    while (calls := connection.recv()) is not None:
        started = [fork.Process(target=encode_many, args=paths, kwargs=options) for paths, options in calls]
        for process in started:
            process.start()
        for process in started:
            process.join(TIMEOUT)
        connection.send([process.exitcode for process in started])


@pytest.fixture(scope="module")
def host(many):
    connection, other_end = processes.Pipe()
    process = processes.Process(target=fork_for_each, args=(other_end, many))
    process.start()
    other_end.close()
    assert connection.recv() == "ready"
    yield connection
    connection.send(None)
    process.join(TIMEOUT)


@pytest.fixture
def encode_in_processes(host, many):
    """Runs `encode_many` for the table in processes at once, one for each set of options; their exit codes."""

    def encode_in_processes(folder, *shares, **options):
        host.send([((many, folder), share | options) for share in shares or [{}]])
        return host.recv()

    return encode_in_processes


def shares(num_processes):
    return [{"num_processes": num_processes, "process_index": k} for k in range(num_processes)]


def test_the_reference_counts_everything_once(host, many):
    encoded = LatentDataset(many / "reference")
    assert len(encoded) == 44
    assert encoded.index["skipped"] == ["7.png", "24.png"]
    assert [encoded[k]["label"] for k in range(44)] == [k % 3 for k in range(46) if k not in (7, 24)]
    assert encoded.index["num_samples_per_class"] == {"0": 15, "1": 14, "2": 15, "3": 0}  # 16, 15, 15 less 24 and 7


def test_killed_at_random_moments_nothing_is_lost_or_repeated(encode_in_processes, many, tmp_path):
    num_killed = 0
    while num_killed < 4:
        # After a rename of this process, so that a try goes on from where the last one was killed.
        moment = random.randint(0, 3), random.uniform(0.001, 0.02)
        (code,) = encode_in_processes(tmp_path / "a", kill_after=moment)
        if code == 0:
            break
        assert code == -signal.SIGPROF
        num_killed += 1
    # Of the 26 renames there were, the first two tries made a few.
    assert num_killed > 1
    assert encode_in_processes(tmp_path / "a") == [0]
    assert content_of(tmp_path / "a") == content_of(many / "reference")


def test_killed_during_a_save_nothing_is_lost_or_repeated(encode_in_processes, many, tmp_path):
    # settings, then shard and sidecar in turn, then the index: 26 renames when nothing is interrupted
    for kill_at in (0, 0.5, 1, 1.5, 2, 2.5, 5):
        assert encode_in_processes(tmp_path / "a", kill_at=kill_at) == [-signal.SIGKILL]
        assert not (tmp_path / "a" / "index.json").exists()
    assert list((tmp_path / "a").glob("*.unfinished"))
    assert encode_in_processes(tmp_path / "a") == [0]
    assert content_of(tmp_path / "a") == content_of(many / "reference")


def test_finished_shards_are_not_made_again(encode_in_processes, tmp_path):
    encode_in_processes(tmp_path / "a", kill_at=9)
    shards = {path: path.stat().st_ino for path in (tmp_path / "a").glob("shard-*.safetensors")}
    assert len(shards) == 4
    assert encode_in_processes(tmp_path / "a") == [0]
    assert {path: path.stat().st_ino for path in shards} == shards


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_equal_one(encode_in_processes, many, tmp_path, num_processes):
    assert encode_in_processes(tmp_path / "a", *shares(num_processes)) == [0] * num_processes
    assert content_of(tmp_path / "a") == content_of(many / "reference")


def test_killed_with_two_processes_and_finished_by_three(encode_in_processes, many, tmp_path):
    two = [share | {"kill_at": 4 - k} for k, share in enumerate(shares(2))]
    assert encode_in_processes(tmp_path / "a", *two) == [-signal.SIGKILL] * 2
    assert not (tmp_path / "a" / "index.json").exists()
    assert encode_in_processes(tmp_path / "a", *shares(3)) == [0] * 3
    assert content_of(tmp_path / "a") == content_of(many / "reference")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stream_equals_a_table(encode_in_processes, many, tmp_path, num_processes):
    for kill_at in (3, 4):
        assert encode_in_processes(tmp_path / "a", streaming=True, kill_at=kill_at) == [-signal.SIGKILL]
    assert encode_in_processes(tmp_path / "a", *shares(num_processes), streaming=True) == [0] * num_processes
    assert content_without_source(tmp_path / "a") == content_without_source(many / "reference")


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


def test_a_stream_of_a_folder_and_of_bare_ids(image_data, tmp_path, vae, caplog):
    options = {"vae": vae, "shard_size": 5}
    whole = encode(image_data[0], tmp_path / "a", id2label=image_data[1], **options)
    encode(image_data[0].to_iterable_dataset(), tmp_path / "b", id2label=image_data[1], **options)
    assert content_without_source(tmp_path / "b") == content_without_source(tmp_path / "a")

    rows = [{"image": row["image"], "label": 2 * row["label"]} for row in image_data[0]]
    ids = datasets.Dataset.from_list(
        rows, features=datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    )
    bare = encode(ids.to_iterable_dataset(), tmp_path / "c", id2label={}, **options)
    assert bare.id2label == {k: str(k) for k in range(5)}
    assert [bare[k]["label"] for k in range(10)] == [2 * whole[k]["label"] for k in range(10)]
    assert bare.index["num_samples_per_class"] == {"0": 4, "1": 0, "2": 3, "3": 0, "4": 3}
    with pytest.raises(ValueError, match=r"must hold ids of `id2label`, 'label' of .*dog.*0.png is 2\."):
        encode(ids.to_iterable_dataset(), tmp_path / "d", id2label={0: "a", 1: "b"}, **options)


def test_a_finished_folder_is_opened(encoded, image_data, vae):
    before = {path: path.stat().st_mtime_ns for path in encoded.folder.iterdir()}
    options = {"vae": vae, "vae_id": "another name", "id2label": image_data[1]}
    again = encode(image_data[0], encoded.folder, random_flip=True, shard_size=3, **options)
    assert again.index == encoded.index
    assert {path: path.stat().st_mtime_ns for path in encoded.folder.iterdir()} == before


def test_a_folder_begun_with_other_data_is_refused(image_data, tmp_path):
    dataset, id2label = image_data
    options = {"shard_size": 4, "id2label": id2label}
    encode(dataset, tmp_path, **options)
    (tmp_path / "index.json").unlink()

    def changed(row, **columns):
        rows = dataset.to_list()
        rows[row] |= columns
        return datasets.Dataset.from_list(rows, features=dataset.features)

    edited = tmp_path / "elsewhere" / os.path.basename(dataset[6]["image"]["path"])
    edited.parent.mkdir()
    random_image(np.random.default_rng(9)).save(edited)
    of_first, name = (dataset[row]["image"]["path"] for row in (0, 1))
    cases = [
        (changed(1, label=2), f"{name} .*shard-00000"),
        (changed(6, image={"path": str(edited), "bytes": None}), f"{edited} .*shard-00001"),
        (changed(9, image={"path": None, "bytes": b"nonsense"}), "row 9 .*shard-00002"),
        (dataset.select([1, 0, *range(2, 10)]), f"{name} .*shard-00000"),
        (dataset.select([0, 0, *range(2, 10)]), f"{of_first} .*shard-00000"),
        (dataset.to_iterable_dataset().take(9), "these end within .*shard-00002"),
        (dataset.to_iterable_dataset().take(8), "these end before .*shard-00002"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=f"`folder` must have been encoded from the same data: {message}"):
            encode(data, tmp_path, **options)
    encode(dataset, tmp_path, **options)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="`folder` must be new or hold settings.json beside its shards"):
        encode(dataset, tmp_path, **options)


def test_a_process_out_of_range_is_refused(image_data, tmp_path):
    with pytest.raises(ValueError, match=r"`process_index` must be in \[0, 2\), got 2"):
        encode(image_data[0], tmp_path, resolution=16, num_processes=2, process_index=2)


def anonymous_megabytes():
    """Memory that is no view of a file, which the system could drop."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def rows_that_watch(content, measured):
    for row in range(3000):
        if row % 100 == 99:
            measured.append(anonymous_megabytes())
        yield {"image": {"path": None, "bytes": content}}


def encode_and_watch(folder):
    random_image(np.random.default_rng(0), 64, 64).save(folder / "a.png")
    measured, reading = [], []
    features = datasets.Features({"image": datasets.Image(decode=False)})
    arguments = {"content": (folder / "a.png").read_bytes(), "measured": measured}
    stream = datasets.IterableDataset.from_generator(rows_that_watch, features=features, gen_kwargs=arguments)
    encoded = encode(stream, folder / "encoded", resolution=64, shard_size=100, num_workers=1)
    for index in range(3000):
        encoded[index]
        if index % 100 == 99:
            reading.append(anonymous_megabytes())
    (folder / "measured.json").write_text(json.dumps([len(encoded), measured, reading]))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads RssAnon of Linux")
def test_memory_does_not_grow_with_the_data(tmp_path):
    process = processes.Process(target=encode_and_watch, args=(tmp_path,))
    process.start()
    process.join(TIMEOUT)
    num_samples, encoding, reading = json.loads((tmp_path / "measured.json").read_text())
    assert num_samples == 3000
    megabytes_of_data = 1500 * 64 * 64 * 3 / 2**20  # between the middles of the two spans compared: 18 MiB
    for measured in (encoding, reading):  # the least, because freed memory returns to the system by fits and starts
        assert min(measured[20:]) - min(measured[5:15]) < megabytes_of_data / 3
