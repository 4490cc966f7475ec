"""Encoded again after the source was edited, touched, moved or left alone: what is noticed, and what it costs."""

import builtins
import errno
import io
import json
import os
import shutil

import datasets
import numpy as np
import pytest
from helpers import content_of, encode, random_image, tiny_vae

from diffusers_mp.data import shards
from diffusers_mp.data.changes import SourceState, row_digest
from diffusers_mp.data.images import load_image_dataset


COLUMNS = {"cell": "image", "label": "label"}


@pytest.fixture
def bitmaps(tmp_path):
    """Ten images in two classes, all of one size in bytes."""
    rng = np.random.default_rng(4)
    for k in range(10):
        folder = tmp_path / "images" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        random_image(rng).save(folder / f"{k}.bmp")
    return tmp_path / "images"


@pytest.fixture
def encode_bitmaps(bitmaps, tmp_path):
    """Opens the folder as a new run does, and encodes it in shards of 3: a0 a2 a4, a6 a8 b1, b3 b5 b7, b9."""

    def encode_bitmaps(folder=bitmaps, **options):
        dataset, id2label, *_ = load_image_dataset(folder, cache_dir=str(tmp_path / "cache"))
        return encode(dataset, tmp_path / "encoded", id2label=id2label, **{"shard_size": 3} | options)

    return encode_bitmaps


@pytest.fixture
def opened(monkeypatch):
    """Names of the images that are opened."""
    names, open_file = [], io.open

    def record(file, *args, **options):
        if str(file).endswith((".bmp", ".png")):
            names.append(os.path.basename(file))
        return open_file(file, *args, **options)

    monkeypatch.setattr(builtins, "open", record)
    monkeypatch.setattr(io, "open", record)
    return names


def edit(path):
    """Other pixels in a file of the same size."""
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)


def touch(path):
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("with_vae", [True, False])
@pytest.mark.parametrize("finished", [True, False])
def test_an_edited_image_is_named(bitmaps, encode_bitmaps, tmp_path, finished, with_vae):
    options = {"vae": tiny_vae() if with_vae else None}
    encode_bitmaps(**options)
    if not finished:
        (tmp_path / "encoded" / "index.json").unlink()
    before = content_of(tmp_path / "encoded")
    path = bitmaps / "b" / "5.bmp"
    former = path.read_bytes(), path.stat()
    edit(path)
    assert path.stat().st_size == former[1].st_size
    message = f"{path} is not what .*shard-00002.* was made from. It or its label was edited, .* to encode anew"
    with pytest.raises(ValueError, match=message):
        encode_bitmaps(**options)
    # Its times put back, as a tool does that means well.
    os.utime(path, ns=(former[1].st_atime_ns, former[1].st_mtime_ns))
    with pytest.raises(ValueError, match=message):
        encode_bitmaps(**options)
    assert content_of(tmp_path / "encoded") == before
    path.write_bytes(former[0])
    encode_bitmaps(**options)


def test_an_image_that_takes_the_place_of_another_is_named(bitmaps, encode_bitmaps):
    encode_bitmaps()
    (bitmaps / "a" / "2.bmp").rename(bitmaps / "a" / "3.bmp")
    with pytest.raises(ValueError, match=r"3\.bmp is not what .* was made from"):
        encode_bitmaps()
    (bitmaps / "a" / "3.bmp").unlink()
    with pytest.raises(ValueError, match=r"number of images 10 \(now 9\)"):
        encode_bitmaps()


def test_a_damaged_image_may_be_taken_away_before_all_is_encoded(bitmaps, encode_bitmaps, tmp_path):
    path = bitmaps / "b" / "7.bmp"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"7\.bmp"):
        encode_bitmaps()
    shards_before = {path: path.stat().st_ino for path in (tmp_path / "encoded").glob("shard-*")}
    assert len(shards_before) == 4
    path.unlink()
    encoded = encode_bitmaps()
    assert (len(encoded), encoded.index["num_rows"]) == (9, 9)
    assert {path: path.stat().st_ino for path in shards_before} == shards_before
    # One before them is another matter.
    (tmp_path / "encoded" / "index.json").unlink()
    (bitmaps / "a" / "0.bmp").unlink()
    with pytest.raises(ValueError, match=r"2\.bmp is not what .*shard-00000.* was made from"):
        encode_bitmaps()


def test_a_finished_encoding_is_not_read_again_from_its_source(encode_bitmaps, opened, tmp_path):
    first = encode_bitmaps()
    assert sorted(opened) == [f"{k}.bmp" for k in range(10)]
    opened.clear()
    before = content_of(tmp_path / "encoded")
    assert encode_bitmaps().index == first.index
    assert opened == []
    assert content_of(tmp_path / "encoded") == before


