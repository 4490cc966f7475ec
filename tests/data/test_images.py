"""Opening folders and tables of images, on small real files; test_folders.py has the layouts of folders."""

import os
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import random_image

from diffusers_mp.data.images import load_image_dataset


def test_an_image_folder_brings_its_classes(image_data, image_folder):
    dataset, id2label = image_data
    assert id2label == {0: "cat", 1: "dog", 2: "test"}
    assert len(dataset) == 10
    for row in dataset:
        assert os.path.basename(os.path.dirname(row["image"]["path"])) == id2label[row["label"]]


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
    dataset, id2label, _ = load_image_dataset(**strings)
    assert id2label == {0: "elk", 1: "owl"}
    assert dataset["label"][:] == [1, 0, 1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 2, 2], "has 2 but not 1"),
        ([0, 10**9, 2], "has 1000000000 but not 1"),
        ([0, -1, 1], "holds -1"),
        ([False, True, True], "holds (False|True)"),
    ],
)
def test_wrong_ids_are_refused(tmp_path, ids, message):
    source = save_table(tmp_path / "a", {"image": three_images(), "label": ids})
    with pytest.raises(ValueError, match=message):
        load_image_dataset(**source)


def test_missing_columns_are_named_with_those_there(tmp_path):
    source = save_table(tmp_path / "a", {"image": three_images(), "label": [0, 1, 0]})
    with pytest.raises(
        ValueError, match=r"`image_column` must be one of \['image', 'label'\], got 'img'; images are in"
    ):
        load_image_dataset(**source, image_column="img")
    with pytest.raises(ValueError, match=r"`label_column` must be one of \['image', 'label'\], or none, got 'fine'"):
        load_image_dataset(**source, label_column="fine")
    with pytest.raises(ValueError, match="`image_column` must hold images, 'label' holds"):
        load_image_dataset(**source, image_column="label")


def test_exactly_one_existing_source(tmp_path):
    for sources in ({}, {"train_data_dir": tmp_path, "dataset_name": "somebody/something"}):
        with pytest.raises(ValueError, match="Exactly one of `train_data_dir` and `dataset_name`"):
            load_image_dataset(**sources)
    with pytest.raises(ValueError, match="`train_data_dir` must be a folder of images, got .*nowhere"):
        load_image_dataset(tmp_path / "nowhere")


def test_labels_of_a_stream(tmp_path):
    integers = save_table(tmp_path / "a", {"image": three_images(), "kind": [1, 0, 1]})
    assert load_image_dataset(**integers, label_column="kind", streaming=True)[1] == {}
    assert load_image_dataset(**integers, label_column=None, streaming=True)[1] is None
    strings = save_table(tmp_path / "b", {"image": three_images(), "label": ["owl", "elk", "owl"]})
    with pytest.raises(ValueError, match="`streaming` needs ids or classes with names in `label_column`, 'label'"):
        load_image_dataset(**strings, streaming=True)


def test_max_train_samples_draws_over_the_classes(image_folder, tmp_path):
    kept = [
        load_image_dataset(image_folder, cache_dir=str(tmp_path), max_train_samples=4, seed=seed) for seed in (0, 0, 1)
    ]
    paths = [[row["image"]["path"] for row in dataset] for dataset, *_ in kept]
    assert [len(set(p)) for p in paths] == [4, 4, 4]
    assert paths[0] == paths[1] != paths[2]
    assert all(id2label == {0: "cat", 1: "dog", 2: "test"} for _, id2label, _ in kept)
    assert set(kept[0][0]["label"][:]) != {0}  # the first four rows are all cats


def test_numbers_as_text_are_in_order(tmp_path):
    source = save_table(tmp_path / "a", {"image": three_images(), "label": ["10", "9", "10"]})
    dataset, id2label, report = load_image_dataset(**source)
    assert id2label == {0: "9", 1: "10"}
    assert dataset["label"][:] == [1, 0, 1]
    assert report.counts == {"9": 1, "10": 2}
    same = save_table(tmp_path / "b", {"image": three_images(), "label": ["7", "007", "7"]})
    with pytest.raises(ValueError, match="must differ as numbers, column 'label' has '007', '7'"):
        load_image_dataset(**same)


