"""Packs a folder of images into ArrayRecord shards, which are quicker to copy and to read at random.

`python -m ar_jax.data.pack FOLDER OUT`, then train with `--data.name array_record --data.path OUT`.
"""

from collections.abc import Iterator
from concurrent import futures
import dataclasses
import hashlib
import io
import itertools
from pathlib import Path
import sys
from typing import Annotated, Any, Literal

from PIL import Image
import tyro

from ar_jax.data.base import Data, Unreadable, split_folders
from ar_jax.data.folder import ImageFiles, image_folder
from ar_jax.data.images import centre_crop, read_image
from ar_jax.data.records import write_shards


def pack(folder: Annotated[Path, tyro.conf.Positional], out: Annotated[Path, tyro.conf.Positional], *,
         shards: int = 16, size: int = 0, unreadable: Literal["refuse", "skip"] = "refuse") -> None:
    """Packs a folder of images, with their classes or captions, into ArrayRecord shards.

    Every image is decoded once, so damaged files are found now and not in the middle of training. If it is
    interrupted, run the same command again: finished shards are kept. An unfinished OUT is never read.

    Examples:
      python -m ar_jax.data.pack ~/flowers ~/flowers-packed
      python -m ar_jax.data.pack ~/imagenet /ssd/imagenet-288 --size 288 --shards 128

    then: python train.py CONFIG --data.name array_record --data.path ~/flowers-packed

    Args:
      folder: Images as data.name=image_folder reads them: a sub-folder per class, or captions.jsonl, or a flat
        folder. If it has train/ and val/ (or test/), OUT gets train/ and test/.
      out: Folder to write, new or left by an interrupted run.
      shards: Number of files of each split. A few hundred megabytes each is comfortable.
      size: 0 keeps the files as they are. Otherwise images are centre-cropped to this many pixels and stored as
        PNG; choose it larger than the size you train at if you want random crops.
      unreadable: Stop at the first file that cannot be decoded, or leave such files out and list them.
    """
    if size < 0:
        raise ValueError(f"size is {size}; it must be 0 or a number of pixels")
    both = len(split_folders(folder, "all")) > 1 if folder.is_dir() else False
    for split, to in {"train": out / "train", "test": out / "test"}.items() if both else [("all", out)]:
        source = image_folder(Data(name="image_folder", path=str(folder), split=split))
        records = Encoded(source, size, unreadable)
        print(f"packing {len(source)} images{f' of {source.info.classes} classes' if source.info.classes else ''} "
              f"from {folder} ({split}) into {to}")
        write_shards(to, records, dataclasses.asdict(source.info) | {"size": size, "files": fingerprint(source, folder)},
                     shards)
        if records.left_out:
            print(f"left out {len(records.left_out)} that cannot be read:", *sorted(records.left_out), sep="\n  ")


class Encoded:
    """The records of a slice of the images, encoded as stored; a few threads look after decoding."""

    def __init__(self, source: ImageFiles, size: int, unreadable: str):
        self.source, self.size, self.unreadable = source, size, unreadable
        self.left_out: list[str] = []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> Iterator[dict[str, Any]]:
        todo = iter(range(*rows.indices(len(self))))
        with futures.ThreadPoolExecutor() as pool:
            while some := list(itertools.islice(todo, 256)):  # bounds what waits in memory
                yield from (record for record in pool.map(self._record, some) if record)

    def _record(self, index: int) -> dict[str, Any] | None:
        try:
            return {"image": self._encode(self.source.files[index])} | self.source.about(index)
        except Unreadable as error:
            if self.unreadable == "refuse":
                raise
            self.left_out.append(f"{error.name} ({error.reason})")
            return None

    def _encode(self, file: str) -> bytes:
        image = read_image(file)
        if not self.size:
            return Path(file).read_bytes()
        content = io.BytesIO()
        Image.fromarray(centre_crop(image, self.size)).save(content, "PNG")
        return content.getvalue()


def fingerprint(source: ImageFiles, folder: Path) -> str:
    """Of names, labels and captions in order: shards of a folder that changed since are not mixed."""
    names = [(str(Path(file).relative_to(folder.expanduser())), source.about(i)) for i, file in enumerate(source.files)]
    return hashlib.sha256(repr(names).encode("utf-8", "surrogateescape")).hexdigest()


if __name__ == "__main__":
    try:
        tyro.cli(pack, description=pack.__doc__.split("\n\n    Args:")[0])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