def test_only_shards_with_touched_images_are_read_and_once(bitmaps, encode_bitmaps, opened):
    first = encode_bitmaps()
    opened.clear()
    touch(bitmaps / "a" / "8.bmp")
    assert encode_bitmaps(num_workers=1).index == first.index
    assert sorted(opened) == ["1.bmp", "6.bmp", "8.bmp"]
    opened.clear()
    encode_bitmaps()
    assert opened == []


def test_an_image_that_is_edited_while_it_is_encoded_is_noticed(bitmaps, encode_bitmaps, monkeypatch):
    read_bytes = shards.read_bytes

    def read_and_edit(cell):
        content = read_bytes(cell)
        if cell["path"].endswith("4.bmp"):
            edit(bitmaps / "a" / "4.bmp")
        return content

    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_bytes", read_and_edit)
        encode_bitmaps()
    with pytest.raises(ValueError, match=r"4\.bmp is not what .* was made from"):
        encode_bitmaps()


def test_an_encoding_that_may_only_be_read_is_opened(bitmaps, encode_bitmaps, monkeypatch, caplog):
    first = encode_bitmaps()
    touch(bitmaps / "a" / "8.bmp")

    def refuse(path, content):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(shards, "write_json", refuse)
    assert encode_bitmaps().index == first.index
    assert "Read-only file system" in caplog.text
    assert "shard-00001.json are read again at the next start" in caplog.text


def test_a_process_compares_its_own_shards(bitmaps, encode_bitmaps, opened):
    encode_bitmaps()
    opened.clear()
    for path in bitmaps.rglob("*.bmp"):
        touch(path)
    encode_bitmaps(num_processes=2, process_index=1)
    assert sorted(opened) == ["1.bmp", "6.bmp", "8.bmp", "9.bmp"]
    opened.clear()
    encode_bitmaps()
    assert sorted(opened) == ["0.bmp", "2.bmp", "3.bmp", "4.bmp", "5.bmp", "7.bmp"]


def test_a_folder_may_be_moved_or_copied(bitmaps, encode_bitmaps, opened):
    first = encode_bitmaps()
    opened.clear()
    moved = bitmaps.rename(bitmaps.with_name("moved"))
    assert encode_bitmaps(moved).index == first.index
    assert opened == []
    shutil.copytree(moved, moved.with_name("copied"), copy_function=shutil.copyfile)
    opened.clear()
    assert encode_bitmaps(moved.with_name("copied")).index == first.index
    assert sorted(opened) == [f"{k}.bmp" for k in range(10)]


@pytest.fixture
def table(bitmaps, tmp_path):
    """The images in a parquet file, opened anew at each call."""
    rows = [{"path": path.name, "bytes": path.read_bytes()} for path in sorted(bitmaps.rglob("*.bmp"))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": rows, "label": [k // 5 for k in range(10)]}
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "table" / "train.parquet")

    def open_table(**options):
        return load_image_dataset(dataset_name=str(tmp_path / "table"), cache_dir=str(tmp_path / "cache"), **options)

    return open_table


@pytest.mark.parametrize("source", ["whole", "drawn", "save_to_disk"])
def test_of_a_table_no_row_is_read_again(table, tmp_path, monkeypatch, source):
    table()[0].save_to_disk(tmp_path / "saved")

    def open_again():
        if source == "save_to_disk":
            return datasets.load_from_disk(tmp_path / "saved")
        return table(**({"max_train_samples": 7, "seed": 3} if source == "drawn" else {}))[0]

    first = encode(open_again(), tmp_path / "encoded", id2label={0: "a", 1: "b"}, shard_size=3)
    read_rows, again = datasets.Dataset.__getitem__, open_again()
    with monkeypatch.context() as without_rows:
        without_rows.setattr(datasets.Dataset, "__getitem__", lambda *_: pytest.fail("a row was read"))
        assert encode(again, tmp_path / "encoded", id2label={0: "a", 1: "b"}, shard_size=3).index == first.index
    assert datasets.Dataset.__getitem__ is read_rows


def test_an_edited_table_is_named(table, tmp_path):
    dataset, id2label, *_ = table()
    encode(dataset, tmp_path / "encoded", id2label=id2label, shard_size=3)
    rows = dataset.to_list()
    rows[4]["image"]["bytes"] = rows[5]["image"]["bytes"]  # of the same size
    datasets.Dataset.from_list(rows, features=dataset.features).to_parquet(tmp_path / "table" / "train.parquet")
    with pytest.raises(ValueError, match=rf"{rows[4]['image']['path']} is not what .*shard-00001.* was made from"):
        encode(table()[0], tmp_path / "encoded", id2label=id2label, shard_size=3)


