"""A folder of image files: a class per sub-folder, or captions in a file, or neither."""

import csv
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.data.base import Data, Info, folder_of, split_folders
from ar_jax.data.images import read_image
from ar_jax.data.lists import Paths, Strings
from ar_jax.files.places import local, walk

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
CAPTION_FILES = ("captions.jsonl", "captions.csv")


class ImageFiles:
    """Image files with their labels, int [files], and captions; both as long as `files`, or empty."""

    def __init__(self, files: Sequence[str], labels: np.ndarray, captions: Sequence[str], info: Info):
        self.files, self.labels, self._captions, self.info = files, labels, captions, info

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_image(self.files[index])} | self.about(index)

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
    ..., "label": number or name, if any}; "file_name" and "text" will do) or captions.csv (with a header) are
    captioned, and files that are not listed are left out. Otherwise each first-level sub-folder that holds
    images, at any depth, is a class, and a folder without sub-folders is unlabelled. Names that start with
    "." are ignored.
    """
    root = folder_of(data)
    folders, every = split_folders(root, data.split), split_folders(root, "all")
    listed = [root] if _caption_file(root) else [folder for folder in every if _caption_file(folder)]
    if not listed:
        return _from_folders(root, folders, every)
    return _from_captions(root, listed, folders, data.split)


def _from_folders(root: Path, folders: list[Path], every: list[Path]) -> ImageFiles:
    files, numbers = Paths(), Numbered()
    first: dict[str, str] = {}
    for folder in folders:
        for file, name in _find_images(folder):
            files.append(file)
            numbers.append(name)
            first.setdefault(name, file)
    if not files:
        raise ValueError(
            f"data.path={root}: no images in {', '.join(map(str, folders))} "
            f"(looked for {' '.join(SUFFIXES)} at any depth)"
        )
    for folder in every:  # classes are numbered over both splits, but the other one need not be walked for that
        if folder not in folders:
            first = _first_images(folder) | first
    stray, names = first.pop("", None), sorted(first)
    if names and stray:
        raise ValueError(
            f"data.path={root}: images such as {stray} lie beside class folders such as {names[0]}; move them into a "
            "class or elsewhere"
        )
    info = Info(classes=len(names), class_names=tuple(names))
    return ImageFiles(files, numbers.labels({name: i for i, name in enumerate(names)}), [], info)


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


def _find_images(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, first-level sub-folder it is in or "") of every image, in the order of names; links are followed."""
    for base, _, images in _walk(folder):
        within = os.path.relpath(base, folder).split(os.sep)[0].removeprefix(".")
        for name in images:
            yield os.path.join(base, name), within


def _first_images(folder: Path) -> dict[str, str]:
    """The first image of every first-level sub-folder that holds one at any depth, and of `folder` itself as ""."""
    _, folders, images = next(_walk(folder))
    found = {"": os.path.join(folder, images[0])} if images else {}
    for name in folders:
        for file, _ in _find_images(folder / name):
            found[name] = file
            break
    return found


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """A folder and those below it, each with the names of its folders and of its images, sorted."""
    walked = os.walk(folder, followlinks=True, onerror=_refuse) if isinstance(folder, Path) else walk(folder)
    for base, folders, names in walked:
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in folders:
            _check_link(os.path.join(base, name), folder)
        images = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        yield base, folders, sorted(images)


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


def _from_captions(root: Path, listed: list[Path], folders: list[Path], split: str) -> ImageFiles:
    """The images in `folders` that the caption files of `listed` name; labels are numbered over all that these name."""
    files, captions, numbers = Paths(), Strings(), Numbered()
    below = tuple(f"{folder}{os.sep}" for folder in folders)
    for folder in listed:
        for file, caption, label in _read_captions(folder):
            numbers.number(label)
            if file.startswith(below):
                files.append(file)
                captions.append(caption)
                numbers.append(label)
    if not files:
        raise ValueError(f"data.path={root}: the caption files list no image of the split {split}")
    labels = numbers.values
    if all(label is None for label in labels):
        names, classes, number = [], 0, {}
    elif all(isinstance(label, int) and label >= 0 for label in labels):
        names, classes, number = [], max(labels) + 1, {label: label for label in labels}
    elif all(isinstance(label, str) for label in labels):
        names = sorted(labels)
        classes, number = len(names), {name: i for i, name in enumerate(names)}
    else:
        some = ", ".join(list(dict.fromkeys(map(repr, labels)))[:6])
        raise ValueError(
            "labels in a caption file must be given for every image or for none, either all as "
            f"numbers from 0 or all as names; found {some}"
        )
    info = Info(classes=classes, class_names=tuple(names), captions=True)
    return ImageFiles(files, numbers.labels(number), captions, info)


def _caption_file(folder: Path) -> Path | None:
    return next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)


def _read_captions(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """(path, caption, label) of each line of the caption file of a folder."""
    path = _caption_file(folder)
    for i, row in _numbered_lines(path):
        file, caption = row.get("file", row.get("file_name")), row.get("caption", row.get("text"))
        if not isinstance(file, str) or not isinstance(caption, str):
            raise ValueError(f'{path} line {i}: needs a "file" and a "caption", has {sorted(map(str, row))}')
        inside = os.path.normpath(file)
        if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
            raise ValueError(f"{path} line {i}: {file!r} leaves the folder; list files below {folder} only")
        label = row.get("label")
        if path.suffix == ".csv" and label is not None:  # a csv has strings only
            label = int(label) if label.isdecimal() else label or None
        yield os.path.join(folder, inside), caption, label


def _numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(local(path), encoding="utf-8-sig", newline="") as lines:
        if path.suffix == ".csv":
            reader = csv.DictReader(lines)
            yield from ((reader.line_num, row) for row in reader)
        else:
            yield from ((i, _json_line(path, i, line)) for i, line in enumerate(lines, 1) if line.strip())


def _json_line(path: Path, i: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} line {i} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{path} line {i}: must be like {{"file": "a.jpg", "caption": "a cat"}}')
    return row
