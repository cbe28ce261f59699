"""Batches of a source: shuffled, cropped, divided over processes, and resumable from one number."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from ar_jax.data.base import Data, Info, Source
from ar_jax.data.images import centre_crop, flip, random_crop


def batches(
    source: Source,
    data: Data,
    *,
    batch: int,
    seed: int,
    train: bool = True,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """An iterator of batches with `get_state()` and `set_state()`.

    A batch has, of what the source offers, "image" uint8 [b size size 3], "label" int32 [b], "text" float32
    [b text_rows c] with "text_mask" bool [b text_rows], and "tokens" int32 [b n k] or float32 [b n c].

    For training, b is the number of `rows`. The stream has no end; every record comes once in each pass through
    the data, over all processes, and each pass has its own order. Order, crops and the row of a record depend on
    `seed` and `batch` only, not on the number of processes, so the state ({"global_next_index": records seen}) is
    the same on all processes and valid on another number of them. Otherwise it is one pass in order: centre
    crops, the first version of the tokens, all of it on every process, the last batch smaller.

    Args:
      batch: records over all processes.
      rows: those of each batch that this process reads; None is all.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if len(source) == 0:
        raise ValueError(f"data.name={data.name} data.path={data.path!r} has no records of data.split={data.split}")
    # A thread makes whole batches, so this is also the number of batches made ahead.
    threads = min(os.cpu_count() or 1, 32)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    records = grain.MapDataset.source(source)
    if not train:
        records = records.map(functools.partial(_plain, data=data, info=source.info))
        return iter(records.batch(batch).to_iter_dataset(options))

    records = records.seed(seed % 2**32).shuffle().repeat()
    records = records.random_map(functools.partial(_augmented, data=data, info=source.info))
    return Batches(records, batch, np.arange(batch) if rows is None else rows, options)


class Batches:
    """Batches without end: some rows of each. Grain's ElasticIterator would deal the rows out like cards instead."""

    def __init__(self, records: grain.MapDataset, batch: int, rows: np.ndarray, options: grain.ReadOptions):
        self._records, self._batch, self._rows, self._options = records, batch, rows, options
        self.set_state({"global_next_index": 0})

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        value = next(self._iterator)
        self._next += self._batch
        return value

    def get_state(self) -> dict[str, int]:
        return {"global_next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = state["global_next_index"]
        share = grain.MapDataset.source(_Share(self._records, self._next, self._batch, self._rows))
        self._iterator = iter(share.batch(len(self._rows)).to_iter_dataset(self._options))


@dataclasses.dataclass(frozen=True)
class _Share:
    """The records of `rows` of one batch after the other, from record `first` on."""

    records: grain.MapDataset
    first: int
    batch: int
    rows: np.ndarray

    def __len__(self) -> int:
        return 2**50  # no end; Grain divides it as a float

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, row = divmod(index, len(self.rows))
        return self.records[self.first + batch * self.batch + int(self.rows[row])]


def _augmented(record: dict[str, Any], rng: np.random.Generator, *, data: Data, info: Info) -> dict[str, np.ndarray]:
    if "tokens" in record:
        return _numbers(record, info) | {"tokens": _tokens(record, int(rng.integers(len(record["tokens"]))))}
    if data.crop == "random":
        image = random_crop(record["image"], data.size, rng, data.min_fraction)
    else:
        image = centre_crop(record["image"], data.size)
    if data.flip and rng.random() < 0.5:
        image = flip(image)
    return _numbers(record, info) | {"image": image}


def _plain(record: dict[str, Any], *, data: Data, info: Info) -> dict[str, np.ndarray]:
    if "tokens" in record:
        return _numbers(record, info) | {"tokens": _tokens(record, 0)}
    return _numbers(record, info) | {"image": centre_crop(record["image"], data.size)}


def _tokens(record: dict[str, Any], version: int) -> np.ndarray:
    tokens = record["tokens"][version]
    return tokens.astype(np.int32 if np.issubdtype(tokens.dtype, np.integer) else np.float32)


def _numbers(record: dict[str, Any], info: Info) -> dict[str, np.ndarray]:
    """Label and caption features: what a batch keeps beside the image; a caption itself is no array."""
    kept = {key: record[key] for key in ("text", "text_mask") if key in record}
    if info.classes:
        if not 0 <= record["label"] < info.classes:
            raise ValueError(
                f"a record has the label {record['label']}, outside 0..{info.classes - 1}; "
                "test images without labels cannot be used here"
            )
        kept["label"] = np.int32(record["label"])
    return kept
