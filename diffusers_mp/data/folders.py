"""A folder of images: what lies in it, and which part of a path names the class.

`list_folder` walks the folder once. `classes_of` decides by rules that fit on half a page of docs/train.md, and
refuses what could mean two things.
"""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .formats import HEAD_SIZE, format_of, why_no_image


# Folders of these names, in any case, are splits until the user says otherwise.
SPLIT_NAMES = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation", "holdout")
)
# What is an image by name. Other files are opened to see.
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
# Labels or images of other tools: read, or refused by name.
TABLE_SUFFIXES = frozenset((".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".xlsx"))
CONTAINER_SUFFIXES = frozenset(
    (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".h5", ".hdf5", ".npz", ".npy", ".mat")
    + (".lmdb", ".mdb", ".tfrecord", ".rec", ".pkl", ".pickle", ".pt", ".pth")
)
# Tables whose rows name the images beside them: those of `datasets`, and `dataset.json` of StyleGAN and EDM.
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json")


@dataclass
class FolderListing:
    """What lies in a folder. All names are relative to it, with "/" between their parts, and sorted.

    Attributes:
        root (Path): the folder.
        images (list[str]): files that Pillow reads here.
        unreadable (dict[str, list[str]]): images that it does not, by the reason.
        metadata, tables, containers (list[str]): label files that are read, and what is not.
        left_out (dict[str, list[str]]): other files, and hidden ones, by what they are.
        folders (list[str]): all folders in it.
        elsewhere (list[str]): images that a choice of a split has left out.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    unreadable: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    folders: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


def list_folder(root: str | os.PathLike) -> FolderListing:
    """Walks a folder, also through links. Opens only files whose names do not tell.

    Args:
        root (str): the folder.
    Raises:
        OSError: if a folder or a file cannot be opened.
        ValueError: if a link leads back to a folder that it lies in.
    """
    listing = FolderListing(Path(root))
    _walk(listing, "", [])
    # A JSON file beside an image of the same name tells of that image, and holds no labels of others.
    stems = {os.path.splitext(name)[0] for name in listing.images}
    for name in [name for name in listing.tables if os.path.splitext(name)[0] in stems]:
        listing.left_out[f"{os.path.splitext(name)[1]} beside an image"].append(name)
    listing.tables = [name for name in listing.tables if os.path.splitext(name)[0] not in stems]
    return listing


def _walk(listing: FolderListing, folder: str, above: list[tuple[int, int]]) -> None:
    place = listing.root / folder
    identity = place.stat()
    if (identity.st_dev, identity.st_ino) in above:
        raise ValueError(f"`train_data_dir` must hold no link to a folder above it, got {str(place)!r}: remove it.")
    above = [*above, (identity.st_dev, identity.st_ino)]
    with os.scandir(place) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            listing.left_out["hidden"].append(name)
        elif not _is_utf8(entry.name):
            listing.unreadable["its name is not UTF-8: rename it"].append(os.fsencode(name).decode(errors="replace"))
        elif entry.is_dir():
            listing.folders.append(name)
            _walk(listing, name, above)
        elif entry.is_file():
            _take_file(listing, name, entry.name)
        elif entry.is_symlink():
            listing.unreadable["a link to nothing"].append(name)
        else:
            listing.left_out["neither file nor folder"].append(name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # as the system gives bytes that are not text
        return False
    return True


def _take_file(listing: FolderListing, name: str, own_name: str) -> None:
    suffix = os.path.splitext(own_name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        listing.images.append(name)
    elif own_name in METADATA_NAMES:
        listing.metadata.append(name)
    elif suffix in TABLE_SUFFIXES:
        listing.tables.append(name)
    elif suffix in CONTAINER_SUFFIXES:
        listing.containers.append(name)
    else:
        with open(listing.root / name, "rb") as file:
            head = file.read(HEAD_SIZE)
        if format_of(head, own_name) is not None:
            listing.images.append(name)
        elif (reason := why_no_image(head, own_name)) is not None:
            listing.unreadable[reason].append(name)
        else:
            listing.left_out[f"{suffix or 'without a suffix'}, no image"].append(name)


def paths_in_split(listing: FolderListing, split: str | None, class_level: str | None = None) -> dict[str, str]:
    """Images of one split, and their paths as if the folder of the split were not there.

    Args:
        listing (FolderListing): with a split it loses what lies elsewhere.
        split (str, optional): the name of a folder, in any case. Without it the folder must hold a single split.
        class_level (str, optional): if given, names of splits are names like any other.
    Returns:
        dict[str, str]: image to path.
    Raises:
        ValueError: if no folder has the name, or folders are called as splits are.
    """
    root = f"`train_data_dir` ({str(listing.root)!r})"
    if split is None:
        paths = {name: name for name in listing.images}
        if class_level is None:
            _check_single_split(root, paths)
        return paths

    def without(name: str) -> str | None:
        parts = name.split("/")
        place = next((k for k, part in enumerate(parts[:-1]) if part.casefold() == split.casefold()), None)
        return None if place is None else "/".join(parts[:place] + parts[place + 1 :])

    paths = {name: path for name in listing.images if (path := without(name)) is not None}
    if not paths:
        found = layout_of(listing.images)
        raise ValueError(f"`split` must name a folder with images in {root}, got {split!r}; found: {found}.")
    listing.elsewhere = [name for name in listing.images if name not in paths]
    if listing.elsewhere:
        listing.left_out[f"not under a folder {split!r}"] = listing.elsewhere
    listing.images = list(paths)
    # A label file above the folders of the splits may tell of all of them; another split's own does not.
    listing.metadata = [name for name in listing.metadata if without(name) is not None or "/" not in name]
    listing.tables = [name for name in listing.tables if without(name) is not None]
    listing.containers = [name for name in listing.containers if without(name) is not None]
    listing.folders = [path[:-2] for n in listing.folders if (path := without(f"{n}/.")) not in (None, ".")]
    kept = {reason: [n for n in names if without(n) is not None] for reason, names in listing.unreadable.items()}
    listing.unreadable = {reason: names for reason, names in kept.items() if names}
    return paths


def _check_single_split(root: str, paths: dict[str, str]) -> None:
    parents = {tuple(path.split("/")[:-1]) for path in paths.values()}
    names = {part for parts in parents for part in parts}
    splits = sorted(name for name in names if name.casefold() in SPLIT_NAMES)
    # A class may be called so, "train" beside "bus" and "boat", on the only level.
    if splits and (any(len(parts) != 1 for parts in parents) or len(splits) == len(names)):
        raise ValueError(
            f"{root} must hold one split, or `split` must say which: folders are called {', '.join(splits)}; found: "
            f"{layout_of(paths.values())}. `split` {splits[0]} takes that one; `class_level` first or last takes all, "
            "and the folders of that level as classes."
        )


def classes_of(
    listing: FolderListing, paths: dict[str, str], class_level: str | None = None
) -> tuple[dict[str, str] | None, list[str]]:
    """The class of each image, from the folders it lies in.

    Args:
        listing (FolderListing), paths (dict[str, str]): of `list_folder` and `paths_in_split`.
        class_level (str, optional): "first" or "last": the folder of a path that names the class, where paths have
            several.
    Returns:
        tuple[dict[str, str] | None, list[str]]: image to class, None if no image lies in a folder; and warnings.
    Raises:
        ValueError: with the layout that was found, if it could mean two things, or a class has no image.
    """
    root = f"`train_data_dir` ({str(listing.root)!r})"
    parents = {name: path.split("/")[:-1] for name, path in paths.items()}
    depths, found = {len(parts) for parts in parents.values()}, f"found: {layout_of(paths.values())}"
    if depths == {0}:
        if class_level is not None:
            raise ValueError(f"`class_level` needs images in folders, {root} has all of them in one place.")
        return None, []
    if 0 in depths:
        stray = next(name for name, parts in parents.items() if not parts)
        raise ValueError(
            f"{root} must hold images either in class folders or, without classes, in one place; {stray!r} lies "
            f"beside folders; {found}."
        )
    if class_level is None and depths != {1}:
        raise ValueError(
            f"{root} must have one level of class folders, or `class_level` first or last must say which level names "
            f"the class; {found}."
        )
    _check_empty(listing, paths.values(), class_level, root)
    classes = {name: parts[-1 if class_level == "last" else 0] for name, parts in parents.items()}
    return classes, _doubts(parents, classes, class_level)


def _check_empty(listing: FolderListing, paths: Iterable[str], class_level: str | None, root: str) -> None:
    filled = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    classes = [name for name in listing.folders if class_level == "last" or "/" not in name]
    empty = [name for name in classes if name not in filled]
    if empty:
        reasons = [
            reason
            for reason, names in listing.unreadable.items()
            if any(f"/{name}".rpartition("/")[0].endswith(f"/{empty[0]}") for name in names)
        ]
        raise ValueError(
            f"Each class folder in {root} must hold an image that can be read, {empty[0]!r} holds none"
            + (f" ({reasons[0]})" if reasons else "")
            + (f", nor do {len(empty) - 1} others" if len(empty) > 1 else "")
            + ": remove the folder, or mend it."
        )


def _doubts(parents: dict[str, list[str]], classes: dict[str, str], class_level: str | None) -> list[str]:
    """What is legal, and seldom meant."""
    warnings, names, places = [], sorted(set(classes.values())), defaultdict(set)
    for name, class_name in classes.items():
        places[class_name].add("/".join(parents[name]))
    merged = sorted(name for name, found in places.items() if class_level == "last" and len(found) > 1)
    if merged:
        folders = ", ".join(sorted(places[merged[0]]))
        warnings.append(f"{len(merged)} classes are gathered from several folders, {merged[0]} from {folders}")
    if called_so := [name for name in names if name.casefold() in SPLIT_NAMES]:
        warnings.append(f"classes are called as splits are: {', '.join(called_so)}")
    alike = defaultdict(list)
    for name in names:
        alike[unicodedata.normalize("NFC", name).casefold().strip()].append(name)
    if pairs := [found for found in alike.values() if len(found) > 1]:
        warnings.append(f"class names differ little: {', '.join(map(repr, pairs[0]))} are classes each")
    return warnings


def class_order(names: Iterable[str], where: str) -> list[str]:
    """Class names in the order of their ids: as numbers if all are whole numbers, else as text.

    Args:
        names (iterable of str): of the classes.
        where (str): what has them, for the error.
    Raises:
        ValueError: if two names are the same number, such as 7 and 007.
    """
    names = sorted(set(names))
    if not names or not all(name.isascii() and name.isdecimal() for name in names):
        return names
    number, count = Counter(map(int, names)).most_common(1)[0]
    if count > 1:
        twins = ", ".join(repr(name) for name in names if int(name) == number)
        raise ValueError(f"Class names that are numbers must differ as numbers, {where} has {twins}: rename one.")
    return sorted(names, key=int)


def layout_of(paths: Iterable[str], limit: int = 6) -> str:
    """Folders of images with their counts, in words, such as "train/cat (40 images), train/dog (38), … 2 more"."""
    counts = Counter(path.rpartition("/")[0] or "." for path in paths)
    if not counts:
        return "no image"
    shown = [f"{name} ({count})" for name, count in sorted(counts.items())[:limit]]
    shown[0] = f"{shown[0][:-1]} images)"
    return ", ".join(shown) + (f", … {len(counts) - limit} more folders" if len(counts) > limit else "")
