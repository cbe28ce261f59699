"""The data sets by name, and what becomes of records that cannot be read."""

import dataclasses
import difflib
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ar_jax.data.base import MOST_CLASSES, Data, Info, Source, Unreadable, label_name, renumbered
from ar_jax.data.captions import with_text
from ar_jax.data.digits import idx, mnist5k
from ar_jax.data.emoji import emoji
from ar_jax.data.folder import image_folder
from ar_jax.data.huggingface import huggingface
from ar_jax.data.packed import array_record, tokens
from ar_jax.data.parquet import parquet
from ar_jax.data.tfds import tfds
from ar_jax.data.webdataset import webdataset
from ar_jax.files import codec
from ar_jax.machine import distributed

SOURCES = {  # functions of `Data`, and of a `part` (index, count) if they can open a part of their files only
    "mnist5k": mnist5k,
    "image_folder": image_folder,
    "webdataset": webdataset,
    "huggingface": huggingface,
    "parquet": parquet,
    "array_record": array_record,
    "tfds": tfds,
    "idx": idx,
    "emoji": emoji,
    "tokens": tokens,
}
OwnSource = Callable[[Data], Source] | Callable[[Data, tuple[int, int]], Source]


def open_source(data: Data) -> Source:
    """Opens the data set `data` names; a new one is a function in `SOURCES`, or one of your own in a trusted module.

    With `data.unreadable` skip the source also has `unreadable`, a list of the records it had to replace.

    Raises:
      ValueError, FileNotFoundError: the message names the field of `data` to change.
    """
    return Opened()(data)


class Opened:
    """`open_source` that opens everything once: who asks again gets the same source, with other text or none as well.

    Args:
      part: with `data.shards` split, the part of the shards to open, of so many; processes with different parts open the same
        data in the same order.

    Splits of one data set number their classes alike: as `like` says, if it is called, else as the first one opened.
    """

    def __init__(self, part: tuple[int, int] = (0, 1)):
        self._part, self._sources, self._numbering = part, {}, {}

    def like(self, data: Data, info: Info, whose: str) -> None:
        """From now on classes of these data are numbered as in `info`, which `whose` has."""
        self._numbering[data.name, data.path] = info, whose

    def __call__(self, data: Data) -> Source:
        if data not in self._sources:
            self._sources[data] = self._open(data)
        return self._sources[data]

    def _open(self, data: Data) -> Source:
        bare = plain(data)
        if data == bare:
            return self._bare(data)
        source = self(bare)
        if data.text:
            source = with_text(source, data)
        if data.unreadable == "skip" and not hasattr(source, "gather"):  # of arrays every record can be read
            return Skipping(source, data.unreadable_limit)
        return source

    def _bare(self, data: Data) -> Source:
        return self._numbered(self._dealt(data), data)

    def _numbered(self, source: Source, data: Data) -> Source:
        """The source with labels as those that its data were opened with before have them."""
        if (count := source.info.classes) > MOST_CLASSES:
            raise ValueError(
                f"data.path={data.path} has {count} classes, such as {label_name(source.info, count - 1)}, of {MOST_CLASSES} "
                "at most; are its labels dates or identities? Leave them out, or group them"
            )
        info, whose = self._numbering.setdefault((data.name, data.path), (source.info, ""))
        numbers = renumbered(np.arange(source.info.classes), source.info.class_names, info.class_names)
        if not info.classes or (numbers == np.arange(source.info.classes)).all():
            return source
        where = f"data.path={data.path} ({data.split})"
        if (numbers < 0).any():
            new = [label_name(source.info, i) for i in np.flatnonzero(numbers < 0).tolist()]
            raise ValueError(
                f"{where} has classes such as {', '.join(new[:3])} that {whose or 'its other split'} does not have; their "
                "numbers would mean other classes. Name new data in a new run (--name), or take these images out"
            )
        mine, theirs = (
            ", ".join(label_name(one, i) for i in range(min(one.classes, 6))) for one in (source.info, info)
        )
        if whose:
            distributed.say(
                f"{where}: its classes ({mine}, ...) are numbered as in {whose} ({theirs}, ...); a new run numbers them anew"
            )
        return (RenumberedArrays if hasattr(source, "gather") else Renumbered)(source, numbers, info)

    def _dealt(self, data: Data) -> Source:
        function = _function(data.name)
        if data.shards == "all":
            return function(data)
        if "part" not in inspect.signature(function).parameters:
            raise ValueError(
                f"data.shards is split, but data.name={data.name} has no shards to deal out; set it to all"
            )
        source = function(data, self._part)
        # of labels without names, other parts may have larger ones
        classes = int(distributed.gathered(source.info.classes).max())
        if classes != source.info.classes:
            source.info = dataclasses.replace(source.info, classes=classes)
        return source


