"""Label files beside images."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import random_image

from diffusers_mp.data.images import load_image_dataset


@pytest.fixture
def folder(tmp_path):
    """Three images without classes."""
    for k in range(3):
        random_image(np.random.default_rng(k)).save(tmp_path / f"{k}.png")
    return tmp_path


def labels_in(folder, **options):
    dataset, id2label, _ = load_image_dataset(folder, **options)
    return {row["image"]["path"][-5:]: id2label[row["label"]] for row in dataset}


def test_labels_of_each_kind_of_file(folder):
    rows = [{"file_name": f"{k}.png", "label": name} for k, name in enumerate(("owl", "elk", "owl"))]
    expected = {"0.png": "owl", "1.png": "elk", "2.png": "owl"}
    files = {
        "metadata.csv": '\ufefflabel,file_name\nowl,0.png\n"elk",1.png\nowl,2.png\n',
        "metadata.jsonl": "\n".join(map(json.dumps, reversed(rows))) + "\n\n",
        "metadata.parquet": None,
        "dataset.json": json.dumps({"labels": [[row["file_name"], row["label"]] for row in rows]}),
    }
    for name, text in files.items():
        if text is None:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / name)
        else:
            (folder / name).write_text(text)
        assert labels_in(folder) == expected
        (folder / name).unlink()


def test_numbers_in_a_csv_are_names(folder):
    (folder / "metadata.csv").write_text("file_name,label\n0.png,10\n1.png,9\n2.png,10\n")
    assert load_image_dataset(folder).id2label == {0: "9", 1: "10"}
    (folder / "metadata.csv").write_text("file_name,label\n0.png,7\n1.png,007\n2.png,7\n")
    with pytest.raises(ValueError, match="'007', '7'"):
        load_image_dataset(folder)


def test_dataset_json_without_labels(folder):
    (folder / "dataset.json").write_text('{"labels": null}')
    assert load_image_dataset(folder).id2label is None


def test_a_label_file_in_each_folder(folder):
    for name, numbers in (("a", (0,)), ("b", (1, 2))):
        (folder / name).mkdir()
        for k in numbers:
            (folder / f"{k}.png").rename(folder / name / f"{k}.png")
    (folder / "a" / "metadata.csv").write_text("file_name,label\n0.png,x\n")
    (folder / "b" / "metadata.csv").write_text("file_name,label\n1.png,y\n2.png,x\n")
    assert labels_in(folder) == {"0.png": "x", "1.png": "y", "2.png": "x"}
    # A file of one split does not speak of another.
    (folder / "a").rename(folder / "train")
    assert labels_in(folder, split="train") == {"0.png": "x"}
    (folder / "b").rename(folder / "test")
    with pytest.raises(ValueError, match="folders are called test, train"):
        load_image_dataset(folder)
    # One above them speaks of all.
    for name in ("train", "test"):
        (folder / name / "metadata.csv").unlink()
    (folder / "metadata.csv").write_text("file_name,label\ntrain/0.png,x\ntest/1.png,y\ntest/2.png,x\n")
    assert labels_in(folder, split="train") == {"0.png": "x"}


DAMAGED = [
    ("file_name,label\n0.png,a\n1.png,b\n", "must have a row for each image, 1 of 3 have none, such as '2.png'"),
    ("file_name,label\n0.png,a\n0.png,b\n", "row 3, names '0.png' again"),
    ("file_name,label\n../0.png,a\n", "row 2, must name an image that can be read in this folder, got '../0.png'"),
    ("file_name,label\n/etc/a.png,a\n", "row 2, must name an image .* got '/etc/a.png'"),
    ("file_name,label\n9.png,a\n", "row 2, must name an image .* got '9.png'"),
    ("image,label\n0.png,a\n", "row 2, must have a column `file_name`"),
    ("file_name,label\n0.png\n", "cannot be read: .*not as many cells"),
    ("file_name,label\n0.png,a,b\n", "cannot be read: .*not as many cells"),
    ("file_name,label\n0.png,a\n1.png,\n2.png,b\n", "has none in row 1 .*1.png"),
    ("file_name,label\n0.png,\xff\n", "cannot be read: UnicodeDecodeError"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGED)
def test_damaged_label_files_name_the_row(folder, text, message):
    (folder / "metadata.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        load_image_dataset(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"file_name": 3}', '{"label": "a"}'])
def test_damaged_json_lines(folder, text):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match="metadata.jsonl,? (row 1|must be a table of images)"):
        load_image_dataset(folder)


def test_labels_of_two_kinds(folder):
    labels = ["a", 1, "b"]
    rows = [json.dumps({"file_name": f"{k}.png", "label": label}) for k, label in enumerate(labels)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="metadata.jsonl .* must hold values of one kind in each column"):
        load_image_dataset(folder)


def test_folders_beside_a_label_file_without_labels(folder):
    (folder / "a").mkdir()
    for k in range(3):
        (folder / f"{k}.png").rename(folder / "a" / f"{k}.png")
    (folder / "metadata.csv").write_text("file_name,number\na/0.png,1\na/1.png,2\na/2.png,3\n")
    with pytest.raises(ValueError, match="must have a column 'label', beside which folders name no classes"):
        load_image_dataset(folder)
    assert load_image_dataset(folder, class_level="first").report.counts == {"a": 3}
