"""The data sets by name, and what becomes of records that cannot be read."""

import difflib
import logging
import threading
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
    if data.name not in SOURCES:
        near = difflib.get_close_matches(data.name, SOURCES, 1)
        raise ValueError(
            f"data.name is {data.name!r}; it must be one of {', '.join(SOURCES)}"
            + (f"; is {near[0]} meant?" if near else "")
        )
    source = SOURCES[data.name](data)
    if data.text:
        source = with_text(source, data)
    return Skipping(source, data.unreadable_limit) if data.unreadable == "skip" else source


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
