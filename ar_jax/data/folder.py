"""A folder of image files: a class per sub-folder, or captions in a file, or neither."""

import collections
import contextlib
import csv
import itertools
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.data.base import Data, Info, folder_of, in_order, seen_classes, split_folders
from ar_jax.data.columns import CAPTIONS, text_of
from ar_jax.data.images import read_image
from ar_jax.data.lists import Paths, Strings
from ar_jax.files import words
from ar_jax.files.places import local, path_of, walk
from ar_jax.machine import distributed

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
CAPTION_FILES = (
    "captions.jsonl",
    "captions.csv",
    "metadata.jsonl",
    "metadata.csv",
)  # the latter as Hugging Face has them
SIDECARS = (".txt", ".caption")  # beside an image of the same name
LONGEST = 2**20  # bytes of a caption's file
UNREAD = "unread caption file"
# Folders that systems leave beside images, in small letters; names that begin with a dot are passed over too.
SYSTEM = {
    "@eadir", "@tmp", "#recycle", "@recycle", "@__thumb", "__macosx", "$recycle.bin", "system volume information",
    "lost+found", "__pycache__",
}  # fmt: skip


class ImageFiles:
    """Image files with their labels, int [files], and captions; both as long as `files`, or empty.

    `upright` is that of `read_image`.
    """

    def __init__(self, files: Sequence[str], labels: np.ndarray, captions: Sequence[str], info: Info, upright: bool):
        self.upright = upright
        self.files, self.labels, self._captions, self.info = files, labels, captions, info

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_image(self.files[index], upright=self.upright)} | self.about(index)

    def about(self, index: int) -> dict[str, Any]:
        """The record without its image."""
        return ({"label": int(self.labels[index])} if len(self.labels) else {}) | (
            {"caption": self._captions[index]} if self._captions else {}
        )

    def captions(self) -> Sequence[str]:
        return self._captions


def image_folder(data: Data) -> ImageFiles:
    """Images below `data.path`, in the order of their names (or of the caption file).

    With sub-folders train/ and val/ (else test/), `data.split` chooses; labels are numbered over both, so
    that a class means the same in each. Images listed in captions.jsonl (a line is {"file": ..., "caption":
    ..., "label": number or name, if any}; "file_name" and "text" will do) or captions.csv (with a header), or in
    metadata.jsonl or .csv as Hugging Face has them, are captioned, and files that are not listed are left out. Otherwise each
    first-level sub-folder that holds images, at any depth, is a class (see `in_order`), and a folder without sub-folders is
    unlabelled; if all images have a file of text beside them (a.jpg, a.txt), these are captions. What is hidden, a system's
    or no image is passed over, and said (see `find_images`).
    """
    root = folder_of(data)
    folders, every = split_folders(root, data.split), split_folders(root, "all")
    listed = [root] if _caption_file(root) else [folder for folder in every if _caption_file(folder)]
    if not listed:
        return _from_folders(root, folders, every, data.upright)
    return _from_captions(root, listed, folders, data)


def _from_folders(root: Path, folders: list[Path], every: list[Path], upright: bool) -> ImageFiles:
    files, numbers, passed = Paths(), Numbered(), Passed()
    first: dict[str, str] = {}
    for folder in folders:
        for file, name in find_images(folder, passed):
            files.append(file)
            numbers.append(name)
            first.setdefault(name, file)
    if not files:
        raise ValueError(
            f"data.path={root}: no images in {', '.join(map(str, folders))} "
            f"(looked for {' '.join(SUFFIXES)} at any depth)" + (f"; passed over: {passed}" if passed else "")
        )
    passed.say(root)
    for folder in every:  # classes are numbered over both splits, but the other one need not be walked for that
        if folder not in folders:
            first = _first_images(folder) | first
    stray, names = first.pop("", None), in_order(first)
    if names and stray:
        raise ValueError(
            f"data.path={root}: images such as {stray} lie beside class folders such as {names[0]}; move them into a "
            "class or elsewhere"
        )
    beside = next((suffix for suffix in SIDECARS if passed.beside[suffix] == len(files)), "")
    for suffix, count in passed.beside.items():
        if 0 < count < len(files):
            distributed.say(
                f"{root}: {count} of {len(files)} images have a {suffix} beside them; captions are read if all have one"
            )
    info = Info(classes=len(names), class_names=tuple(names), captions=bool(beside))
    labels = numbers.labels({name: i for i, name in enumerate(names)})
    return ImageFiles(files, labels, Beside(files, beside) if beside else [], info, upright)


class Beside(Sequence[str]):
    """Captions in a file beside every image, read when they are asked for."""

    def __init__(self, files: Sequence[str], suffix: str):
        self.files, self.suffix = files, suffix

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        path = os.path.splitext(self.files[index])[0] + self.suffix
        with _text(path) as place, open(place, encoding="utf-8-sig") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ValueError(f"{path} has more than {LONGEST} letters; a caption was expected")
        return text.strip()