@pytest.mark.parametrize("labels", [["a", "", "b"], ["a", None, "b"], [0, None, 1], [0.0, float("nan"), 1.0]])
def test_a_missing_label_names_its_row(tmp_path, labels):
    source = save_table(tmp_path / "a", {"image": three_images(), "label": labels})
    with pytest.raises(ValueError, match="a label in each row, 'label' has none in row 1"):
        load_image_dataset(**source)


@pytest.mark.parametrize("labels", [[[0], [1], [0]], [0.5, 1.0, 0.0], [{"a": 1}, {"a": 2}, {"a": 1}]])
def test_labels_that_are_none(tmp_path, labels):
    source = save_table(tmp_path / "a", {"image": three_images(), "label": labels})
    with pytest.raises(ValueError, match="`label_column` must hold names or ids from 0 up"):
        load_image_dataset(**source)


@pytest.mark.parametrize("name", ["fine_label", "cls", "Category"])
def test_classes_under_another_name_are_not_passed_over(tmp_path, name):
    source = save_table(tmp_path / "a", {"image": three_images(), name: [0, 1, 0]})
    with pytest.raises(ValueError, match=f"must say whether '{name}' holds the classes: name it, or none"):
        load_image_dataset(**source)
    assert load_image_dataset(**source, label_column=name).id2label == {0: "0", 1: "1"}
    assert load_image_dataset(**source, label_column=None).id2label is None


def test_a_class_without_images_is_said(tmp_path):
    names = datasets.ClassLabel(names=["elk", "owl", "yak"])
    source = save_table(tmp_path / "a", {"image": three_images(), "label": [0, 1, 0]}, label=names)
    assert load_image_dataset(**source).report.lines()[1:] == [
        "3 classes: elk (2), owl (1), yak (0)",
        "warning: 1 of 3 classes have no image to train on: yak",
    ]


def test_a_table_without_rows_is_refused(tmp_path):
    empty = pa.array([], pa.binary())
    folder = write_parquet(tmp_path / "a" / "a.parquet", image=empty, label=pa.array([], pa.string()))
    with pytest.raises(ValueError, match="`train_data_dir` cannot be '.*a': "):  # `datasets` itself reads none
        load_image_dataset(folder, cache_dir=str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"image": [], "label": []}).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match="`train_data_dir` cannot be '.*b': "):
        load_image_dataset(tmp_path / "b")


def content_of(image):
    return datasets.Image().encode_example(image)["bytes"]


def write_parquet(path, **columns):
    path.parent.mkdir()
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path.parent)


def cells_of(contents, path=None):
    cells = [{"bytes": content, "path": path} for content in contents]
    return pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def test_parquet_of_other_tools(tmp_path):
    """Bytes alone, and the struct of `datasets` without its description."""
    contents = [content_of(image) for image in three_images()]
    for name, column in (("bytes", contents), ("struct", cells_of(contents))):
        folder = write_parquet(tmp_path / name / "part.parquet", image=column, label=["b", "a", "b"])
        dataset, id2label, _ = load_image_dataset(folder, cache_dir=str(tmp_path / "cache"))
        assert [row["image"]["bytes"] for row in dataset] == contents
        assert [id2label[label] for label in dataset["label"]] == ["b", "a", "b"]


def test_files_that_a_table_names_are_not_opened(tmp_path):
    secret = tmp_path / "secret.png"
    random_image(np.random.default_rng(0)).save(secret)
    options = {"cache_dir": str(tmp_path / "cache")}
    text = write_parquet(tmp_path / "text" / "a.parquet", image=[str(secret)])
    with pytest.raises(ValueError, match="'image' holds text. Files that a data set names are not opened"):
        load_image_dataset(dataset_name=text, **options)
    struct = write_parquet(tmp_path / "struct" / "a.parquet", image=cells_of([None], str(secret)))
    with pytest.raises(ValueError, match="names a file in row 0 .*secret.png"):
        load_image_dataset(dataset_name=struct, **options)
    with pytest.raises(ValueError, match="names a file in a row .*secret.png"):
        list(load_image_dataset(dataset_name=struct, streaming=True)[0])