def test_a_table_made_otherwise_is_compared_by_content(table, tmp_path, monkeypatch):
    dataset, id2label, *_ = table()
    first = encode(dataset, tmp_path / "encoded", id2label=id2label, shard_size=3)
    same = datasets.Dataset.from_list(dataset.to_list(), features=dataset.features)
    assert same._fingerprint != dataset._fingerprint
    assert encode(same, tmp_path / "encoded", id2label=id2label, shard_size=3).index == first.index
    # It is known from now on.
    with monkeypatch.context() as without_images:
        without_images.setattr(shards, "read_bytes", lambda _: pytest.fail("an image was read"))
        encode(same, tmp_path / "encoded", id2label=id2label, shard_size=3)

    rows = dataset.to_list()
    rows[7]["image"]["bytes"] = rows[6]["image"]["bytes"]
    other = datasets.Dataset.from_list(rows, features=dataset.features)
    with pytest.raises(ValueError, match=f"{rows[7]['image']['path']} is not what"):
        encode(other, tmp_path / "encoded", id2label=id2label, shard_size=3)


def test_of_a_stream_finished_shards_are_compared_until_all_are(bitmaps, tmp_path):
    dataset, id2label, _ = load_image_dataset(bitmaps)
    stream = dataset.to_iterable_dataset()
    options = {"id2label": id2label, "shard_size": 3}
    first = encode(stream, tmp_path / "encoded", **options)
    edit(bitmaps / "a" / "6.bmp")
    assert encode(stream, tmp_path / "encoded", **options).index == first.index  # as the docs say
    (tmp_path / "encoded" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"6\.bmp is not what .*shard-00001"):
        encode(stream, tmp_path / "encoded", **options)
    edit(bitmaps / "a" / "6.bmp")
    assert encode(stream, tmp_path / "encoded", **options).index == first.index


def test_the_state_is_that_of_names_files_and_labels(bitmaps):
    def table_of(paths, labels):
        cells = [path and {"path": str(path), "bytes": None} for path in paths]
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
        return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)

    def state(paths, labels=(0, 0, 1), rows=(0, 3)):
        return SourceState(table_of(paths, list(labels)), COLUMNS).of(*rows)

    paths = sorted(bitmaps.rglob("*.bmp"))[:3]
    reference = state(paths)
    assert state(paths) == reference
    assert state(paths, labels=(0, 1, 1)) != reference
    assert state([paths[1], paths[0], paths[2]]) != reference
    assert state([*paths[:2], "https://example.com/a.bmp"]) != reference
    assert state([*paths[:2], None]) != reference
    assert state(paths, rows=(0, 2)) != reference
    assert state(paths, (0, 0, 5), (0, 2)) == state([*paths[:2], None], rows=(0, 2))
    for change in (touch, edit, os.remove):
        before = state(paths)
        change(paths[1])
        assert state(paths) != before
    assert SourceState(table_of(paths, [0, 0, 1]).to_iterable_dataset(), COLUMNS).of(0, 3) is None


def test_a_digest_is_of_name_conditions_and_content():
    reference = row_digest("/x/a.png", {"label": 1, "pooled_projections": [0.5]}, b"content")
    assert reference == row_digest("elsewhere/a.png", {"label": 1, "pooled_projections": [0.5]}, b"content")
    others = [
        ("b.png", {"label": 1, "pooled_projections": [0.5]}, b"content"),
        (None, {"label": 1, "pooled_projections": [0.5]}, b"content"),
        ("a.png", {"label": 2, "pooled_projections": [0.5]}, b"content"),
        ("a.png", {"label": 1, "pooled_projections": [0.6]}, b"content"),
        ("a.png", {"label": 1, "pooled_projections": [0.5]}, b"contenu"),
    ]
    digests = {row_digest(*other) for other in others} | {reference}
    assert len(digests) == 6
    assert {len(digest) for digest in digests} == {16}


def test_sidecars_have_a_digest_of_each_row(bitmaps, encode_bitmaps, tmp_path):
    encode_bitmaps()
    sidecar = json.loads((tmp_path / "encoded" / "shard-00001.json").read_text())
    expected = [("a/6", 0), ("a/8", 0), ("b/1", 1)]
    assert sidecar["row_digests"] == "".join(
        row_digest(f"{name[2:]}.bmp", {"label": label}, (bitmaps / f"{name}.bmp").read_bytes())
        for name, label in expected
    )
