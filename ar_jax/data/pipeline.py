"""Batches of a source: shuffled, cropped, divided over processes, and resumable from one number."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grain
import numpy as np

from ar_jax.data.arrays import VERSIONED
from ar_jax.data.base import Data, Info, Source
from ar_jax.data.images import centre_crop, flip, random_crop
from ar_jax.machine import distributed
from ar_jax.machine.seeds import narrow

AHEAD = 2**31  # bytes of batches that the processes of a machine make ahead, but two batches each at least


def batches(
    source: Source,
    data: Data,
    *,
    batch: int,
    seed: int,
    train: bool = True,
    rows: np.ndarray | None = None,
    then: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """An iterator of batches with `get_state()` and `set_state()`.

    A batch has, of what the source offers, "image" uint8 [b size size 3], "label" int32 [b], "text" bfloat16 or float32
    [b text_rows c] with "text_mask" bool [b text_rows], and "tokens" int32 [b n k] or float32 [b n c], or "moments"
    float16 [b n 2c], of which the tokenizer draws tokens.

    For training, b is the number of `rows`. The stream has no end; every record comes once in each pass through
    the data, over all processes, and each pass has its own order. Order, crops and the row of a record depend on
    `seed` and `batch` only, not on the number of processes, so the state ({"global_next_index": records seen}) is
    the same on all processes and valid on another number of them. Otherwise it is one pass in order: centre
    crops, the first version of the tokens, all of it on every process, the last batch smaller.

    A source with `runs` is shuffled by these, and then `data.mixed` records with one another: an order as fixed as the other.
    With `data.shards` split the rows of a process come from its own records, in an order and passes of their own; the
    state then stands for the same batches on as many processes only, and says how many parts there were ("parts"). What every
    process reads is what the first one has.

    Args:
      batch: records over all processes.
      rows: those of each batch that this process reads; None is all.
      then: what becomes of a batch, by the threads that make batches ahead; such as tokens in the place of images.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if len(source) == 0:
        raise ValueError(f"data.name={data.name} data.path={data.path!r} has no records of data.split={data.split}")
    given, rows = rows is not None, np.arange(batch) if rows is None else rows
    split, seed = train and data.shards == "split" and given, narrow(seed)
    if split:  # or crops would be alike on all hosts
        seed = (seed + int(rows[0])) % 2**32
    index = grain.MapDataset.range(len(source))
    if train and hasattr(source, "runs"):
        index = grain.MapDataset.source(_Mixed(source.runs, data.mixed, seed)).seed(seed)
    elif train:
        index = index.seed(seed).shuffle().repeat()
    if hasattr(source, "gather"):
        picks, make = _picks(index, source, train), functools.partial(_gathered, source)
    else:
        one = functools.partial(_augmented if train else _plain, source=source, data=data)
        picks = index.random_map(one) if train else index.map(one)
        make = functools.partial(_stacked, futures.ThreadPoolExecutor(threads(), "records"))
    if then is not None:
        make = functools.partial(_further, make, then)
    # What is gathered takes next to no time but Python's own, in which threads stand in each other's way
    options = read_options(_record_bytes(source, data) * len(rows), 2 if hasattr(source, "gather") else threads())
    if not train:
        stream = iter(grain.MapDataset.source(_Share(picks, make, 0, batch, rows)).to_iter_dataset(options))
        return map(distributed.agreed, stream) if data.shards == "split" else stream
    if split:
        return Batches(picks, make, batch, np.arange(len(rows)), options, here=len(rows))
    stream = Batches(picks, make, batch, rows, options, here=batch)
    return map(distributed.agreed, stream) if data.shards == "split" else stream


def threads() -> int:
    """That read records."""
    return min(distributed.cores(), 32)


