"""What is asked of a data set (`Data`), what it says of itself (`Info`) and how it is read (`Source`)."""

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np

from ar_jax.files.places import path_of
from ar_jax.typing import Within


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images to read and how they are handed to the model."""

    name: str = "mnist5k"
    """mnist5k, idx and emoji need no download; image_folder, webdataset, huggingface, parquet, array_record, tfds and tokens
    read `path`. Or `my_module:function`, a function `(data: Data) -> Source` of your own."""
    path: str = ""
    """Folder of the data set; of tars and Parquet files also a pattern such as /ssd/part-{00000..00099}.tar. For emoji a font
    file and for idx a folder; both may be left out."""
    split: str = "train"
    """train, test or all. mnist5k and emoji hold out every tenth image as the test."""
    size: int = 32
    """Side in pixels of the square images handed to the model."""
    crop: Literal["centre", "random"] = "centre"
    """Of training images: the centre, or a random window of random scale. Both as in ADM."""
    min_fraction: float = 0.8
    """Smallest window of the random crop, as a part of the image's short side."""
    flip: bool = False
    """Mirror half of the training images."""
    upright: bool = True
    """Photos are turned as their EXIF orientation says, as viewers show them; the published pipelines read them as stored."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """An image that cannot be read stops the run, or the next readable one stands in for it."""
    unreadable_limit: Annotated[int, Within(0, 2**24)] = 100
    """With `skip`: stop when more images than this cannot be read."""
    shards: Literal["all", "split"] = "all"
    """Of tars and Parquet files: every host opens all, or they are dealt out and a host opens its own only. Then batches, and
    what a resumed training sees, depend on the number of hosts."""
    mixed: int = 2048
    """Records that are shuffled with one another where only runs of them can be read at once (Parquet)."""
    text: str = ""
    """Caption features: none, `minilm`, a folder of a T5 or CLIP, or a .npz or .safetensors file holding `features`, `mask`."""
    text_rows: int = 16
    """Caption rows handed to the model; shorter captions are padded on the left, longer ones cut."""

    def __post_init__(self):
        if self.split not in ("train", "test", "all"):
            raise ValueError(f"data.split is {self.split!r}; it must be train, test or all")
        if self.size < 1:
            raise ValueError(f"data.size is {self.size}; it must be a positive number of pixels")
        if self.crop not in ("centre", "random"):
            raise ValueError(f"data.crop is {self.crop!r}; it must be centre or random")
        if not 0 < self.min_fraction <= 1:
            raise ValueError(f"data.min_fraction is {self.min_fraction}; it must be above 0 and at most 1")
        if self.unreadable not in ("refuse", "skip"):
            raise ValueError(f"data.unreadable is {self.unreadable!r}; it must be refuse or skip")
        if self.shards not in ("all", "split"):
            raise ValueError(f"data.shards is {self.shards!r}; it must be all or split")
        if self.mixed < 1:
            raise ValueError(f"data.mixed is {self.mixed}; it must be at least 1")
        if self.text_rows < 1:
            raise ValueError(f"data.text_rows is {self.text_rows}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Info:
    """What a data set says of itself; goes to JSON by `dataclasses.asdict` and comes back by `read_info`."""

    classes: int = 0  # 0: no labels
    class_names: tuple[str, ...] = ()  # in label order; may be empty although there are labels
    captions: bool = False
    text: str = ""  # the encoder of the caption features, "" without
    text_rows: int = 0
    text_width: int = 0


def read_info(values: dict[str, Any]) -> Info:
    """`Info` from a dictionary, for example of JSON; other keys are left alone."""
    known = {f.name: values[f.name] for f in dataclasses.fields(Info) if f.name in values}
    return Info(**known | {"class_names": tuple(known.get("class_names", ()))})


@runtime_checkable
class Source(Protocol):
    """Random access to the records of a data set, from many threads at once.

    A record has "image" (PIL image or uint8 [h w 3]) or "tokens" ([a n k] or [a n c], a versions of one
    image), "label" (int) if `info.classes` and "caption" if `info.captions`; all of them may have "micro", float32 [5] (see
    `generators.meissonic.Prompt`). A source with captions also has `captions() -> Sequence[str]`, which returns all of them
    without decoding images. One that cannot read a record alone has `runs`, int [r], the lengths of the runs of records that it
    reads at once.
    """

    info: Info

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Unreadable(ValueError):
    """One record, named, that cannot be read; `data.unreadable` says what is done about it."""

    def __init__(self, name: str, reason: object):
        super().__init__(f"cannot read {name} ({reason}); mend or remove it, or give --data.unreadable skip")
        self.name = name
        self.reason = reason


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Where no other image can stand in for one that cannot be read, none is offered."""
    try:
        yield
    except Unreadable as error:
        raise ValueError(f"cannot read {error.name} ({error.reason}); mend or remove it") from error


MOST_CLASSES = 2**17  # of a data set: each is a row of a table in the model, its average and its optimiser


class NoSplit(ValueError):
    """The data set is there, but it has no such split."""


