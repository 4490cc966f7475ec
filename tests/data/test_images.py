"""Opening folders and tables of images, on small real files."""

import os
import shutil

import datasets
import numpy as np
import pytest
from helpers import random_image

from diffusers_mp.data.images import load_image_dataset


def test_an_image_folder_brings_its_classes(image_data, image_folder):
    dataset, id2label = image_data
    assert id2label == {0: "cat", 1: "dog", 2: "test"}
    assert len(dataset) == 10
    for row in dataset:
        assert os.path.basename(os.path.dirname(row["image"]["path"])) == id2label[row["label"]]


def test_a_stray_image_does_not_silently_remove_the_labels(image_folder, tmp_path):
    for path in sorted(image_folder.rglob("*.png")):
        (tmp_path / "mixed" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mixed" / path.parent.name / path.name).write_bytes(path.read_bytes())
    random_image(np.random.default_rng(0)).save(tmp_path / "mixed" / "stray.png")
    with pytest.raises(ValueError, match="class folders of one depth.*images in .*mixed' and in '.*mixed/"):
        load_image_dataset(tmp_path / "mixed", cache_dir=str(tmp_path / "cache"))


def save_table(folder, columns, **features):
    """A data set of parquet files, found by `dataset_name` like one of the Hub."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), **features}) if features else None
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return {"dataset_name": str(folder), "cache_dir": str(folder.parent / "cache")}


def three_images():
    rng = np.random.default_rng(2)
    return [random_image(rng) for _ in range(3)]


def test_integer_and_string_labels(tmp_path):
    integers = save_table(tmp_path / "a", {"image": three_images(), "kind": [1, 0, 1]})
    assert load_image_dataset(**integers, label_column="kind")[1] == {0: "0", 1: "1"}
    strings = save_table(tmp_path / "b", {"image": three_images(), "label": ["owl", "elk", "owl"]})
    dataset, id2label = load_image_dataset(**strings)
    assert id2label == {0: "elk", 1: "owl"}
    assert dataset["label"][:] == [1, 0, 1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 2, 2], "has 2 but not 1"),
        ([0, 10**9, 2], "has 1000000000 but not 1"),
        ([0, -1, 1], "holds -1"),
        ([0, None, 1], "holds None"),
        ([False, True, True], "holds (False|True)"),
    ],
)
def test_wrong_ids_are_refused(tmp_path, ids, message):
    source = save_table(tmp_path / "a", {"image": three_images(), "label": ids})
    with pytest.raises(ValueError, match=message):
        load_image_dataset(**source)


def test_missing_columns_are_named_with_those_there(tmp_path):
    source = save_table(tmp_path / "a", {"image": three_images(), "label": [0, 1, 0]})
    with pytest.raises(ValueError, match=r"`image_column` must be one of \['image', 'label'\], got 'img'"):
        load_image_dataset(**source, image_column="img")
    with pytest.raises(ValueError, match=r"`label_column` must be one of \['image', 'label'\], got 'fine'"):
        load_image_dataset(**source, label_column="fine")
    with pytest.raises(ValueError, match="`image_column` must hold images or their paths, 'label' holds"):
        load_image_dataset(**source, image_column="label")


def test_labels_of_a_metadata_file(tmp_path):
    for k, image in enumerate(three_images()):
        (tmp_path / "a").mkdir(exist_ok=True)
        image.save(tmp_path / "a" / f"{k}.png")
    (tmp_path / "a" / "metadata.csv").write_text("file_name,label\n0.png,owl\n1.png,elk\n2.png,owl\n")
    dataset, id2label = load_image_dataset(tmp_path / "a", cache_dir=str(tmp_path / "cache"))
    assert id2label == {0: "elk", 1: "owl"}
    assert sorted(dataset["label"][:]) == [0, 1, 1]


def test_folder_without_images_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match="`train_data_dir` must be a folder of images, '.*empty' holds none"):
        load_image_dataset(tmp_path / "empty", cache_dir=str(tmp_path / "cache"))


def test_folder_whose_name_looks_like_a_pattern(tmp_path):
    (tmp_path / "we[ird]*").mkdir()
    for k, image in enumerate(three_images()):
        image.save(tmp_path / "we[ird]*" / f"{k}.png")
    assert len(load_image_dataset(tmp_path / "we[ird]*", cache_dir=str(tmp_path / "cache"))[0]) == 3


def test_exactly_one_existing_source(tmp_path):
    for sources in ({}, {"train_data_dir": tmp_path, "dataset_name": "somebody/something"}):
        with pytest.raises(ValueError, match="Exactly one of `train_data_dir` and `dataset_name`"):
            load_image_dataset(**sources)
    with pytest.raises(ValueError, match="`train_data_dir` must be a folder of images, got .*nowhere"):
        load_image_dataset(tmp_path / "nowhere")


def test_a_stream_has_the_rows_and_classes_of_the_table(image_folder, image_data, tmp_path):
    stream, id2label = load_image_dataset(image_folder, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert id2label == image_data[1]
    assert list(stream) == list(image_data[0])
    (tmp_path / "mixed" / "a").mkdir(parents=True)
    for name in ("a/1.png", "stray.png"):
        random_image(np.random.default_rng(0)).save(tmp_path / "mixed" / name)
    with pytest.raises(ValueError, match="class folders of one depth"):
        load_image_dataset(tmp_path / "mixed", streaming=True)


def test_labels_of_a_stream(tmp_path):
    integers = save_table(tmp_path / "a", {"image": three_images(), "kind": [1, 0, 1]})
    assert load_image_dataset(**integers, label_column="kind", streaming=True)[1] == {}
    assert load_image_dataset(**integers, streaming=True)[1] is None
    strings = save_table(tmp_path / "b", {"image": three_images(), "label": ["owl", "elk", "owl"]})
    with pytest.raises(
        ValueError, match="`streaming=True` needs ids or classes with names in `label_column`, 'label'"
    ):
        load_image_dataset(**strings, streaming=True)


def test_max_train_samples_of_a_stream(image_folder):
    rows = [
        [row["image"]["path"] for row in load_image_dataset(image_folder, streaming=True, **options)[0]]
        for options in ({"max_train_samples": 4}, {"max_train_samples": 4}, {"max_train_samples": 4, "seed": 1}, {})
    ]
    assert [len(set(paths)) for paths in rows] == [4, 4, 4, 10]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] != rows[3][:4]


def test_max_train_samples_draws_over_the_classes(image_folder, tmp_path):
    kept = [
        load_image_dataset(image_folder, cache_dir=str(tmp_path), max_train_samples=4, seed=seed) for seed in (0, 0, 1)
    ]
    paths = [[row["image"]["path"] for row in dataset] for dataset, _ in kept]
    assert [len(set(p)) for p in paths] == [4, 4, 4]
    assert paths[0] == paths[1] != paths[2]
    assert all(id2label == {0: "cat", 1: "dog", 2: "test"} for _, id2label in kept)
    assert set(kept[0][0]["label"][:]) != {0}  # the first four rows are all cats


def test_links_to_folders_are_refused(image_folder, tmp_path):
    # `datasets` passes them over: a class would be missing.
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "zebra").symlink_to(next(path for path in image_folder.iterdir() if path.is_dir()))
    with pytest.raises(ValueError, match="must hold its folders itself, .*zebra' is a link"):
        load_image_dataset(tmp_path / "images", cache_dir=str(tmp_path / "cache"))


def test_a_metadata_file_without_labels_is_named(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    names = [path.relative_to(tmp_path / "images") for path in (tmp_path / "images").rglob("*.png")]
    rows = "".join(f"{name},{number}\n" for number, name in enumerate(names))
    (tmp_path / "images" / "metadata.csv").write_text("file_name,number\n" + rows)
    with pytest.raises(ValueError, match="must have a column `label` in its metadata file"):
        load_image_dataset(tmp_path / "images", cache_dir=str(tmp_path / "cache"))


def test_a_stream_that_does_not_tell_its_columns_is_refused(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "rows.csv").write_text("image,label\na.png,0\n")
    with pytest.raises(ValueError, match="`streaming=True` needs a source that tells its columns beforehand"):
        load_image_dataset(dataset_name=str(tmp_path / "table"), streaming=True)
