"""The data sets by name, and what becomes of records that cannot be read."""

import dataclasses
import difflib
import logging
import threading
from collections.abc import Callable
from typing import Any

from ar_jax.data.base import Data, Source, Unreadable
from ar_jax.data.captions import with_text
from ar_jax.data.digits import idx, mnist5k
from ar_jax.data.emoji import emoji
from ar_jax.data.folder import image_folder
from ar_jax.data.packed import array_record, tokens
from ar_jax.data.tfds import tfds

SOURCES = {
    "mnist5k": mnist5k,
    "image_folder": image_folder,
    "array_record": array_record,
    "tfds": tfds,
    "idx": idx,
    "emoji": emoji,
    "tokens": tokens,
}


def open_source(data: Data) -> Source:
    """Opens the data set `data` names; a new one is a function in `SOURCES`.

    With `data.unreadable` skip the source also has `unreadable`, a list of the records it had to replace.

    Raises:
      ValueError, FileNotFoundError: the message names the field of `data` to change.
    """
    return Opened()(data)


class Opened:
    """`open_source` that opens everything once: who asks again gets the same source, with other text or none as well."""

    def __init__(self):
        self._sources: dict[Data, Source] = {}

    def __call__(self, data: Data) -> Source:
        if data not in self._sources:
            self._sources[data] = self._open(data)
        return self._sources[data]

    def _open(self, data: Data) -> Source:
        bare = plain(data)
        if data == bare:
            return _function(data.name)(data)
        source = self(bare)
        if data.text:
            source = with_text(source, data)
        if data.unreadable == "skip" and not hasattr(source, "gather"):  # of arrays every record can be read
            return Skipping(source, data.unreadable_limit)
        return source


def plain(data: Data) -> Data:
    """The same images without features of captions, none replaced."""
    return dataclasses.replace(
        data, text="", text_rows=Data.text_rows, unreadable="refuse", unreadable_limit=Data.unreadable_limit
    )


def _function(name: str) -> Callable[[Data], Source]:
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, 1)
        raise ValueError(
            f"data.name is {name!r}; it must be one of {', '.join(SOURCES)}"
            + (f"; is {near[0]} meant?" if near else "")
        )
    return SOURCES[name]


class Skipping:
    """A source in which the next readable record stands in for an unreadable one."""

    def __init__(self, source: Source, limit: int):
        self.source, self.limit, self.info = source, limit, source.info
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()
        if source.info.captions:
            self.captions = source.captions

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