def held_out(count: int, split: str) -> np.ndarray:
    """Indices of a split of a data set that has none: every tenth record, from the first, is the test."""
    index = np.arange(count)
    return {"test": index[index % 10 == 0], "train": index[index % 10 != 0], "all": index}[split]


def spread(ends: np.ndarray, index: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Which of several parts, one after the other, hold records.

    Args:
      ends: int [parts], the number of records up to the end of each.
      index: int [b].
    Yields:
      A part, the places in `index` that it serves, and what these are called within it.
    """
    which = np.searchsorted(ends, index, side="right")
    for part in np.unique(which):
        places = np.flatnonzero(which == part)
        yield int(part), places, index[places] - (ends[part - 1] if part else 0)


def folder_of(data: Data) -> Path:
    """`data.path` as a folder that exists."""
    if not data.path:
        raise ValueError(f"data.path is empty; data.name={data.name} needs the folder to read")
    folder = path_of(data.path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path is {data.path!r}, which is not a folder{seen_from(folder)}; data.name={data.name} needs one")
    return folder


def seen_from(path: Path) -> str:
    """What a relative path is relative to, for messages."""
    return "" if path.is_absolute() else f" in {os.getcwd()}"


def split_folders(folder: Path, split: str) -> list[Path]:
    """The sub-folders of a split: train/ and val/ (else test/); `folder` itself if it has no such pair.

    val/ comes before test/ because the test images of data sets that have both rarely have labels.
    """
    train = folder / "train"
    held_out = ("val", "validation", "test")
    test = next((folder / name for name in held_out if (folder / name).is_dir()), None)
    if test and train.is_dir():
        return {"train": [train], "test": [test], "all": [train, test]}[split]
    if split == "test":
        raise NoSplit(
            f"data.split is test, but {folder} has no sub-folders train/ and val/ or test/; "
            "make them, or set data.split to all"
        )
    return [folder]


def seen_classes(labels: Iterable[int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes of labels that are numbers from 0 (negative ones are none): those seen, sorted, and their names.

    Labels 3, 7 and 900 are three classes, called so; where all from 0 to the largest are seen, they need no names.
    """
    seen = np.unique(np.fromiter(labels, np.int64))
    seen = seen[seen >= 0]
    return seen, () if len(seen) == seen.max(initial=-1) + 1 else tuple(map(str, seen.tolist()))


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes as classes are numbered: whole numbers by their value, then all others as text."""
    return sorted(names, key=lambda name: (0, *_number(name), name) if _number(name) else (1, name))


def _number(name: str) -> tuple[int, str] | None:
    """What sorts as the number that a name is; `int` would refuse thousands of digits."""
    digits = name.lstrip("0")
    return (len(digits), digits) if name.isascii() and name.isdecimal() else None


def renumbered(labels: np.ndarray, names: Sequence[str], into: Sequence[str]) -> np.ndarray:
    """Labels among classes called `names` as labels among classes called `into`: those of the same name.

    Classes without names (an empty list) are called by their numbers. If one side has no names and the other's are words,
    nothing but the numbers can be compared, and labels stay.

    Args:
      labels: int [n].
    Returns:
      int [n]; -1 for classes that the others do not have.
    """
    labels, words = np.asarray(labels), [name for name in (*names, *into) if not _number(name)]
    if list(names) == list(into) or (words and not (names and into)):
        return labels
    of = [_number(name) or name for name in names]
    place = {_number(name) or name: i for i, name in enumerate(into)}
    found = np.full(labels.shape, -1, labels.dtype)
    for label in np.unique(labels[labels >= 0]).tolist():
        name = (of[label] if label < len(of) else None) if names else _number(str(label))
        found[labels == label] = place.get(name, -1) if into else int("0" + name[1]) if name else -1
    return found


def label_name(info: Info, label: int) -> str:
    """What a class is called."""
    return info.class_names[label] if label < len(info.class_names) else str(label)


def label_ids(info: Info, names: list[str]) -> list[int]:
    """Labels of classes given by name (capitals do not matter) or by number; where all names are numbers, by name only.

    Raises:
      ValueError: no such class; the message names near ones and the range.
    """
    if not info.classes:
        raise ValueError(f"labels {names} asked for, but the data set has no classes; leave them out")
    return [_label_id(info, str(name)) for name in names]


def _label_id(info: Info, name: str) -> int:
    if name in info.class_names:
        return info.class_names.index(name)
    lower = [known.lower() for known in info.class_names]
    if lower.count(name.lower()) == 1:
        return lower.index(name.lower())
    numbers = info.class_names and all(map(_number, info.class_names))
    if name.isdecimal() and not numbers and int(name) < info.classes:
        return int(name)  # where numbers are names, they are nothing else
    near = [info.class_names[lower.index(n)] for n in difflib.get_close_matches(name.lower(), lower, 3, 0.5)]
    near = near or [known for known in info.class_names if name and name.lower() in known.lower()][:3]
    known = f"give a {'name or ' if info.class_names else ''}number from 0 to {info.classes - 1}"
    if numbers:
        known = f"there are {', '.join(info.class_names[:6])}{', ...' * (info.classes > 6)}"
    raise ValueError(f"no class {name!r}; " + (f"near ones: {', '.join(near)}; " if near else "") + known)