class Numbered:
    """A long list of few different values, kept as numbers."""

    def __init__(self):
        self.values: list[Any] = []
        self._number: dict[tuple[type, str], int] = {}
        self._numbers = array("i")

    def number(self, value: Any) -> int:
        """Of a value, which is noted if it is new."""
        key = type(value), str(value)  # 1, "1" and true are three values; a list, which is none, has no hash
        if key not in self._number:
            self._number[key] = len(self.values)
            self.values.append(value)
        return self._number[key]

    def append(self, value: Any) -> None:
        self._numbers.append(self.number(value))

    def labels(self, number: dict[Any, int]) -> np.ndarray:
        """The list as labels, int32 [n]; empty if there are none."""
        of_value = np.array([number.get(value, -1) for value in self.values], np.int32)
        return of_value[np.array(self._numbers)] if number else np.zeros(0, np.int32)


class Passed:
    """What was passed over while images were looked for: how many of a kind, and the first names."""

    def __init__(self):
        self._names: dict[str, list[str]] = {}  # by kind
        self._counts: collections.Counter[str] = collections.Counter()
        self.beside = dict.fromkeys(SIDECARS, 0)  # images with such a file

    def note(self, images: list[str], others: list[str], folders: list[str]) -> None:
        """What a folder holds beside its images, and those of its folders that are not looked into."""
        texts = {name for name in others if name.endswith(SIDECARS)}
        if texts:
            beside = [os.path.splitext(name)[0] for name in images]
            for suffix in SIDECARS:
                self.beside[suffix] += sum(stem + suffix in texts for stem in beside)
            texts.intersection_update(stem + suffix for stem in beside for suffix in SIDECARS)
        for name in others:
            if name.lower().endswith(SUFFIXES):
                self._add("hidden file", name)
            elif os.path.splitext(name)[0] in ("captions", "metadata"):
                self._add(UNREAD, name)
            elif name not in texts:
                self._add("other file", name)
        for name in folders:
            self._add("hidden or system folder", name)

    def _add(self, kind, name):
        self._counts[kind] += 1
        if len(some := self._names.setdefault(kind, [])) < 3 and name not in some:
            some.append(name)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        return "; ".join(
            f"{count} {kind}{'s' * (count > 1)} "
            f"({', '.join(map(words.name, self._names[kind]))}{', ...' if count > len(self._names[kind]) else ''})"
            for kind, count in self._counts.items()
        )

    def say(self, root: Path) -> None:
        if not self:
            return
        if UNREAD in self._counts:
            read = f"; read are {', '.join(CAPTION_FILES)} with captions or labels, in {root} or in the folders of its splits"
        else:
            read = ""
        distributed.say(f"{root}: passed over {self}{read}")


def find_images(folder: Path, passed: Passed) -> Iterator[tuple[str, str]]:
    """(file, first-level sub-folder it is in or "") of every image, in the order of names.

    All that look for images look here. Links to folders are followed; hidden names and those of `SYSTEM` are passed over.

    Raises:
      ValueError: a folder that cannot be read, or a link to one that it lies in.
    """
    for base, _, images in _walk(folder, passed):
        within = os.path.relpath(base, folder).split(os.sep)[0].removeprefix(".")
        for name in images:
            yield os.path.join(base, name), within


def _first_images(folder: Path) -> dict[str, str]:
    """The first image of every first-level sub-folder that holds one at any depth, and of `folder` itself as ""."""
    _, folders, images = next(_walk(folder, Passed()))
    found = {"": os.path.join(folder, images[0])} if images else {}
    for name in folders:
        for file, _ in find_images(folder / name, Passed()):
            found[name] = file
            break
    return found


def hidden(name: str) -> bool:
    """Whether a file or folder is no part of a data set: hidden, or a system's own."""
    return name.startswith(".") or name.lower() in SYSTEM


def _walk(folder: Path, passed: Passed) -> Iterator[tuple[str, list[str], list[str]]]:
    """A folder and those below it, each with the names of its folders and of its images, sorted."""
    walked = os.walk(folder, followlinks=True, onerror=_refuse) if isinstance(folder, Path) else walk(folder)
    for base, folders, names in walked:
        images = sorted(name for name in names if name.lower().endswith(SUFFIXES) and not hidden(name))
        passed.note(images, sorted({*names}.difference(images)), sorted(filter(hidden, folders)))
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in folders:
            _check_link(os.path.join(base, name), folder)
        yield base, folders, images


def _refuse(error: OSError):
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error


def _check_link(path: str, root: Path):
    """Refuses a link to a folder that it lies in, on whatever way it was reached: its images would be counted for ever."""
    if not os.path.islink(path):
        return
    target, way = os.path.realpath(path), Path(path).parent
    for above in (way, *way.parents):
        if Path(os.path.realpath(above)).is_relative_to(target):
            raise ValueError(
                f"the link {path} leads back to {target}, which holds it, so its images would be found again and again; "
                "remove the link"
            )
        if above == root:
            break


