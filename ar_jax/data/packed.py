"""Records packed into ArrayRecord shards: images (`ar_jax.data.pack`) or tokens (`ar_jax.tokenize`)."""

import bisect
import io
import itertools
from pathlib import Path
from typing import Any

from ar_jax.data.base import Data, Info, folder_of, read_info, split_folders
from ar_jax.data.images import read_image
from ar_jax.data.records import Records, open_records


class Packed:
    """The records of one or more folders of shards, one folder after the other."""

    def __init__(self, parts: list[Records], info: Info):
        self.parts, self.info = parts, info
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, i, record = self.read(index)
        if "image" in record:
            record["image"] = read_image(io.BytesIO(record["image"]), name=f"record {i} of {part.folder}")
        return record

    def captions(self) -> list[str]:
        return [self.read(i)[2]["caption"] for i in range(len(self))]

    def read(self, index: int) -> tuple[Records, int, dict[str, Any]]:
        """The folder that holds a record, its place there, and the record with its image still encoded."""
        which = bisect.bisect_right(self._ends, index)
        i = index - (self._ends[which - 1] if which else 0)
        return self.parts[which], i, self.parts[which][i]


def array_record(data: Data) -> Packed:
    """Images packed by `python -m ar_jax.data.pack FOLDER OUT`."""
    return _open(data, "image", "tokens")


def tokens(data: Data) -> Packed:
    """Tokens cached by `python -m ar_jax.tokenize`; a record holds all augmented versions of an image."""
    return _open(data, "tokens", "array_record")


def _open(data: Data, key: str, other: str) -> Packed:
    root = folder_of(data)
    folders: list[Path] = split_folders(root, data.split)
    parts = [open_records(folder) for folder in folders]
    infos = [read_info(part.info) for part in parts]
    if any(info != infos[0] for info in infos):
        raise ValueError(
            f"data.path={root}: the splits {', '.join(map(str, folders))} disagree on classes "
            "or captions; write them from one data set"
        )
    source = Packed(parts, infos[0])
    if not len(source):
        raise ValueError(f"data.path={root} holds no records; write it anew")
    found = source.read(0)[2]
    if key not in found:
        raise ValueError(f"data.path={root} holds {' and '.join(found)}, no {key}; is data.name={other} meant?")
    return source
