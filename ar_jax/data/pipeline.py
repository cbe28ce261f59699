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
from ar_jax.machine import distributed


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

    A source with `runs` is shuffled by these, and then `data.mixed` records with one another: an order as fixed as the other.
    With `data.shards` split the rows of a process come from its own records, in an order and passes of their own; the
    state then stands for the same batches on as many processes only. What every process reads is what the first one has.

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
        stream = iter(records.batch(batch).to_iter_dataset(options))
        return map(distributed.agreed, stream) if data.shards == "split" else stream

    split, seed = data.shards == "split" and rows is not None, seed % 2**32
    if split:  # or crops would be alike on all hosts
        seed = (seed + int(rows[0])) % 2**32
    if hasattr(source, "runs"):
        records = grain.MapDataset.source(_Mixed(source, data.mixed, seed)).seed(seed)
    else:
        records = records.seed(seed).shuffle().repeat()
    records = records.random_map(functools.partial(_augmented, data=data, info=source.info))
    if split:
        return Batches(records, batch, np.arange(len(rows)), options, here=len(rows))
    stream = Batches(records, batch, np.arange(batch) if rows is None else rows, options, here=batch)
    return map(distributed.agreed, stream) if data.shards == "split" else stream


class Batches:
    """Batches without end: some rows of each. Grain's ElasticIterator would deal the rows out like cards instead.

    Args:
      batch: records of a batch over all processes.
      rows: which of the records of a batch are read here.
      here: records of a batch among `records`, if others have those of other processes.
    """

    def __init__(self, records: grain.MapDataset, batch: int, rows: np.ndarray, options: grain.ReadOptions, here: int):
        self._records, self._batch, self._rows, self._options, self._here = records, batch, rows, options, here
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
        first = self._next * self._here // self._batch
        share = grain.MapDataset.source(_Share(self._records, first, self._here, self._rows))
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


class _Mixed:
    """A source without end, in passes, each in its own order: runs are shuffled, then all records of a few runs.

    The runs of a mixture follow one another in the shuffled order and have `mixed` records or more (the last one fewer).
    """

    def __init__(self, source: Source, mixed: int, seed: int):
        self._source, self._runs, self._mixed, self._seed = source, np.asarray(source.runs), mixed, seed
        self._begins = np.cumsum(self._runs) - self._runs
        self._pass = functools.lru_cache(2)(self._pass)  # a batch may lie in two passes
        self._mixture = functools.lru_cache(4)(self._mixture)

    def __len__(self) -> int:
        return 2**50

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = divmod(index, len(self._source))
        begins = self._pass(number)[2]
        mixture = int(np.searchsorted(begins, place, "right")) - 1
        return self._source[int(self._mixture(number, mixture)[place - begins[mixture]])]

    def _pass(self, number):
        """Of a pass: the order of the runs, the first run of every mixture, and the place where it begins."""
        order = np.random.default_rng((self._seed, number)).permutation(len(self._runs))
        ends = np.cumsum(self._runs[order])
        first, begins = [0], [0]
        while begins[-1] + self._mixed < ends[-1]:
            first.append(int(np.searchsorted(ends, begins[-1] + self._mixed)) + 1)
            begins.append(int(ends[first[-1] - 1]))
        if begins[-1] == ends[-1]:
            del first[-1], begins[-1]
        return order, np.array(first), np.array(begins)

    def _mixture(self, number, mixture):
        """The records of a mixture, in their order."""
        order, first, _ = self._pass(number)
        runs = order[first[mixture] : first[mixture + 1] if mixture + 1 < len(first) else None]
        records = np.concatenate([self._begins[run] + np.arange(self._runs[run]) for run in runs])
        return np.random.default_rng((self._seed, number, mixture)).permutation(records)


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