def _from_captions(root: Path, listed: list[Path], folders: list[Path], data: Data) -> ImageFiles:
    """The images in `folders` that the caption files of `listed` name; labels are numbered over all that these name."""
    files, captions, numbers = Paths(), Strings(), Numbered()
    below = tuple(f"{folder}{os.sep}" for folder in folders)
    for folder in listed:
        read = _caption_file(folder).name
        if rest := [name for name in CAPTION_FILES if name != read and (folder / name).is_file()]:
            distributed.say(f"{folder}: captions are those of {read}; passed over {', '.join(rest)}")
        for file, caption, label in _read_captions(folder):
            numbers.number(label)
            if file.startswith(below):
                files.append(file)
                if caption is not None:
                    captions.append(caption)
                numbers.append(label)
    if not files:
        raise ValueError(f"data.path={root}: the caption files list no image of the split {data.split}")
    labels = numbers.values
    if all(label is None for label in labels):
        names, classes, number = [], 0, {}
    elif all(isinstance(label, int) and 0 <= label < 2**63 for label in labels):
        seen, names = seen_classes(labels)
        classes, number = len(seen), {label: i for i, label in enumerate(seen.tolist())}
    elif all(isinstance(label, str) for label in labels):
        names = in_order(labels)
        classes, number = len(names), {name: i for i, name in enumerate(names)}
    else:
        some = ", ".join(list(dict.fromkeys(map(repr, labels)))[:6])
        raise ValueError(
            "labels in a caption file must be given for every image or for none, either all as "
            f"numbers from 0 or all as names; found {some}"
        )
    info = Info(classes=classes, class_names=tuple(names), captions=bool(len(captions)))
    return ImageFiles(files, numbers.labels(number), captions, info, data.upright)


def _caption_file(folder: Path) -> Path | None:
    """Hugging Face's metadata may say other things of images than captions and labels; then it is none."""
    for name in CAPTION_FILES:
        path = folder / name
        if path.is_file() and (path.stem != "metadata" or _columns(path) & {*CAPTIONS, "label"}):
            return path
    return None


def _columns(path: Path) -> set[str]:
    return {str(name) for _, row in itertools.islice(_numbered_lines(path), 1) for name in row}


def _read_captions(folder: Path) -> Iterator[tuple[str, str | None, Any]]:
    """(path, caption, label) of each line of the caption file of a folder; captions are None if no line has one."""
    path = _caption_file(folder)
    found: set[bool] = set()
    for i, row in _numbered_lines(path):
        file, caption = row.get("file", row.get("file_name")), next((row[n] for n in CAPTIONS if row.get(n)), None)
        if caption is None:
            caption = next((row[name] for name in CAPTIONS if name in row), None)  # an empty one
        if isinstance(caption, list) and all(isinstance(text, str) for text in caption):
            caption = text_of(caption)
        found.add(isinstance(caption, str))
        alone = path.stem == "metadata" and caption is None and row.get("label") is not None
        if not isinstance(file, str) or not (isinstance(caption, str) or alone) or len(found) > 1:
            raise ValueError(
                f'{path} line {i}: needs a "file" (or "file_name") and a "caption" (or {", ".join(CAPTIONS[1:])}), has '
                f"{sorted(map(str, row))}"
            )
        inside = os.path.normpath(file)
        if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
            raise ValueError(f"{path} line {i}: {file!r} leaves the folder; list files below {folder} only")
        label = row.get("label")
        if path.suffix == ".csv" and label is not None:  # a csv has strings only
            label = int(label) if label.isdecimal() else label or None
        yield os.path.join(folder, inside), caption, label


def _numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a .jsonl or a .csv file, with the number of the line where each ends.

    Raises:
      ValueError: not UTF-8, no JSON, no CSV; the message has the line.
    """
    with _text(path) as place, open(place, encoding="utf-8-sig", newline="") as lines:
        if path.suffix == ".csv":
            reader = csv.DictReader(lines)
            first = 1  # line of a row, which may have several
            try:
                for row in reader:
                    yield reader.line_num, row
                    first = reader.line_num + 1
            except csv.Error as error:
                raise ValueError(
                    f"{path} line {max(first, 2)} cannot be read as CSV: {error}; is a quotation mark left open?"
                ) from error
        else:
            yield from ((i, _json_line(path, i, line)) for i, line in enumerate(lines, 1) if line.strip())


@contextlib.contextmanager
def _text(path: str | os.PathLike) -> Iterator[Path]:
    """A file of text on a disk, to be read inside; one that is not UTF-8 is named, with the line and what it looks like."""
    place = local(path_of(path))
    try:
        with open(place, "rb") as file:
            if b"\0" in file.read(64):
                raise ValueError(f"{path} line 1 is not UTF-8 but looks like UTF-16; save the file as UTF-8")
        yield place
    except UnicodeDecodeError as error:
        with open(place, "rb") as file:
            for i, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as wrong:
                    looks = "UTF-16" if i == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else "Windows-1252 or Latin-1"
                    raise ValueError(
                        f"{path} line {i} is not UTF-8 (byte {wrong.start + 1} of it is {line[wrong.start]:#04x}; it looks "
                        f"like {looks}); save the file as UTF-8"
                    ) from error
        raise


def _json_line(path: Path, i: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} line {i} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{path} line {i}: must be like {{"file": "a.jpg", "caption": "a cat"}}')
    return row
