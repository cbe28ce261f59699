"""Records packed into shards: images (`ar_jax.data.pack`) or tokens (`ar_jax.tokenize`)."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.data import arrays
from ar_jax.data.arrays import Arrays
from ar_jax.data.base import Data, Info, folder_of, read_info, split_folders, spread
from ar_jax.data.images import read_image
from ar_jax.data.records import Records, read_json
from ar_jax.files.places import path_of


def open_records(folder: str | os.PathLike) -> Records | Arrays:
    """Opens a complete folder of shards.

    Raises:
      FileNotFoundError, ValueError: half-written, damaged, or not such a folder.
    """
    folder = path_of(folder)
    about = folder / "info.json"
    return (Arrays if about.exists() and read_json(about).get("form") == arrays.NAME else Records)(folder)


class Packed:
    """The records of one or more folders of shards, one folder after the other."""

    def __init__(self, parts: list[Records | Arrays], info: Info, upright: bool):
        self.parts, self.info, self.upright = parts, info, upright
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, i, record = self.read(index)
        if "image" in record:
            name = f"record {i} of {part.folder}"
            record["image"] = read_image(io.BytesIO(record["image"]), name, self.upright)
        return record

    def captions(self) -> list[str]:
        return [self.read(i)[2]["caption"] for i in range(len(self))]

    def read(self, index: int) -> tuple[Records, int, dict[str, Any]]:
        """The folder that holds a record, its place there, and the record with its image still encoded."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        ((which, _, (i,)),) = spread(self._ends, np.array([index]))
        return self.parts[which], int(i), self.parts[which][int(i)]


class Gathered(Packed):
    """The same of arrays, from which whole batches can be read at once."""

    def __init__(self, parts: list[Arrays], info: Info, upright: bool):
        super().__init__(parts, info, upright)
        self.versions = parts[0].versions

    def gather(self, index: np.ndarray, version: np.ndarray) -> dict[str, np.ndarray]:
        """See `Arrays.gather`."""
        batch: dict[str, np.ndarray] = {}
        for part, places, rows in spread(self._ends, index):
            for name, found in self.parts[part].gather(rows, version[places]).items():
                batch.setdefault(name, np.empty((len(index), *found.shape[1:]), found.dtype))[places] = found
        return batch


def array_record(data: Data) -> Packed:
    """Images packed by `python -m ar_jax.data.pack FOLDER OUT`."""
    return _open(data, ("image",), "tokens")


def tokens(data: Data) -> Packed:
    """Tokens cached by `python -m ar_jax.tokenize`; a record holds all augmented versions of an image."""
    return _open(data, arrays.VERSIONED, "array_record")


def _open(data: Data, keys: tuple[str, ...], other: str) -> Packed:
    root = folder_of(data)
    folders: list[Path] = split_folders(root, data.split)
    parts = [open_records(folder) for folder in folders]
    infos = [read_info(part.info) for part in parts]
    if any(info != infos[0] for info in infos):
        raise ValueError(
            f"data.path={root}: the splits {', '.join(map(str, folders))} disagree on classes "
            "or captions; write them from one data set"
        )
    parts = [part for part in parts if len(part)]
    if not parts:
        raise ValueError(f"data.path={root} holds no records; write it anew")
    alike = {(part.versions, part.fields) if isinstance(part, Arrays) else None for part in parts}
    source = (Packed if None in alike or len(alike) > 1 else Gathered)(parts, infos[0], data.upright)
    found = source.read(0)[2]
    if not found.keys() & set(keys):
        raise ValueError(f"data.path={root} holds {' and '.join(found)}, no {keys[0]}; is data.name={other} meant?")
    return source
