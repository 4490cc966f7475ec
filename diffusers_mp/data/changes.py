"""Whether rows are still those that were encoded: by the state of their source, and where that changed by content."""

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc


if TYPE_CHECKING:
    import datasets

DIGEST_LENGTH = 16


def row_digest(path: str | None, conditions: Mapping[str, Any], content: bytes) -> str:
    """What a row holds, in 16 hexadecimal digits.

    Args:
        path (str, optional): of the image; its folders do not count, so that a data set may be moved.
        conditions (mapping): label and condition vector, if there are any.
        content (bytes): the image's file.
    Returns:
        str: of SHA-256, as many digits as tell the rows of one data set apart.
    """
    facts = [path and os.path.basename(path), *conditions.values(), hashlib.sha256(content).hexdigest()]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:DIGEST_LENGTH]


class SourceState:
    """The state of the rows of a table, told without reading an image. Equal states have equal rows.

    Images in files have names, sizes and times of their last change; labels and condition vectors are read. Images in
    the table itself have the fingerprint that `datasets` keeps, of the table's files and all that was done to them.
    One edit leaves the state as it is: of a file, to the same size, within the tick of the clock of its last change.

    Args:
        dataset (datasets.Dataset or datasets.IterableDataset): the rows; a stream has no state.
        columns (dict): name of the column of the images as `cell`, then those of labels and condition vectors.
    """

    def __init__(self, dataset: "datasets.Dataset | datasets.IterableDataset", columns: Mapping[str, str]):
        self.columns, self.rows = list(columns.values()), None
        if not hasattr(dataset, "__len__"):
            return
        # Columns of Arrow, of which only the bits that tell missing entries are read.
        cells = dataset.data.column(self.columns[0])
        content, paths = pc.struct_field(cells, "bytes"), pc.struct_field(cells, "path")
        self.has_files = bool(pc.any(pc.and_(content.is_null(), paths.is_valid())).as_py())
        self.fingerprint = dataset._fingerprint if content.null_count < len(content) or not self.has_files else None
        self.rows = dataset.select_columns(self.columns).with_format("arrow")

    def of(self, start: int, stop: int) -> str | None:
        """The state of some rows; the digests of two that are equal are those of equal rows.

        Args:
            start, stop (int): first row, and the one after the last.
        Returns:
            str or None: a SHA-256; None of a stream.
        """
        if self.rows is None:
            return None
        state = hashlib.sha256(json.dumps([self.fingerprint, start, stop]).encode())
        if self.has_files:
            rows = self.rows[start:stop]
            paths = pc.struct_field(rows.column(self.columns[0]), "path").to_pylist()
            state.update(json.dumps([_file_state(path) for path in paths]).encode())
            # Never unpickled: the fastest bytes of many vectors that depend on nothing but their values.
            state.update(pickle.dumps(rows.select(self.columns[1:]).to_pydict(), protocol=5))
        return state.hexdigest()


def _file_state(path: str | None) -> list | None:
    if path is None:
        return None
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # an address, or a file that is gone
        return [path]
    # The time of the last change of the file's own entry as well, which nobody can set back.
    return [os.path.basename(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