def plain(data: Data) -> Data:
    """The same images without features of captions, none replaced."""
    return dataclasses.replace(
        data, text="", text_rows=Data.text_rows, unreadable="refuse", unreadable_limit=Data.unreadable_limit
    )


def _function(name: str) -> Callable[..., Source]:
    if name in SOURCES:
        return SOURCES[name]
    if ":" in name:
        return codec.decode({"function": name}, OwnSource, "data.name")
    near = difflib.get_close_matches(name, SOURCES, 1)
    raise ValueError(
        f"data.name is {name!r}; it must be one of {', '.join(SOURCES)}, or my_module:function"
        + (f"; is {near[0]} meant?" if near else "")
    )


class Renumbered:
    """A source whose labels are other numbers, int [classes], and what it has beside records as it is."""

    def __init__(self, source: Source, numbers: np.ndarray, info: Info):
        self.source, self.numbers = source, numbers
        self.info = dataclasses.replace(source.info, classes=info.classes, class_names=info.class_names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source[index]
        return record | {"label": int(self._new(record["label"]))}

    def _new(self, labels):
        known = (labels >= 0) & (labels < len(self.numbers))  # others are refused by whoever uses them
        return np.where(known, self.numbers[np.where(known, labels, 0)], labels)


class RenumberedArrays(Renumbered):
    """The same of a source that is read a batch at a time."""

    def gather(self, index: np.ndarray, version: np.ndarray) -> dict[str, np.ndarray]:
        batch = self.source.gather(index, version)
        return batch | {"label": self._new(batch["label"])}


@dataclasses.dataclass(frozen=True)
class Spread:
    """`count` evenly spaced records of a source."""

    source: Source
    count: int

    @property
    def info(self) -> Info:
        return self.source.info

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[index * len(self.source) // self.count]


class Skipping:
    """A source in which the next readable record stands in for an unreadable one."""

    def __init__(self, source: Source, limit: int):
        self.source, self.limit, self.info = source, limit, source.info
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()
        if source.info.captions:
            self.captions = source.captions
        if hasattr(source, "runs"):
            self.runs = source.runs

    @property
    def unreadable(self) -> list[str]:
        """Names of the records found unreadable so far, in their order."""
        with self._lock:
            return [name for _, name in sorted(self._bad.items())]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for i in [*range(index, len(self)), *range(index)]:
            if i not in self._bad:
                try:
                    return self.source[i]
                except Unreadable as error:
                    self._note(i, error)
        raise ValueError(f"none of the {len(self)} records can be read, such as {self.unreadable[0]}")

    def _note(self, index: int, error: Unreadable):
        with self._lock:
            if index in self._bad:
                return  # another thread met it too
            self._bad[index] = error.name
            names = [name for _, name in sorted(self._bad.items())]
        logging.warning("skipped %s, which cannot be read (%s)", error.name, error.reason)
        if len(names) > self.limit:
            raise ValueError(
                f"{len(names)} records cannot be read, more than data.unreadable_limit={self.limit}: {', '.join(names)}"
            ) from error