def test_what_save_to_disk_wrote(image_data, image_folder, tmp_path):
    dataset, id2label = image_data
    dataset.save_to_disk(tmp_path / "one")
    loaded, names, report = load_image_dataset(tmp_path / "one")
    assert names == id2label
    assert report.counts == {"cat": 4, "dog": 3, "test": 3}
    files = sorted(image_folder.rglob("*.png"))
    assert [row["image"]["bytes"] for row in loaded] == [path.read_bytes() for path in files]
    datasets.DatasetDict(train=dataset, test=dataset.select([0, 5])).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"`split` must say which of \['test', 'train'\]"):
        load_image_dataset(tmp_path / "two")
    assert load_image_dataset(tmp_path / "two", split="test").report.num_images == 2
    with pytest.raises(ValueError, match="`split` must be one of .* got 'dev'"):
        load_image_dataset(tmp_path / "two", split="dev")


def test_parquet_with_splits(tmp_path):
    (tmp_path / "a").mkdir()
    for split in ("train", "test"):
        columns = {"image": [content_of(image) for image in three_images()], "label": [0, 1, 0]}
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"`split` must say which of \['test', 'train'\]"):
        load_image_dataset(tmp_path / "a", cache_dir=str(tmp_path / "cache"))
    assert load_image_dataset(tmp_path / "a", split="test", cache_dir=str(tmp_path / "cache")).report.num_images == 3


def test_webdataset_archives(tmp_path):
    (tmp_path / "a").mkdir()
    with tarfile.open(tmp_path / "a" / "0.tar", "w") as archive:
        for k, image in enumerate(three_images()):
            image.save(tmp_path / f"{k}.png")
            (tmp_path / f"{k}.cls").write_text(str(k % 2))
            for suffix in ("png", "cls"):
                archive.add(tmp_path / f"{k}.{suffix}", f"{k}.{suffix}")
    options = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="got 'image'; images are in 'png'"):
        load_image_dataset(tmp_path / "a", **options)
    dataset, id2label, _ = load_image_dataset(tmp_path / "a", image_column="png", label_column="cls", **options)
    assert [id2label[label] for label in dataset["cls"]] == ["0", "1", "0"]
    assert [row["png"]["bytes"] for row in dataset] == [(tmp_path / f"{k}.png").read_bytes() for k in range(3)]


def test_max_train_samples_of_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # of a reader that is ended early
    source = save_table(tmp_path / "a", {"image": three_images() * 4, "row": list(range(12))})
    rows = [
        [row["row"] for row in load_image_dataset(**source, streaming=True, **options)[0]]
        for options in ({"max_train_samples": 4}, {"max_train_samples": 4}, {"max_train_samples": 4, "seed": 1}, {})
    ]
    assert [len(set(of)) for of in rows] == [4, 4, 4, 12]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] != rows[3][:4]


def test_arguments_without_effect_are_refused(image_folder, tmp_path):
    for options, message in (
        ({"streaming": True}, "`streaming` is for data sets"),
        ({"dataset_config_name": "x"}, "`dataset_config_name` is for data sets"),
        ({"image_column": "img"}, "`image_column` must be one of"),
        ({"label_column": "kind"}, "`label_column` must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_dataset(image_folder, **options)
    table = save_table(tmp_path / "a", {"image": three_images()})
    for options in ({"class_level": "first"}, {"split": "test"}):
        with pytest.raises(ValueError, match="`(class_level|split)`"):
            load_image_dataset(**table, **options)
    for options in ({"train_data_dir": ""}, {"dataset_name": " "}):
        with pytest.raises(ValueError, match="must not be empty"):
            load_image_dataset(**options)
