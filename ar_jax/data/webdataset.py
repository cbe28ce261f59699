"""WebDataset: tars in which the files of a sample follow one another (`0001.jpg`, `0001.cls`, `0001.txt`), read at random.

The places of all samples are found once, by Python's tarfile, and kept in the cache. So records have numbers, and whatever
holds for files in folders holds here: shuffled as a whole, resumed exactly, on any number of processes.
"""

import io
import itertools
import json
import os
import tarfile
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ar_jax.data.base import Data, Info, Unreadable, seen_classes
from ar_jax.data.folder import SUFFIXES
from ar_jax.data.images import read_image
from ar_jax.data.shards import RANGE, shard_files
from ar_jax.files import cache
from ar_jax.files.codec import shown
from ar_jax.files.places import content, path_of, seekable, stamp

VERSION = 1  # of what is kept
NAMES = "classnames.txt"  # a class a line, in the order of labels
LARGEST = 2**29  # bytes of an image's file
BLOCK = 2**24  # bytes of a tar in a bucket that are fetched at a time to index it
LONGEST = 2**20  # bytes of a caption, or of a JSON with one
NONE, TEXT, JSON = range(3)


class WebDataset:
    """Samples of tars, one tar after the other, with the label in `.cls` and the caption in `.txt` or `.json`."""

    def __init__(self, files: list[Path], indices: list[Path], info: Info, parts: dict[str, np.ndarray], upright: bool):
        self.upright = upright
        self.files, self.indices, self.info = files, indices, info
        self.ends, self.image, self.label, self.text, self.kind = (
            parts[name] for name in ("ends", "image", "label", "text", "kind")
        )

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            content = io.BytesIO(self._bytes(index, self.image, LARGEST))
            record = {"image": read_image(content, upright=self.upright)}
            if self.info.classes:
                record["label"] = int(self.label[index])
            if self.info.captions:
                record["caption"] = self._caption(index)
        except (Unreadable, ValueError, OSError) as error:
            raise Unreadable(self._name(index), getattr(error, "reason", error)) from error
        return record

    def captions(self) -> list[str]:
        return [self._caption(i) for i in range(len(self))]

    def _caption(self, index):
        found = self._bytes(index, self.text, LONGEST)
        return caption_of(found) if self.kind[index] == JSON else found.decode("utf-8", "replace").strip()

    def _bytes(self, index, places, most):
        offset, size = (int(number) for number in places[index])
        if size < 0:
            raise ValueError("the sample has no image")
        if size > most:
            raise ValueError(f"it has {size} bytes, more than {most}")
        found = content(self.files[self._tar(index)], offset, size)
        if len(found) != size:
            raise ValueError("the file ends before")
        return found

    def _tar(self, index):
        return int(np.searchsorted(self.ends, index, "right"))

    def _name(self, index):
        tar = self._tar(index)
        with np.load(self.indices[tar], allow_pickle=False) as kept:
            keys = kept["keys"].tobytes().decode("utf-8", "replace").split("\0")
        return f"sample {shown(keys[index - (int(self.ends[tar - 1]) if tar else 0)])} of {self.files[tar]}"


def webdataset(data: Data, part: tuple[int, int] = (0, 1)) -> WebDataset:
    """The tars of `data.path` (see `shard_files`), not compressed.

    classnames.txt beside them names the classes; without it they are those seen (see `seen_classes`), or, if every host opens
    its own part, as many as the largest label says.
    """
    files, every = shard_files(data, ".tar", part)
    names = _class_names(data.path)
    needed = files if names else every
    indices = dict(zip(needed, index_tars(needed)))
    found = {file: _read(index) for file, index in indices.items()}
    parts = {name: np.concatenate([found[file][name] for file in files]) for name in ("image", "label", "text", "kind")}
    where = f"data.path={data.path}"
    if not len(parts["image"]) or (parts["image"][:, 1] < 0).all():
        raise ValueError(f"{where}: the tars hold no images ({' '.join(SUFFIXES)})")
    for name, has in (("label (.cls)", parts["label"] >= 0), ("caption (.txt, .json)", parts["kind"] != NONE)):
        if has.any() and not has.all():
            raise ValueError(f"{where}: {int((~has).sum())} of {len(has)} samples have no {name}; all must, or none")
    seen, called = seen_classes(np.concatenate([np.unique(kept["label"]) for kept in found.values()]))
    largest = int(seen.max(initial=-1))
    if names and largest >= len(names):
        raise ValueError(f"{where}: {NAMES} has {len(names)} names, but there is a label {largest}")
    labelled = parts["label"][0] >= 0
    if called and not names and part[1] == 1:  # in other parts may be others
        names, parts["label"] = called, np.searchsorted(seen, parts["label"]).astype(np.int32)
    info = Info(
        classes=(len(names) or largest + 1) if labelled else 0,
        class_names=names if labelled else (),
        captions=bool(parts["kind"][0] != NONE),
    )
    parts["ends"] = np.cumsum([len(found[file]["image"]) for file in files])
    return WebDataset(files, [indices[file] for file in files], info, parts, data.upright)