def read_options(size: int, most: int) -> grain.ReadOptions:
    """Threads that make batches of `size` bytes, at most so many, and how many are made ahead.

    These are what the budget of bytes allows, from 2 up to one for each core.
    """
    ahead = max(2, min(threads(), AHEAD // distributed.neighbours() // max(size, 1)))
    return grain.ReadOptions(num_threads=min(ahead, most), prefetch_buffer_size=ahead)


Make = Callable[[grain.MapDataset, list[int]], dict[str, np.ndarray]]


class Batches:
    """Batches without end: some rows of each. Grain's ElasticIterator would deal the rows out like cards instead.

    Args:
      picks, make: what `make` makes a batch of.
      batch: records of a batch over all processes.
      rows: which of the records of a batch are read here.
      here: records of a batch among `picks`, if others have those of other processes.
    """

    def __init__(
        self, picks: grain.MapDataset, make: Make, batch: int, rows: np.ndarray, options: grain.ReadOptions, here: int
    ):
        self._picks, self._make, self._batch, self._rows, self._options = picks, make, batch, rows, options
        self._here = here
        self.set_state({"global_next_index": 0})

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        value = next(self._iterator)
        self._next += self._batch
        return value

    def get_state(self) -> dict[str, int]:
        parts = self._batch // self._here
        return {"global_next_index": self._next} | ({"parts": parts} if parts > 1 else {})

    def set_state(self, state: dict[str, int]) -> None:
        self._next, parts = state["global_next_index"], self._batch // self._here
        if self._next and state.get("parts", 1) != parts:
            distributed.say(
                f"the data were dealt out in {state.get('parts', 1)} parts before and in {parts} now, so in this pass some "
                "images come twice and others not at all"
            )
        first = self._next * self._here // self._batch
        share = _Share(self._picks, self._make, first, self._here, self._rows)
        self._iterator = iter(grain.MapDataset.source(share).to_iter_dataset(self._options))


@dataclasses.dataclass(frozen=True)
class _Share:
    """`rows` of one batch after the other, from record `first` on."""

    picks: grain.MapDataset
    make: Make
    first: int
    batch: int
    rows: np.ndarray

    def __len__(self) -> int:
        # Without end, but Grain divides it as a float
        return min(math.ceil((len(self.picks) - self.first) / self.batch), 2**50)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        numbers = self.first + index * self.batch + self.rows
        return self.make(self.picks, numbers[numbers < len(self.picks)].tolist())


class _Mixed:
    """Numbers of records without end, in passes, each in its own order: runs are shuffled, then all records of a few runs.

    The runs of a mixture follow one another in the shuffled order and have `mixed` records or more (the last one fewer).
    """

    def __init__(self, runs: np.ndarray, mixed: int, seed: int):
        self._runs, self._mixed, self._seed = np.asarray(runs), mixed, seed
        self._begins = np.cumsum(self._runs) - self._runs
        self._pass = functools.lru_cache(2)(self._pass)  # a batch may lie in two passes
        self._mixture = functools.lru_cache(4)(self._mixture)

    def __len__(self) -> int:
        return 2**50

    def __getitem__(self, index: int) -> int:
        number, place = divmod(index, int(self._runs.sum()))
        begins = self._pass(number)[2]
        mixture = int(np.searchsorted(begins, place, "right")) - 1
        return int(self._mixture(number, mixture)[place - begins[mixture]])

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


def _further(make: Make, then: Callable, records: grain.MapDataset, numbers: list[int]) -> dict[str, np.ndarray]:
    return then(make(records, numbers))


def _stacked(pool: futures.Executor, records: grain.MapDataset, numbers: list[int]) -> dict[str, np.ndarray]:
    """A batch of records, which threads read and crop side by side."""
    parts = np.array_split(np.array(numbers), min(len(numbers), 4 * threads()))
    some = [record for part in pool.map(lambda part: [records[i] for i in part.tolist()], parts) for record in part]
    return {name: np.stack([record[name] for record in some]) for name in some[0]}


def _gathered(source: Any, picks: grain.MapDataset, numbers: list[int]) -> dict[str, np.ndarray]:
    """A batch read at once (see `Arrays.gather`)."""
    index, version = np.array([picks[i] for i in numbers]).T
    found = source.gather(index, version)
    batch = {name: found[name] for name in ("text", "text_mask") if name in found}
    for name in VERSIONED:
        if name in found:
            batch |= _as_trained(name, found[name])
    if source.info.classes:
        label = found["label"]
        for wrong in label[(label < 0) | (label >= source.info.classes)]:
            _check_label(int(wrong), source.info)
        batch["label"] = label.astype(np.int32)
    return batch


def _picks(index: grain.MapDataset, source: Any, train: bool) -> grain.MapDataset:
    """(record, version) in the order of training, with the random numbers that single records would see."""
    if train and source.versions > 1:
        return index.random_map(lambda i, rng: (i, int(rng.integers(source.versions))))
    return index.map(lambda i: (i, 0))


def _record_bytes(source: Any, data: Data) -> int:
    """About how much memory a record takes in a batch."""
    if hasattr(source, "gather"):
        return sum(x.nbytes for x in source.gather(np.array([0]), np.array([0])).values())
    return 3 * data.size**2 + 4 * source.info.text_rows * source.info.text_width


def _augmented(index: int, rng: np.random.Generator, *, source: Source, data: Data) -> dict[str, np.ndarray]:
    record, info = source[index], source.info
    for name in VERSIONED:
        if name in record:
            return _numbers(record, info) | _as_trained(name, record[name][rng.integers(len(record[name]))])
    if data.crop == "random":
        image = random_crop(record["image"], data.size, rng, data.min_fraction)
    else:
        image = centre_crop(record["image"], data.size)
    if data.flip and rng.random() < 0.5:
        image = flip(image)
    return _numbers(record, info) | {"image": image}


def _plain(index: int, *, source: Source, data: Data) -> dict[str, np.ndarray]:
    record, info = source[index], source.info
    for name in VERSIONED:
        if name in record:
            return _numbers(record, info) | _as_trained(name, record[name][0])
    return _numbers(record, info) | {"image": centre_crop(record["image"], data.size)}


def _as_trained(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Codes as int32 and other tokens as float32, whatever they are stored in; moments as they are."""
    kind = np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32
    return {name: values if name == "moments" else values.astype(kind)}


def _numbers(record: dict[str, Any], info: Info) -> dict[str, np.ndarray]:
    """Label, caption features and micro-conditions: what a batch keeps beside the image; a caption itself is no array."""
    kept = {key: record[key] for key in ("text", "text_mask", "micro") if key in record}
    if info.classes:
        _check_label(record["label"], info)
        kept["label"] = np.int32(record["label"])
    return kept


def _check_label(label: int, info: Info) -> None:
    if not 0 <= label < info.classes:
        raise ValueError(
            f"a record has the label {label}, outside 0..{info.classes - 1}; test images without labels cannot be used here"
        )
