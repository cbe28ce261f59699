"""Folders of ArrayRecord shards: written so that a half-written one is never read, and read at random."""

import json
import os
import uuid
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, Protocol

import grain
from array_record.python import array_record_module
from flax import serialization
from tqdm import tqdm

from ar_jax.data.base import Unreadable


class Sliceable(Protocol):
    """Records to write. A list will do; anything else makes the records of a slice when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Iterable[dict[str, Any]]: ...


def write_shards(
    out: str | os.PathLike, records: Sliceable, info: dict[str, Any], shards: int, *, only: Container[int] | None = None
) -> bool:
    """Writes records (dictionaries of arrays, bytes, strings and numbers) and `info` to a folder of shards.

    Shard i holds a fixed, contiguous range of the records and gets its name when it is whole, and info.json
    comes last. So after an interruption the same call goes on where the last one stopped.

    Args:
      out: folder; may hold an earlier, unfinished attempt at the same records.
      records: the records of a slice may be fewer than its length, if some have to be left out.
      info: JSON-able; anything that changes the records belongs in it, so that attempts do not mix.
      only: numbers of the shards to write here, when several processes share the work; None is all.
    Returns:
      Whether the folder is complete (with `only`, the others may not be done).
    Raises:
      ValueError: `out` holds something else.
    """
    out = Path(out)
    if len(records) == 0:
        raise ValueError(f"no records to write to {out}")
    shards = min(shards, len(records))
    if shards < 1:
        raise ValueError(f"shards is {shards}; it must be at least 1")
    plan = json.loads(json.dumps(info | {"records": len(records), "shards": shards}))
    if (out / "info.json").exists():
        finished = _read_json(out / "info.json")
        finished.pop("count", None)
        if finished == plan:
            return True
        raise ValueError(f"{out} already holds other records; give another folder or delete it")
    if (out / "unfinished.json").exists():
        if _read_json(out / "unfinished.json") != plan:
            raise ValueError(f"{out} holds an unfinished attempt with other settings; delete it or repeat them")
    elif out.exists() and any(out.glob("shard-*")):
        raise ValueError(f"{out} holds shards of unknown origin; give another folder or delete it")
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / "unfinished.json", plan)

    bounds = [len(records) * i // shards for i in range(shards + 1)]
    mine = [i for i in range(shards) if only is None or i in only]
    total = sum(bounds[i + 1] - bounds[i] for i in mine)
    with tqdm(total=total, desc=str(out), unit=" records", disable=None) as progress:
        for i in mine:
            path = out / _shard_name(i, shards)
            if path.exists():
                progress.update(bounds[i + 1] - bounds[i])
            else:
                _write_shard(path, records[bounds[i] : bounds[i + 1]], progress)

    paths = [out / _shard_name(i, shards) for i in range(shards)]
    if not all(path.exists() for path in paths):
        return False
    count = len(grain.sources.ArrayRecordDataSource([str(path) for path in paths]))
    _write_json(out / "info.json", plan | {"count": count})
    (out / "unfinished.json").unlink(missing_ok=True)
    return True


class Records:
    """What `write_shards` wrote, by index; `info` is its info.json."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / "info.json").exists():
            unfinished = (self.folder / "unfinished.json").exists()
            raise FileNotFoundError(
                f"{self.folder} has no info.json; "
                + (
                    "its writer was interrupted: run the same command again"
                    if unfinished
                    else "write records with python -m ar_jax.data.pack or python -m ar_jax.tokenize"
                )
            )
        self.info = _read_json(self.folder / "info.json")
        paths = [self.folder / _shard_name(i, self.info["shards"]) for i in range(self.info["shards"])]
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing; copy it again, or delete the folder and write it anew")
        self._source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        if len(self._source) != self.info["count"]:
            raise ValueError(
                f"{self.folder} holds {len(self._source)} records, its info.json says "
                f"{self.info['count']}; delete the folder and write it anew"
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return serialization.msgpack_restore(self._source[index])
        except Exception as error:  # the reader and msgpack each have their own
            raise Unreadable(f"record {index} of {self.folder}", error) from error


def open_records(folder: str | os.PathLike) -> Records:
    """Opens a complete folder of shards.

    Raises:
      FileNotFoundError, ValueError: half-written, damaged, or not such a folder.
    """
    return Records(folder)


def _shard_name(i: int, shards: int) -> str:
    return f"shard-{i:05d}-of-{shards:05d}.array_record"


def _write_shard(path: Path, records: Iterable[dict[str, Any]], progress: tqdm):
    part = path.with_suffix(".part")
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
    try:
        for record in records:
            writer.write(serialization.msgpack_serialize(record))
            progress.update()
        writer.close()
        os.replace(part, path)
    finally:
        if writer.is_open():
            writer.close()
        part.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder and write it anew") from error


def _write_json(path: Path, values: dict[str, Any]):
    part = path.with_suffix(f".{uuid.uuid4().hex[:8]}.part")  # several processes may write it at once
    part.write_text(json.dumps(values, indent=1))
    os.replace(part, path)
