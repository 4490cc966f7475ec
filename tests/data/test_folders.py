"""What a folder of images means: layouts that are taken, and those that could mean two things."""

import io
import os
import shutil

import pytest
from PIL import Image

from diffusers_mp.data.images import load_image_dataset


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "png")
    return content.getvalue()


PNG = png()


def make(root, *names):
    """Small files: a PNG for each name, but for names that say otherwise, and folders for those that end in "/"."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif path.suffix == ".heic":
            path.write_bytes(b"\0\0\0\x18ftypheic")
        elif path.suffix in (".txt", ".csv", ".json", ".zip", ".DS_Store"):
            path.write_bytes(b"no image")
        else:
            path.write_bytes(PNG)
    return root


def classes_in(root, **options):
    """Class of each image by its path, None for unlabelled data."""
    dataset, id2label, _ = load_image_dataset(root, **options)
    paths = [os.path.relpath(row["image"]["path"], root) for row in dataset]
    return dict(zip(paths, [id2label and id2label[row["label"]] for row in dataset], strict=True))


TAKEN = {
    "one level": (["cat/1.png", "dog/1.png"], {}, {"cat/1.png": "cat", "dog/1.png": "dog"}),
    "one class": (["cat/1.png"], {}, {"cat/1.png": "cat"}),
    "in one place": (["1.png", "2.png"], {}, {"1.png": None, "2.png": None}),
    "classes called as a split": (
        ["bus/1.png", "train/1.png"],
        {},
        {"bus/1.png": "bus", "train/1.png": "train"},
    ),
    "all classes called as splits": (
        ["test/1.png", "train/1.png"],
        {"class_level": "first"},
        {"test/1.png": "test", "train/1.png": "train"},
    ),
    "first level": (
        ["dog/s1/1.png", "dog/s2/1.png"],
        {"class_level": "first"},
        {"dog/s1/1.png": "dog", "dog/s2/1.png": "dog"},
    ),
    "last level": (
        ["in/chair/1.png", "out/chair/2.png"],
        {"class_level": "last"},
        {"in/chair/1.png": "chair", "out/chair/2.png": "chair"},
    ),
    "levels of unequal depth": (
        ["a/1.png", "b/c/1.png"],
        {"class_level": "first"},
        {"a/1.png": "a", "b/c/1.png": "b"},
    ),
    "split above": (["Train/cat/1.png", "val/cat/1.png"], {"split": "train"}, {"Train/cat/1.png": "cat"}),
    "split below": (["cat/train/1.png", "cat/val/2.png"], {"split": "val"}, {"cat/val/2.png": "cat"}),
    "split of images alone": (["train/1.png", "test/2.png"], {"split": "train"}, {"train/1.png": None}),
    "split of any name": (["fold1/cat/1.png", "fold2/cat/1.png"], {"split": "fold2"}, {"fold2/cat/1.png": "cat"}),
    "without labels": (["x/a/1.png", "2.png"], {"label_column": None}, {"2.png": None, "x/a/1.png": None}),
    "no suffix, a foreign one, capitals": (
        ["cat/1", "cat/2.dat", "cat/3.PNG"],
        {},
        {"cat/1": "cat", "cat/2.dat": "cat", "cat/3.PNG": "cat"},
    ),
    "names that are patterns or addresses": (
        ["[a]*/a::b.png", "__c/?.png"],
        {},
        {"[a]*/a::b.png": "[a]*", "__c/?.png": "__c"},
    ),
    "other files": (
        ["cat/1.png", "cat/1.json", "cat/1.txt", "cat/.DS_Store", ".git/2.png", "__MACOSX/cat/3.png"],
        {},
        {"cat/1.png": "cat"},
    ),
    "label files, with a level": (
        ["cat/1.png", "notes.csv", "old.zip"],
        {"class_level": "first"},
        {"cat/1.png": "cat"},
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_layouts_that_are_taken(tmp_path, name):
    files, options, expected = TAKEN[name]
    assert classes_in(make(tmp_path / "images", *files), **options) == expected


REFUSED = {
    "two levels": (
        ["dog/s1/1.png", "cat/s1/1.png"],
        {},
        "`class_level` first or last .* cat/s1 .1 images., dog/s1 .1.",
    ),
    "unequal levels": (["a/1.png", "b/c/1.png"], {}, "one level of class folders"),
    "equal names under two parents": (["in/chair/1.png", "out/chair/1.png"], {}, "`class_level` first or last"),
    "splits above": (["train/cat/1.png", "Val/cat/1.png"], {}, "folders are called Val, train; .*`split` Val takes"),
    "splits below": (["cat/train/1.png", "cat/val/1.png"], {}, "folders are called train, val"),
    "one split": (["train/cat/1.png"], {}, "folders are called train"),
    "splits of images alone": (["train/1.png", "test/1.png"], {}, "folders are called test, train"),
    "splits, labels not looked at": (["train/1.png", "test/1.png"], {"label_column": None}, "folders are called"),
    "a split that is not there": (["train/cat/1.png"], {"split": "dev"}, "`split` must name a folder .* got 'dev'"),
    "a split of images in one place": (["1.png"], {"split": "train"}, "`split` must name a folder"),
    "a stray image": (["cat/1.png", "2.png"], {}, "'2.png' lies beside folders"),
    "a level without folders": (["1.png"], {"class_level": "last"}, "`class_level` needs images in folders"),
    "an unknown level": (
        ["a/1.png"],
        {"class_level": "middle"},
        "`class_level` must be 'first' or 'last', got 'middle'",
    ),
    "a class without files": (["cat/1.png", "dog/"], {}, "'dog' holds none"),
    "a class without images": (["cat/1.png", "dog/a.txt"], {}, "'dog' holds none"),
    "an image format that is not read": (
        ["cat/1.png", "cat/2.heic"],
        {},
        "1 images that cannot be read, 'cat/2.heic': .*`skip_corrupt`",
    ),
    "a class of such": (["cat/1.png", "dog/2.heic"], {"skip_corrupt": True}, "'dog' holds none .*heif"),
    "numbers that are equal": (["7/1.png", "007/1.png"], {}, "must differ as numbers, .* '007', '7'"),
    "no image": (["a.txt"], {}, "must be a folder of images, it holds 1 files: .txt, no image"),
    "nothing": ([], {}, "it holds nothing"),
    "labels in a table": (["1.png", "labels.csv"], {}, "also 'labels.csv', which would be ignored"),
    "labels in a JSON file": (["cat/1.png", "labels.json"], {}, "also 'labels.json'"),
    "an archive": (["cat/1.png", "more.zip"], {}, "also 'more.zip'"),
    "only an archive": (["all.zip"], {}, "holds no image, and 'all.zip'.* unpack"),
    "only a table": (["all.csv"], {}, "holds no image, and 'all.csv'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_are_refused(tmp_path, name):
    files, options, message = REFUSED[name]
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=message):
        load_image_dataset(make(tmp_path / "images", *files), **options)


def test_ids_follow_numbers_and_text(tmp_path):
    numbers = make(tmp_path / "numbers", *(f"{name}/1.png" for name in ("10", "9", "2", "007")))
    assert load_image_dataset(numbers).id2label == {0: "2", 1: "007", 2: "9", 3: "10"}
    text = make(tmp_path / "text", *(f"{name}/1.png" for name in ("10", "9", "b", "B")))
    assert load_image_dataset(text).id2label == {0: "10", 1: "9", 2: "B", 3: "b"}


def test_a_report_says_all(tmp_path):
    root = make(
        tmp_path / "images",
        "train/Cat/1.png",
        "train/cat/1.png",
        "train/cat/2.png",
        "train/cat/x.txt",
        "val/dog/1.png",
    )
    report = load_image_dataset(root, split="train").report
    assert (report.num_images, report.counts) == (3, {"Cat": 1, "cat": 2})
    assert report.left_out == {".txt, no image": ["train/cat/x.txt"], "not under a folder 'train'": ["val/dog/1.png"]}
    assert report.lines() == [
        f"{root}: 3 images, classes are the only level of folders, under 'train'",
        "2 classes: Cat (1), cat (2)",
        "left out: 1, .txt, no image, such as train/cat/x.txt",
        "left out: 1, not under a folder 'train', such as val/dog/1.png",
        "warning: class names differ little: 'Cat', 'cat' are classes each",
    ]
    flat = load_image_dataset(make(tmp_path / "flat", "1.png")).report
    assert flat.lines() == [f"{tmp_path / 'flat'}: 1 images, in one place, no classes"]
    merged = load_image_dataset(
        make(tmp_path / "rooms", "in/chair/1.png", "out/chair/1.png"), class_level="last"
    ).report
    assert merged.warnings[:1] == ["1 classes are gathered from several folders, chair from in/chair, out/chair"]


def test_what_cannot_be_read_is_left_out_and_said(tmp_path):
    root = make(tmp_path / "images", "cat/1.png", "cat/2.heic")
    (root / "cat" / "3.png").symlink_to(tmp_path / "nowhere.png")
    report = load_image_dataset(root, skip_corrupt=True).report
    assert report.num_images == 1
    assert [names for names in report.left_out.values()] == [["cat/2.heic"], ["cat/3.png"]]
    with pytest.raises(ValueError, match="cannot be read, 'cat/"):
        load_image_dataset(root)


def test_links_are_followed_but_not_in_circles(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "zebra").symlink_to(image_folder / "cat")
    assert load_image_dataset(tmp_path / "images").report.counts == {"cat": 4, "dog": 3, "test": 3, "zebra": 4}
    (tmp_path / "images" / "dog" / "again").symlink_to(tmp_path / "images")
    with pytest.raises(ValueError, match="no link to a folder above it"):
        load_image_dataset(tmp_path / "images")


def test_names_that_are_not_text(tmp_path):
    root = make(tmp_path / "images", "cat/1.png")
    with open(os.fsencode(root / "cat") + b"/\xff.png", "wb") as file:
        file.write(PNG)
    with pytest.raises(ValueError, match="its name is not UTF-8"):
        load_image_dataset(root)
    assert load_image_dataset(root, skip_corrupt=True).report.counts == {"cat": 1}
    os.mkdir(os.fsencode(root) + b"/\xff")
    with pytest.raises(ValueError, match="its name is not UTF-8"):
        load_image_dataset(root)


def test_a_pipe_does_not_stop_the_walk(tmp_path):
    root = make(tmp_path / "images", "cat/1.png")
    os.mkfifo(root / "cat" / "pipe")
    assert load_image_dataset(root).report.left_out == {"neither file nor folder": ["cat/pipe"]}
