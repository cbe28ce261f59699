"""Where things lie: on disks, or in buckets (gs://, s3://) that a client reaches over the network.

`path_of` is the one door. Of what a user names it makes a `pathlib.Path` or, in a bucket, an `etils.epath.Path`, which has its
methods (`/`, `exists`, `iterdir`, `read_text`, `unlink`, ...). What differs between the two is done here: nothing in a bucket is
half-written or renamed, there are no folders but in names, and what is read is asked for in ranges of bytes.
"""

import contextlib
import dataclasses
import functools
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ar_jax.files import cache

SCHEMES = ("gs", "s3")

_REMOTE = re.compile(r"([a-z][a-z0-9+]+):/+(.*)", re.DOTALL)  # `Path` takes one of two slashes

# Where TensorFlow is installed, etils would load it, which takes the memory of all GPUs
os.environ.setdefault("EPATH_USE_TF", "false")


def path_of(text: str | os.PathLike) -> Path:
    """What a user names, as a `pathlib.Path` or, in a bucket, an `etils.epath.Path`.

    Raises:
      ValueError: an address that is not reached, or the client for it is not installed.
    """
    if not (found := _REMOTE.fullmatch(os.fspath(text))):
        return Path(text)
    scheme, rest = found.groups()
    if scheme not in SCHEMES or not rest:
        raise ValueError(
            f"{os.fspath(text)!r} is not reached: files lie on disks or in buckets, gs://BUCKET/... and s3://BUCKET/...; mount "
            f"the {scheme} storage, and give the path"
        )
    _client(scheme)
    from etils import epath

    return epath.Path(f"{scheme}://{posixpath.normpath(rest)}")  # no store follows `..`


def reachable(value: Any, where: str = "") -> Any:
    """The value, if every address in its texts and paths can be reached; to be asked before anything begins.

    Args:
      value: options, their fields, a list of arguments.
      where: their names, for the message.
    Raises:
      ValueError: one cannot (see `path_of`).
    """
    if isinstance(value, (str, os.PathLike)):
        try:
            path_of(re.sub(r"^--[\w.-]+=", "", os.fspath(value)))
        except ValueError as error:
            raise ValueError(f"{where} is {error}" if where else str(error)) from error
    elif isinstance(value, (list, tuple)):
        for one in value:
            reachable(one, where)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            reachable(getattr(value, field.name, None), f"{where}.{field.name}".lstrip("."))
    return value


def on_disk(text: str | os.PathLike, what: str) -> Path:
    """The path of what cannot lie in a bucket.

    Raises:
      ValueError: it does.
    """
    path = path_of(text)
    if not isinstance(path, Path):
        raise ValueError(
            f"{what} is {str(path)!r}, but is on a disk only: copy it, or mount the bucket, and give the path"
        )
    return path


def local(path: Path) -> Path:
    """The file or folder on a disk; of one in a bucket a copy in the cache, made once of what lies there now.

    Processes that share the cache share the work (see `cache.make`).

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: it does not fit on the disk of the cache.
    """
    if isinstance(path, Path):
        return path
    found = _found(path)
    if not found:
        raise FileNotFoundError(f"{path} does not exist")
    folder = cache.place("buckets")
    copy = folder / cache.key([path, *(f"{name} {about}" for name, about in found.items())]) / path.name
    missing = {name: about["size"] for name, about in found.items() if not (copy / name).exists()}
    if (size := sum(missing.values())) > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"{path} has {size / 1e9:.1f} GB, which are copied to {folder}, where {free / 1e9:.1f} GB are free; name a larger "
            f"disk in {cache.VARIABLE}, or mount the bucket"
        )
    for name in missing:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
    names = list(missing)
    cache.make([copy / name for name in names], lambda i, part: _fs(path).get_file(str(path / names[i]), str(part)))
    return copy


@contextlib.contextmanager
def made(path: Path, part: Path | None = None) -> Iterator[Path]:
    """A path on a disk to write a file to; it becomes `path` when it is whole: is renamed, or sent to the bucket at once.

    Args:
      part: its name till then on a disk, beside `path`, where several processes may write one file.
    """
    if isinstance(path, Path):
        part = part or path.with_name(f".{path.name}.tmp")
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    else:
        with tempfile.TemporaryDirectory(prefix="ar_jax-") as folder:
            yield Path(folder) / path.name
            _fs(path).put_file(str(Path(folder) / path.name), str(path))


def absolute(path: Path) -> Path:
    return path.absolute() if isinstance(path, Path) else path  # etils would begin with the working directory


def resolved(path: Path) -> Path:
    return path.resolve() if isinstance(path, Path) else path


def below(folder: Path) -> list[Path]:
    """All files in a folder, at any depth (of a disk also its folders)."""
    return list(folder.rglob("*")) if isinstance(folder, Path) else [folder / name for name in _found(folder) if name]


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of all files in a folder, at any depth, by path from there: of a bucket in one listing."""
    if isinstance(folder, Path):
        return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {name: about["size"] for name, about in _found(folder).items() if name}


def stamp(path: Path) -> int | str:
    """Changes when a file, or what lies in a folder, does."""
    if isinstance(path, Path):
        return path.stat().st_mtime_ns
    about = _fs(path).info(str(path))
    return cache.key(_found(path).values() if about["type"] == "directory" else [about])


def remove_tree(folder: Path, ignore_errors: bool = False) -> None:
    """Removes a folder and what is in it."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(*[OSError] * ignore_errors):
        _fs(folder).rm(str(folder), recursive=True)


def rename_tree(folder: Path, to: Path) -> None:
    """Gives a folder another name; in a bucket that is to copy what is in it."""
    if isinstance(folder, Path):
        folder.rename(to)
        return
    for name in _found(folder):
        _fs(folder).copy(str(folder / name), str(to / name))
    remove_tree(folder)


def seekable(path: Path, **how: Any) -> Path | BinaryIO:
    """What readers of `Path`s and files (numpy, zipfile, Pillow, Arrow) read a file from without having all of it.

    Args:
      how: a file in a bucket is fetched, see fsspec's `open`; else 5 MB ahead.
    """
    return path if isinstance(path, Path) else _fs(path).open(str(path), "rb", **how)


def content(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a file, of one in a bucket by a single request; fewer where it ends before."""
    if not isinstance(path, Path):
        return _fs(path).cat_file(str(path), start=offset or None, end=None if size is None else offset + size)
    if size is None:
        return path.read_bytes()[offset:]
    file = os.open(path, os.O_RDONLY)  # of many files as many as there are could not stay open
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` of a folder in a bucket, a listing for each folder in it."""
    scheme = str(folder).partition("://")[0]
    for base, folders, names in _fs(folder).walk(str(folder), on_error="raise"):
        yield f"{scheme}://{base}", folders, names


def _found(path):
    """What a listing says of each file below a path in a bucket, by path from there ("" of a file itself), in order."""
    fs, start = _fs(path), str(path).partition("://")[2]
    found = fs.find(str(path), detail=True)
    if set(found) == {start}:
        return {"": fs.info(str(path))}
    return {name.removeprefix(f"{start}/"): about for name, about in sorted(found.items())}


def _fs(path):
    return _client(str(path).partition("://")[0])


@functools.cache
def _client(scheme):
    try:
        import fsspec

        for name in ("gs", "gcs", "s3"):  # a listing that is kept does not show what other hosts write
            fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise ValueError(f"{scheme}:// needs a client ({error}): pip install 'ar_jax[remote]'") from error
