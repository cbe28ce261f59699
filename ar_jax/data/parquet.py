"""Parquet files, read a row group at a time: shuffled by row group and buffer, in an order that is as fixed as any other."""

import itertools
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.data.base import Data, Info, Unreadable, seen_classes
from ar_jax.data.columns import Columns, columns, text_of
from ar_jax.data.shards import shard_files
from ar_jax.files.places import seekable


class Parquet:
    """Rows of Parquet files with an image column (see `columns`), one file after the other.

    A row cannot be read without its row group, so these are the `runs` that training shuffles, and those last read are
    kept: `kept` of them, as many as the rows that are shuffled together come from.
    """

    def __init__(self, files: list[tuple[Path, Any]], found: Columns, info: Info, seen: np.ndarray, data: Data):
        self.columns, self.info, self.seen, self.upright = found, info, seen, data.upright
        self.groups = [(path, meta, i) for path, meta in files for i in range(meta.num_row_groups)]
        self.runs = np.array([meta.row_group(i).num_rows for _, meta, i in self.groups])
        self.ends = np.cumsum(self.runs)
        self.kept = 3 + int(2 * data.mixed / max(self.runs.mean(), 1))
        self._rows: OrderedDict[int, Future] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self.ends, index, "right"))
        row = index - (int(self.ends[group - 1]) if group else 0)
        path, _, number = self.groups[group]
        name = f"row {row} of row group {number} of {path}"
        try:
            table = self._group(group)
        except (OSError, ValueError) as error:  # Arrow's are of these
            raise Unreadable(name, error) from error
        return self.columns.record(table.slice(row, 1).to_pylist()[0], name, self.upright, self.seen)

    def captions(self) -> list[str]:
        return [
            text_of(value)
            for i in range(len(self.groups))
            for value in self._read(i, [self.columns.caption])[self.columns.caption].to_pylist()
        ]

    def _group(self, group):
        """A row group; who needs it while another thread reads it waits for that."""
        with self._lock:
            mine = group not in self._rows
            if mine:
                self._rows[group] = Future()
            self._rows.move_to_end(group)
            found = self._rows[group]
            while len(self._rows) > self.kept:
                self._rows.popitem(last=False)
        if mine:
            try:
                found.set_result(self._read(group, self.columns.used))
            except BaseException as error:
                found.set_exception(error)
        return found.result()

    def _read(self, group, names):
        from pyarrow import parquet

        path, meta, number = self.groups[group]
        with parquet.ParquetFile(seekable(path, cache_type="none"), metadata=meta) as file:
            return file.read_row_group(number, columns=names, use_threads=False)


def parquet(data: Data, part: tuple[int, int] = (0, 1)) -> Parquet:
    """The Parquet files of `data.path` (see `shard_files`); small row groups (100 images) serve training best."""
    try:
        from pyarrow import parquet as reader
    except ImportError as error:
        raise ValueError("data.name=parquet needs the package pyarrow: pip install ar_jax[parquet]") from error
    files, every = shard_files(data, ".parquet", part)
    opened = {}
    for file in every:
        try:
            with reader.ParquetFile(seekable(file, cache_type="none")) as content:
                opened[file] = content.metadata, content.schema_arrow
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as Parquet: {error}") from error
    found = columns(opened[files[0]][1], f"data.path={data.path}")
    for file, (_, schema) in opened.items():
        if columns(schema, str(file)) != found:
            raise ValueError(
                f"{file} has other columns than {files[0]}; all must have the same image, label and caption"
            )
    labels, names = np.zeros(0, int), ()
    if found.label and not found.class_names:
        labels, names = seen_classes(itertools.chain(*(_labels(file, found.label) for file in opened)))
        if part[1] > 1:  # in other parts may be others
            labels, names = np.arange(labels.max(initial=-1) + 1), ()
    chosen = [(file, opened[file][0]) for file in files if opened[file][0].num_rows]
    if not chosen:
        raise ValueError(f"data.path={data.path}: the Parquet files of data.split={data.split} have no rows")
    return Parquet(chosen, found, found.info(labels, names), labels, data)


def _labels(file, label):
    """The different labels of a file."""
    from pyarrow import compute, parquet

    return compute.unique(parquet.read_table(seekable(file, cache_type="none"), columns=[label])[label]).drop_null().to_pylist()
