"""Sets of images to judge: .npz files, folders, data sets; read a few at a time, never held as a whole."""

import dataclasses
import functools
import hashlib
import os
import threading
import zipfile
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ar_jax.data import Data, centre_crop, in_order, open_source, plain, read_image, renumbered
from ar_jax.data.base import needed
from ar_jax.data.folder import SUFFIXES, Numbered, Passed, find_images
from ar_jax.data.lists import Paths
from ar_jax.files.places import path_of, seekable, stamp
from ar_jax.machine import distributed
from ar_jax.machine.distributed import cores


class Images(Protocol):
    """Numbered images of one size.

    Attributes:
      where: what it was opened from, in words.
      facts: JSON-able: how the images were made or read.
      size: height and width in pixels.
      labels: int [n], or None.
      names: of the classes; may be empty.
      stamp: changes when what lies at `where` does; 0 if `facts` tell.
    """

    where: str
    facts: dict[str, Any]
    size: tuple[int, int]
    labels: np.ndarray | None
    names: Sequence[str]
    stamp: int | str

    def __len__(self) -> int: ...

    def read(self, rows: range) -> np.ndarray:
        """uint8 [rows h w 3]."""


class Statistics(NamedTuple):
    """Published mean and covariance of features, with images if the file has some.

    Attributes:
      mean, cov: of the pooled features.
      spatial_mean, spatial_cov: of the spatial ones, or None.
      sha256: of the four arrays.
    """

    mean: np.ndarray
    cov: np.ndarray
    spatial_mean: np.ndarray | None
    spatial_cov: np.ndarray | None
    sha256: str


def open_images(path: str, crop: int = 0) -> Images:
    """A .npz with uint8 images in `arr_0` (labels, if any, in `arr_1`), or a folder of image files.

    The sub-folders of a folder, if all images lie in some, are classes.

    Args:
      crop: side to which folder images are centre-cropped as ADM does; 0 takes them as they are.
    Raises:
      ValueError, FileNotFoundError: no images there, or of other types or sizes.
    """
    place = path_of(path).expanduser()
    if place.suffix == ".npz":
        if crop:
            raise ValueError(f"{path}: crop is for folders of images; an .npz is taken as it is")
        return Packed(place)
    if not place.exists():
        raise FileNotFoundError(f"{path} does not exist; give a .npz, a folder of images, or a run folder")
    if not place.is_dir():
        raise ValueError(f"{path} is neither a .npz nor a folder of images")
    return Folder(place, crop)


def labels_in(images: Images, names: Sequence[str], whose: str) -> np.ndarray:
    """The labels of images as numbers of the classes that others, `whose`, call `names`; see `renumbered`.

    Raises:
      ValueError: these have no such class.
    """
    found = renumbered(images.labels, images.names, names)
    if len(new := np.unique(images.labels[(found < 0) & (images.labels >= 0)])):
        called = [images.names[i] if i < len(images.names) else str(i) for i in new.tolist()]
        raise ValueError(
            f"{images.where} has classes such as {', '.join(called[:3])} that {whose} does not have; classes are compared by "
            f"their names, and it has {', '.join(names[:3]) or 'numbers only'}"
        )
    return found


class Packed:
    """The uint8 array `arr_0` of a .npz, compressed or not; it is streamed, going forward is cheap."""

    def __init__(self, path: Path):
        self.where, self.names, self.stamp = str(path), (), stamp(path) if path.exists() else 0
        heads = npz_arrays(path)
        if "arr_0" not in heads:
            raise ValueError(f"{path} holds {sorted(heads)} but no arr_0, where the field's sample files keep images")
        shape, dtype, fortran = heads["arr_0"]
        if len(shape) != 4 or shape[3] not in (1, 3) or not shape[0] or fortran:
            raise ValueError(f"{path}: arr_0 has shape {shape}; images are [n h w 3], in C order")
        if dtype != np.uint8:
            raise ValueError(f"{path}: arr_0 is {dtype}{self._broken(path, dtype)}; images must be uint8 from 0 to 255")
        self._path, self._shape, self.size = path, shape, shape[1:3]
        self.labels = None
        if "arr_1" in heads and heads["arr_1"][0] == shape[:1] and np.issubdtype(heads["arr_1"][1], np.integer):
            with np.load(seekable(path), allow_pickle=False) as file:
                self.labels = file["arr_1"].astype(np.int64)
        self.facts = {"format": "npz"}
        self._lock, self._file = threading.Lock(), None

    @staticmethod
    def _broken(path, dtype):
        if not np.issubdtype(dtype, np.floating):
            return ""
        with np.load(seekable(path), allow_pickle=False) as file:
            return "" if np.isfinite(file["arr_0"]).all() else " and holds NaN or infinity"

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, rows: range) -> np.ndarray:
        height, width, channels = self._shape[1:]
        size = height * width * channels
        with self._lock:
            if self._file is None:
                self._file = zipfile.ZipFile(seekable(self._path)).open("arr_0.npy")  # noqa: SIM115
                _head(self._file)
                self._first = self._file.tell()
            self._file.seek(self._first + rows.start * size)
            data = self._file.read(len(rows) * size)
        if len(data) != len(rows) * size:
            raise ValueError(f"{self.where} is cut short: images {rows.start} to {rows.stop - 1} are not all there")
        images = np.frombuffer(data, np.uint8).reshape(len(rows), height, width, channels)
        return np.broadcast_to(images, (*images.shape[:3], 3))


