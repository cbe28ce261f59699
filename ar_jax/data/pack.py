"""Packs a folder of images into ArrayRecord shards, which are quicker to copy and to read at random.

`python -m ar_jax.data.pack FOLDER OUT`, then train with `--data.name array_record --data.path OUT`.
"""

import dataclasses
import hashlib
import inspect
import io
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image

from ar_jax.data.base import Data, Unreadable, split_folders
from ar_jax.data.folder import ImageFiles, image_folder
from ar_jax.data.images import centre_crop, read_image
from ar_jax.data.packed import open_records
from ar_jax.data.records import write_shards
from ar_jax.files.places import content, on_disk, path_of, reachable
from ar_jax.machine.distributed import cores


def pack(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    shards: int = 16,
    size: int = 0,
    upright: bool = True,
    unreadable: Literal["refuse", "skip"] = "refuse",
) -> None:
    """Packs a folder of images, with their classes or captions, into ArrayRecord shards.

    Every image is decoded once, so damaged files are found now and not in the middle of training. If it is
    interrupted, run the same command again: finished shards are kept. An unfinished OUT is never read.

    Examples:
      python -m ar_jax.data.pack ~/flowers ~/flowers-packed
      python -m ar_jax.data.pack ~/imagenet /ssd/imagenet-288 --size 288 --shards 128
      python train.py CONFIG --data.name array_record --data.path ~/flowers-packed

    Args:
      folder: Images as data.name=image_folder reads them: a sub-folder per class, or captions.jsonl, or a
        flat folder. If it has train/ and val/ (or test/), OUT gets train/ and test/.
      out: Folder to write, new or left by an interrupted run.
      shards: Number of files of each split. A few hundred megabytes each is comfortable.
      size: 0 keeps the files as they are. Otherwise images are centre-cropped to this many pixels and stored
        as PNG; choose it larger than the size you train at if you want random crops.
      upright: With --size, turn photos as their EXIF orientation says. Files that are kept as they are keep it, and
        `--data.upright` of training decides.
      unreadable: Stop at the first file that cannot be decoded, or leave such files out and list them.
    """
    if size < 0:
        raise ValueError(f"size is {size}; it must be 0 or a number of pixels")
    folder, out = path_of(folder).expanduser(), on_disk(out, "OUT").expanduser()
    pair = folder.is_dir() and len(split_folders(folder, "all")) == 2
    for split in ("train", "test") if pair else ("all",):
        source = image_folder(Data(name="image_folder", path=str(folder), split=split, upright=upright))
        to = out / split if pair else out
        print(f"packing {len(source)} images of {folder} ({split}, {source.info.classes} classes) into {to}")
        records = Encoded(source, size, unreadable)
        write_shards(to, records, _describe(source, folder, size), shards)
        print(f"{to} is complete: {len(open_records(to))} images")
        if records.left_out:
            names = sorted(records.left_out)
            print(f"left out {len(names)} that cannot be read:", *names, sep="\n  ")


class Encoded:
    """The records of a slice of the images, encoded as stored; a few threads look after decoding."""

    def __init__(self, source: ImageFiles, size: int, unreadable: str):
        self.source, self.size, self.unreadable = source, size, unreadable
        self.left_out: list[str] = []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> Iterator[dict[str, Any]]:
        todo = iter(range(*rows.indices(len(self))))
        with futures.ThreadPoolExecutor(cores()) as pool:
            while some := list(itertools.islice(todo, 256)):  # bounds what waits in memory
                yield from (record for record in pool.map(self._record, some) if record)

    def _record(self, index: int) -> dict[str, Any] | None:
        try:
            return {"image": self._encode(self.source.files[index])} | self.source.about(index)
        except Unreadable as error:
            if self.unreadable == "refuse":
                raise ValueError(
                    f"cannot read {error.name} ({error.reason}); mend or remove it, or give --unreadable skip"
                ) from error
            self.left_out.append(f"{error.name} ({error.reason})")
            return None

    def _encode(self, file: str) -> bytes:
        image = read_image(file, upright=self.source.upright)
        if not self.size:
            return content(path_of(file))
        encoded = io.BytesIO()
        Image.fromarray(centre_crop(image, self.size)).save(encoded, "PNG")
        return encoded.getvalue()


def _describe(source: ImageFiles, folder: Path, size: int) -> dict[str, Any]:
    """info.json. The hash of all names, labels and captions keeps shards of a changed folder apart."""
    digest = hashlib.sha256(b"[")
    for i, file in enumerate(source.files):  # as the text of one list, which need not fit in memory
        text = ", " * (i > 0) + repr((os.path.relpath(file, folder), source.about(i)))
        digest.update(text.encode("utf-8", "surrogateescape"))
    digest.update(b"]")
    turned = {"upright": source.upright} if size else {}
    return dataclasses.asdict(source.info) | {"size": size, "files": digest.hexdigest(), **turned}


if __name__ == "__main__":
    try:
        reachable(sys.argv)
        tyro.cli(pack, prog="python -m ar_jax.data.pack", description=inspect.cleandoc(pack.__doc__.split("Args:")[0]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