def caption_of(content: bytes) -> str | None:
    """The caption in a sample's JSON, if there is one."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON cannot be read: {error}") from None
    names = ("caption", "text") if isinstance(found, dict) else ()
    return next((found[name] for name in names if isinstance(found.get(name), str)), None)


def index_tars(files: list[Path]) -> list[Path]:
    """The index of every tar, made where there is none of the tar as it is now."""
    folder = cache.place("tars")
    with futures.ThreadPoolExecutor(32) as pool:  # to ask for them in a bucket one after the other takes long
        paths = [folder / f"{key}.npz" for key in pool.map(_as_now, files)]
    missing = sum(not path.exists() for path in paths)
    with tqdm(total=missing, desc="indexing tars", disable=None if missing else True) as progress:

        def write(i, path):
            found = _index(files[i])
            with open(path, "wb") as kept:
                np.savez(kept, **found)
            progress.update()

        cache.make(paths, write)
    return paths


def _as_now(file):
    """Names a tar, and what is in it now."""
    try:
        if not isinstance(file, Path):
            return cache.key((VERSION, file, stamp(file)))
        about = file.stat()
        return cache.key((VERSION, file.resolve(), about.st_size, about.st_mtime_ns))
    except OSError as error:
        raise FileNotFoundError(f"{file} cannot be read: {error.strerror or 'it is not there'}") from error


def _read(path):
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in ("image", "label", "text", "kind")}
    except Exception as error:  # zipfile and numpy have their own
        raise ValueError(f"{path}, the index of a tar that was kept, is damaged ({error}); delete it") from error


def _class_names(path):
    place = path_of(path).expanduser()
    file = (place.parent if RANGE.search(path) else place) / NAMES
    if not file.is_file():
        return ()
    return tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())


def _index(path: Path) -> dict[str, np.ndarray]:
    """Of every sample: "image" and "text", offset and size (-1: none) int64 [n 2]; "label" int32 [n] (-1: none); "kind" of
    the text int8 [n]; and "keys", bytes with a zero between two."""
    samples = []
    try:
        # of a tar in a bucket all is fetched, once: a request for every header takes longer
        raw = io.FileIO(path) if isinstance(path, Path) else seekable(path, cache_type="blockcache", block_size=BLOCK)
        with _Headers(raw) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in itertools.groupby(_members(tar), key=lambda member: member[0]):
                samples.append((key, *_sample(path, file, key, {end: where for _, end, where in members})))
    except (tarfile.TarError, EOFError) as error:
        after = f" after {len(samples)} samples" if samples else ", or is compressed"
        raise ValueError(f"{path} is damaged{after} ({error}); data.name=webdataset reads plain tars") from error
    keys, images, labels, texts, kinds = zip(*samples) if samples else ((),) * 5
    return {
        "image": np.array(images, np.int64).reshape(-1, 2), "text": np.array(texts, np.int64).reshape(-1, 2),
        "label": np.array(labels, np.int32), "kind": np.array(kinds, np.int8),
        "keys": np.frombuffer("\0".join(keys).encode("utf-8", "replace"), np.uint8),
    }  # fmt: skip


class _Headers(io.BufferedReader):
    """A tar of which only headers are read; a header may name any size, and it is read whole."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LONGEST:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)

    def at(self, offset: int, size: int) -> bytes:
        """From elsewhere in the tar, at most so many bytes."""
        if isinstance(self.raw, io.FileIO):
            return os.pread(self.fileno(), size, offset)
        self.seek(offset)
        return super().read(size)


def _members(tar):
    """(key, ending, (offset, size)) of every file, as the package webdataset names them: the first dot ends the key."""
    while (member := tar.next()) is not None:
        tar.members = []  # or all of them would be kept
        folder, _, name = member.name.rpartition("/")
        base, dot, end = name.partition(".")
        if member.isreg() and not member.issparse() and base and dot:
            yield f"{folder}/{base}" if folder else base, f".{end.lower()}", (member.offset_data, member.size)


def _sample(path, file, key, members):
    image = next((members[end] for end in SUFFIXES if end in members), (0, -1))
    label, text, kind = -1, (0, -1), NONE
    if ".cls" in members:
        offset, size = members[".cls"]
        found = file.at(offset, min(size, 32)).strip()
        if not found.isdigit() or int(found) >= 2**31:
            raise ValueError(f"{path}: sample {shown(key)} has {shown(found)} in .cls; it must be a number from 0")
        label = int(found)
    if ".txt" in members:
        text, kind = members[".txt"], TEXT
    elif ".json" in members and members[".json"][1] <= LONGEST:
        offset, size = members[".json"]
        try:
            has = caption_of(file.at(offset, size)) is not None
        except ValueError as error:
            raise ValueError(f"{path}: sample {shown(key)}: {error}") from error
        if has:
            text, kind = members[".json"], JSON
    return image, label, text, kind