def npz_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype, bool]]:
    """Shape, type and whether in Fortran order, of every array of a .npz, without reading any."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(seekable(path)) as archive:
            found = {}
            for name in archive.namelist():
                with archive.open(name) as file:
                    shape, fortran, dtype = _head(file)
                found[name.removesuffix(".npy")] = shape, dtype, fortran
            return found
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no readable .npz file ({error}); make it again") from error


def _head(file):
    major, _ = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0)(file)


class Folder:
    """Image files as training finds them (see `find_images`); sub-folders are classes if all images lie in some."""

    def __init__(self, path: Path, crop: int):
        self.where, self._crop, self.stamp = str(path), crop, stamp(path)
        passed, self._files, numbers = Passed(), Paths(), Numbered()
        for file, name in find_images(path, passed):
            self._files.append(file)
            numbers.append(name)
        if not self._files:
            raise ValueError(
                f"{path} holds no images ({', '.join(SUFFIXES)})" + (f"; passed over: {passed}" if passed else "")
            )
        passed.say(path)
        self.names, self.labels = (), None
        if "" not in numbers.values:
            self.names = tuple(in_order(numbers.values))
            self.labels = numbers.labels({name: i for i, name in enumerate(self.names)}).astype(np.int64)
        elif len(numbers.values) > 1:
            distributed.say(f"{path}: some images lie in sub-folders and some beside them, so these are no classes")
        kinds = sorted({os.path.splitext(file)[1].lower().lstrip(".") for file in self._files})
        self.facts = {"format": ", ".join(kinds), "crop": crop}
        with needed():
            self.size = (crop, crop) if crop else read_image(self._files[0]).size[::-1]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: range) -> np.ndarray:
        with futures.ThreadPoolExecutor(cores()) as pool:
            return np.stack(list(pool.map(self._one, rows)))

    def _one(self, row):
        with needed():
            image = read_image(self._files[row])
        if self._crop:
            return centre_crop(image, self._crop)
        image = np.asarray(image)
        if image.shape[:2] != self.size:
            raise ValueError(
                f"{self._files[row]} has {image.shape[1]}x{image.shape[0]} pixels, but {os.path.basename(self._files[0])} has "
                f"{self.size[1]}x{self.size[0]}; all images must have one size (a reference can be cropped: --crop)"
            )
        return image


class DataImages:
    """The images of a data set (see `ar_jax.data`), centre-cropped to its size; `count` of them, spread evenly."""

    stamp = 0

    def __init__(self, data: Data, count: int = 0):
        self._source = open_source(dataclasses.replace(plain(data), shards="all"))
        self._size, self._count = data.size, min(count or len(self._source), len(self._source))
        self.classes = self._source.info.classes
        self.where, self.size = f"{data.name} {data.path}({data.split})", (data.size, data.size)
        self.facts = {
            "format": "data",
            "name": data.name,
            "split": data.split,
            "crop": data.size,
            "upright": data.upright,
        }
        self.names = self._source.info.class_names

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        if not self._source.info.classes:
            return None
        with futures.ThreadPoolExecutor(cores()) as pool:
            return np.array(list(pool.map(lambda i: self._record(i)["label"], range(len(self)))))

    def _record(self, row):
        with needed():
            return self._source[row * len(self._source) // self._count]  # spread evenly

    def __len__(self) -> int:
        return self._count

    def read(self, rows: range) -> np.ndarray:
        with futures.ThreadPoolExecutor(cores()) as pool:
            return np.stack(list(pool.map(lambda i: centre_crop(self._record(i)["image"], self._size), rows)))


def open_reference(path: str, crop: int = 0) -> tuple[Images | None, Statistics | None]:
    """What samples are compared with: images, statistics, or (as in ADM's files) both.

    Statistics are `mu` and `sigma`, with ADM's `mu_s` and `sigma_s` for the spatial features.

    Raises:
      ValueError, FileNotFoundError: neither is there.
    """
    place, statistics = path_of(path).expanduser(), None
    if place.suffix != ".npz":
        return open_images(path, crop), None
    names = npz_arrays(place)
    if "mu" in names and "sigma" in names:
        statistics = _statistics(place, names)
        return (Packed(place) if "arr_0" in names else None), statistics
    if "arr_0" not in names:
        raise ValueError(
            f"{path} holds {sorted(names)}; a reference has images (arr_0) or statistics (mu and sigma, as pytorch-fid, "
            "clean-fid and ADM write them)"
        )
    return Packed(place), None


def _statistics(place, names):
    with np.load(seekable(place), allow_pickle=False) as file:
        wanted = [name if name in names else None for name in ("mu", "sigma", "mu_s", "sigma_s")]
        arrays = [None if name is None else np.asarray(file[name], np.float64) for name in wanted]
    digest = hashlib.sha256()
    for mean, cov in (arrays[:2], arrays[2:]):
        if mean is None or cov is None:
            continue
        if mean.ndim != 1 or cov.shape != (*mean.shape, *mean.shape):
            raise ValueError(f"{place}: mu has shape {mean.shape} and sigma {cov.shape}; they must be [d] and [d d]")
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError(f"{place}: mu or sigma holds NaN or infinity")
        digest.update(mean.tobytes() + cov.tobytes())
    return Statistics(*arrays, digest.hexdigest())
