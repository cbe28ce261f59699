"""Records as memory-mapped arrays: token caches, of which training gathers whole batches.

A shard is a `.npy` file for each field, with the records on its first axis, and a `.json` file that is written last and says
how many records there are. Fields of which every record has another number of rows (captions in UTF-8, their real feature
rows, the bits of bfloat16 as uint16) lie one after the other, and `FIELD.ends.npy` says where each record's end.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ar_jax.data.base import spread
from ar_jax.data.captions import bits, from_bits, left_pad
from ar_jax.data.records import Form, open_shards, read_json, write_json
from ar_jax.files.places import made, path_of

NAME = "arrays"  # what info.json calls this form
VERSIONED = ("tokens", "moments")  # fields with several versions of an image, of which training takes one at a time
RAGGED = ("caption", "text")


class Arrays:
    """Records of memory-mapped shards, by index or many at once; `info` is the folder's info.json."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = path_of(folder)
        self.info, paths = open_shards(self.folder, FORM)
        counts = [read_json(path)["records"] for path in paths]
        self._shards = [_open_shard(path, count) for path, count in zip(paths, counts) if count]
        self._ends = np.cumsum([count for count in counts if count])

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(sorted(self._shards[0]))

    @property
    def versions(self) -> int:
        """Of every record."""
        return next((self._shards[0][name].shape[1] for name in VERSIONED if name in self._shards[0]), 1)

    def __len__(self) -> int:
        return self.info["count"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record with all its versions, as it was written."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        ((shard, _, (row,)),) = spread(self._ends, np.array([index]))
        fields = self._shards[shard]
        record = {name: np.array(array[row]) for name, array in fields.items() if name.split(".")[0] not in RAGGED}
        if "label" in record:
            record["label"] = int(record["label"])
        if "caption" in fields:
            record["caption"] = bytes(_rows(fields, "caption", row)).decode()
        return record | {name: value[0] for name, value in self._text(np.array([index])).items()}

    def gather(self, index: np.ndarray, version: np.ndarray) -> dict[str, np.ndarray]:
        """A batch: one version of each of these records, without captions.

        Args:
          index: int [b], of the records.
          version: int [b], of their tokens.
        """
        batch: dict[str, np.ndarray] = {}
        for shard, places, rows in spread(self._ends, index):
            for name, array in self._shards[shard].items():
                if name.split(".")[0] in RAGGED:
                    continue
                found = array[rows, version[places]] if name in VERSIONED else array[rows]
                batch.setdefault(name, np.empty((len(index), *found.shape[1:]), found.dtype))[places] = found
        return batch | self._text(index)

    def _text(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Caption features of these records, padded."""
        if "text" not in self._shards[0]:
            return {}
        rows, stored = self.info["text_rows"], from_bits(self._shards[0]["text"])
        text, mask = np.zeros((len(index), rows, stored.shape[1]), stored.dtype), np.zeros((len(index), rows), bool)
        for shard, places, within in spread(self._ends, index):
            for place, row in zip(places, within):
                real = from_bits(_rows(self._shards[shard], "text", row))
                text[place], mask[place] = left_pad(real, np.ones(len(real), bool), rows)
        return {"text": text, "text_mask": mask}


def _rows(fields: dict[str, np.ndarray], name: str, row: int) -> np.ndarray:
    """What a record has of a ragged field."""
    ends = fields[f"{name}.ends"]
    return fields[name][ends[row - 1] if row else 0 : ends[row]]


def _open_shard(path: Path, count: int) -> dict[str, np.ndarray]:
    fields = {}
    for name in read_json(path)["fields"]:
        file = _file(path, name)
        try:
            array = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}); copy it again, or delete the folder and write it anew"
            ) from error
        fields[name] = array.view(np.ndarray)  # a memmap is slower to index
        if name not in RAGGED and len(array) != count:
            raise ValueError(
                f"{file} holds {len(array)} records, {path.name} says {count}; delete the folder and write it anew"
            )
    return fields


def _file(path: Path, field: str) -> Path:
    return path.with_suffix(f".{field}.npy")


def _write_shard(path: Path, records: Iterable[dict[str, Any]], progress: tqdm) -> None:
    columns: dict[str, Column] = {}
    count = 0
    with contextlib.ExitStack() as stack:
        for record in records:
            for name, rows in _columns(record):
                if name not in columns:
                    columns[name] = stack.enter_context(column(_file(path, name), rows.dtype, rows.shape[1:]))
                columns[name].add(rows)
                if name in RAGGED:
                    ends = f"{name}.ends"
                    if ends not in columns:
                        columns[ends] = stack.enter_context(column(_file(path, ends), np.dtype(np.int64), ()))
                    columns[ends].add(np.array([columns[name].rows], np.int64))
            count += 1
            progress.update()
    write_json(path, {"records": count, "fields": sorted(columns)})


def _columns(record: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """What a record adds to every field, with a first axis."""
    for name, value in record.items():
        if name == "caption":
            yield name, np.frombuffer(value.encode(), np.uint8)
        elif name == "text":
            yield name, bits(value[record["text_mask"]])
        elif name != "text_mask":  # the number of rows says it
            yield name, np.asarray(value, np.int32 if isinstance(value, int) else None)[None]


class Column:
    """A .npy file that grows, [rows *shape]."""

    def __init__(self, file: Any, dtype: np.dtype, shape: tuple[int, ...]):
        self.rows, self._file, self._dtype, self._shape = 0, file, dtype, shape
        self.head()

    def add(self, rows: np.ndarray) -> None:
        if (rows.dtype, rows.shape[1:]) != (self._dtype, self._shape):
            raise ValueError(
                f"{self._file.name}: a record is {rows.dtype} {list(rows.shape[1:])}, those before it {self._dtype} "
                f"{list(self._shape)}"
            )
        self._file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def head(self) -> None:
        """Writes the header, which has one length for any number of rows: numpy leaves room for that axis to grow."""
        self._file.seek(0)
        shape = (self.rows, *self._shape)
        about = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, about)


@contextlib.contextmanager
def column(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[Column]:
    """A column that gets its name when it is whole."""
    with made(path, path.with_name(f".{path.name}.part")) as part, open(part, "wb") as file:
        grown = Column(file, dtype, shape)
        yield grown
        grown.head()


FORM = Form(".json", _write_shard, lambda paths: sum(read_json(path)["records"] for path in paths))
