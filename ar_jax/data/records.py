"""Folders of shards, written so that a half-written one is never read; those of ArrayRecord files, read at random."""

import json
import os
import uuid
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
from array_record.python import array_record_module
from flax import serialization
from tqdm import tqdm

from ar_jax.data.base import Unreadable
from ar_jax.files import words
from ar_jax.files.places import local, made, path_of


class Sliceable(Protocol):
    """Records to write. A list will do; anything else makes the records of a slice when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Iterable[dict[str, Any]]: ...


class Form(NamedTuple):
    """How shards lie on disk.

    Attributes:
      suffix: of the file that is there once a shard is whole.
      write: (path of that file, records, progress) writes a shard.
      count: paths -> records in these shards.
    """

    suffix: str
    write: Callable[[Path, Iterable[dict[str, Any]], tqdm], None]
    count: Callable[[list[Path]], int]


def write_shards(
    out: str | os.PathLike,
    records: Sliceable,
    info: dict[str, Any],
    shards: int,
    *,
    only: Container[int] | None = None,
    form: Form | None = None,
) -> bool:
    """Writes records (dictionaries of arrays, bytes, strings and numbers) and `info` to a folder of shards.

    Shard i holds a fixed, contiguous range of the records and gets its name when it is whole, and info.json
    comes last. So after an interruption the same call goes on where the last one stopped.

    Args:
      out: folder; may hold an earlier, unfinished attempt at the same records.
      records: the records of a slice may be fewer than its length, if some have to be left out.
      info: JSON-able; anything that changes the records belongs in it, so that attempts do not mix.
      only: numbers of the shards to write here, when several processes share the work; None is all.
      form: ArrayRecord files if left out.
    Returns:
      Whether the folder is complete (with `only`, the others may not be done).
    Raises:
      ValueError: `out` holds something else.
    """
    out, form = path_of(out), form or ARRAY_RECORD
    if len(records) == 0:
        raise ValueError(f"no records to write to {out}")
    shards = min(shards, len(records))
    if shards < 1:
        raise ValueError(f"shards is {shards}; it must be at least 1")
    plan = json.loads(json.dumps(info | {"records": len(records), "shards": shards}))
    if (out / "info.json").exists():
        finished = read_json(out / "info.json")
        finished.pop("count", None)
        if finished == plan:
            return True
        raise ValueError(
            f"{out} already holds other records: {_difference(finished, plan)}. Use them as they are, or give another folder"
        )
    if (out / "unfinished.json").exists():
        if read_json(out / "unfinished.json") != plan:
            raise ValueError(
                f"{out} holds an unfinished attempt with other settings: {_difference(read_json(out / 'unfinished.json'), plan)}. "
                "Delete it or repeat them"
            )
    elif out.exists() and any(out.glob("shard-*")):
        raise ValueError(f"{out} holds shards of unknown origin; give another folder or delete it")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "unfinished.json", plan)

    bounds = [len(records) * i // shards for i in range(shards + 1)]
    mine = [i for i in range(shards) if only is None or i in only]
    total = sum(bounds[i + 1] - bounds[i] for i in mine)
    with tqdm(total=total, desc=str(out), unit=" records", disable=None) as progress:
        for i in mine:
            path = shard_path(out, i, shards, form)
            if path.exists():
                progress.update(bounds[i + 1] - bounds[i])
            else:
                form.write(path, records[bounds[i] : bounds[i + 1]], progress)

    paths = [shard_path(out, i, shards, form) for i in range(shards)]
    if not all(path.exists() for path in paths):
        return False
    write_json(out / "info.json", plan | {"count": form.count(paths)})
    (out / "unfinished.json").unlink(missing_ok=True)
    return True


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first field in which two descriptions differ."""
    name = next((name for name in (*here, *there) if here.get(name) != there.get(name)), "")
    return f"{name} is {words.shown(there.get(name))} there and {words.shown(here.get(name))} here"


def open_shards(folder: Path, form: Form) -> tuple[dict[str, Any], list[Path]]:
    """The info.json of a complete folder, and the files of its shards that say that these are whole, on a disk.

    Raises:
      FileNotFoundError, ValueError: half-written, damaged, or not such a folder.
    """
    if not (folder / "info.json").exists():
        unfinished = (folder / "unfinished.json").exists()
        raise FileNotFoundError(
            f"{folder} has no info.json; "
            + (
                "its writer was interrupted: run the same command again"
                if unfinished
                else "write records with python -m ar_jax.data.pack or python -m ar_jax.tokenize"
            )
        )
    folder = local(folder)
    info = read_json(folder / "info.json")
    paths = [shard_path(folder, i, info["shards"], form) for i in range(info["shards"])]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; copy it again, or delete the folder and write it anew")
    count = form.count(paths)
    if count != info["count"]:
        raise ValueError(
            f"{folder} holds {count} records, its info.json says {info['count']}; delete the folder and write it anew"
        )
    return info, paths


class Records:
    """Records of ArrayRecord files, by index; `info` is the folder's info.json."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = path_of(folder)
        self.info, paths = open_shards(self.folder, ARRAY_RECORD)
        self._source = _array_record(paths)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return serialization.msgpack_restore(self._source[index])
        except Exception as error:  # the reader and msgpack each have their own
            raise Unreadable(f"record {index} of {self.folder}", error) from error


def shard_path(folder: Path, i: int, shards: int, form: Form) -> Path:
    return folder / f"shard-{i:05d}-of-{shards:05d}{form.suffix}"


def _array_record(paths: list[Path]) -> grain.sources.ArrayRecordDataSource:
    return grain.sources.ArrayRecordDataSource([str(path) for path in paths])


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


ARRAY_RECORD = Form(".array_record", _write_shard, lambda paths: len(_array_record(paths)))


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder and write it anew") from error


def write_json(path: Path, values: dict[str, Any]):
    part = path.with_suffix(f".{uuid.uuid4().hex[:8]}.part")  # several processes may write it at once
    with made(path, part) as part:
        part.write_text(json.dumps(values, indent=1))
