"""Caption features beside the images of a source: computed once and kept on disk, or read from a file."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from ar_jax.data.base import Data, Info, NoSplit, Source
from ar_jax.files import cache
from ar_jax.files.places import local, path_of

MOST_CAPTIONS = 1_000_000  # different captions that are encoded here, about 25 GB of minilm features at 16 rows
AT_ONCE = 512
PART = 8 * AT_ONCE  # captions of a file

Rows = Callable[[int], tuple[np.ndarray, np.ndarray]]  # record -> features [rows c], mask [rows]


class Texted:
    """A source whose records also have "text" float32 [rows c] and "text_mask" bool [rows], left-padded."""

    def __init__(self, source: Source, rows: Rows, info: Info):
        self.source, self.rows, self.info = source, rows, info
        self.captions = source.captions
        if hasattr(source, "runs"):
            self.runs = source.runs

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, mask = left_pad(*self.rows(index), self.info.text_rows)
        return self.source[index] | {"text": text, "text_mask": mask}


def with_text(source: Source, data: Data) -> Source:
    """Adds the caption features that `data.text` names.

    A file (.npz or .safetensors) holds `features` [N rows c] and `mask` [N rows], N in the order of the
    source, and may name the encoder: a string `encoder` (.npz) or the metadata `encoder` (.safetensors, which
    is read row by row and may be larger than memory).

    Raises:
      ValueError: no captions, an unknown encoder, or features that do not fit the source.
    """
    if not source.info.captions:
        raise ValueError(
            f"data.text is {data.text!r}, but data.name={data.name} data.path={data.path!r} has "
            "no captions; leave data.text empty, or add a captions.jsonl or captions.csv"
        )
    if data.text == "minilm" or path_of(data.text).expanduser().is_dir():
        encoder, rows, width = _encode(source.captions(), data)
    elif Path(data.text).suffix in (".npz", ".safetensors"):
        encoder, rows, width = _open_features(path_of(data.text).expanduser(), len(source), data.split)
    else:
        raise ValueError(
            f"data.text is {data.text!r}; it must be empty, minilm, a folder of a text encoder, or a .npz or .safetensors file"
        )
    info = dataclasses.replace(source.info, text=encoder, text_rows=data.text_rows, text_width=width)
    return Texted(source, rows, info)


def left_pad(features: np.ndarray, mask: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `rows` real rows of [r c] at the end of float32 [rows c], after zeros; and their mask."""
    real = features[np.asarray(mask, bool)][:rows]
    padded = np.zeros((rows, features.shape[-1]), np.float32)
    padded[rows - len(real) :] = real
    return padded, np.arange(rows) >= rows - len(real)


def _encode(captions: Sequence[str], data: Data) -> tuple[str, Rows, int]:
    """Features of every different caption, encoded once and kept in the cache in files that are read row by row."""
    from ar_jax.text.encoder import open_encoder

    unique = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    if len(unique) > MOST_CAPTIONS:
        raise ValueError(
            f"data.text={data.text} keeps the features of at most {MOST_CAPTIONS} different captions, and there are "
            f"{len(unique)}; compute them into a .safetensors file and give that as data.text"
        )
    texts, encoder, rows = list(unique), open_encoder(data.text), data.text_rows
    parts = [texts[start : start + PART] for start in range(0, len(texts), PART)]
    folder = cache.place("captions")
    paths = [folder / f"{cache.key([encoder.identity, rows, *part])}.safetensors" for part in parts]

    def write(i: int, path: Path) -> None:
        starts = tqdm(range(0, len(parts[i]), AT_ONCE), desc=f"captions {i + 1}/{len(parts)}", disable=None)
        found = [encoder.encode(parts[i][start : start + AT_ONCE], rows) for start in starts]
        features, mask = (np.concatenate([np.asarray(each[k]) for each in found]) for k in (0, 1))
        save_file({"features": features, "mask": mask}, path, {"encoder": encoder.identity})

    cache.make(paths, write)
    where = np.fromiter((unique[caption] for caption in captions), np.int32, len(captions))
    files = [_kept(path, len(part)) for path, part in zip(paths, parts)]

    def row(i: int) -> tuple[np.ndarray, np.ndarray]:
        part, j = divmod(int(where[i]), PART)
        return files[part]["features"][j : j + 1][0], files[part]["mask"][j : j + 1][0]

    return encoder.name, row, _shape(files[0]["features"])[2]


def _kept(path: Path, count: int) -> dict[str, Any]:
    try:
        arrays = _safetensors(path)[1]
        if _shape(arrays["features"])[0] != count:
            raise ValueError(f"it holds {_shape(arrays['features'])[0]} captions, not {count}")
    except Exception as error:
        raise ValueError(f"{path}, features of captions that were kept, is damaged ({error}); delete it") from error
    return arrays


def _open_features(path: Path, count: int, split: str) -> tuple[str, Rows, int]:
    if not path.is_file():
        raise FileNotFoundError(f"data.text is {str(path)!r}, which is not a file")
    try:
        encoder, arrays = _npz(local(path)) if path.suffix == ".npz" else _safetensors(local(path))
        features, mask = arrays["features"], arrays["mask"]
        shape, mask_shape = _shape(features), _shape(mask)
    except Exception as error:  # KeyError, BadZipFile, SafetensorError, pickled arrays ...
        raise ValueError(
            f"data.text={path} must hold `features` [N rows c] and `mask` [N rows], but reading them fails: {error}"
        ) from error
    if len(shape) != 3 or mask_shape != shape[:2] or shape[0] != count:
        raise (NoSplit if split == "test" else ValueError)(  # a file is of one split
            f"data.text={path} has features {list(shape)} and mask {list(mask_shape)}; needed "
            f"are [{count} rows c] and [{count} rows]: a row for each record of the split, in "
            "its order"
        )
    # Slices of one row, since a slice of a safetensors file reads just that.
    return encoder or path.stem, lambda i: (features[i : i + 1][0], mask[i : i + 1][0]), shape[2]


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape if isinstance(array, np.ndarray) else array.get_shape())


def _npz(path: Path) -> tuple[str, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        encoder = str(arrays["encoder"]) if "encoder" in arrays else ""
        return encoder, {key: arrays[key] for key in ("features", "mask")}


def _safetensors(path: Path) -> tuple[str, dict[str, Any]]:
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")
    encoder = (file.metadata() or {}).get("encoder", "")
    return encoder, {key: file.get_slice(key) for key in ("features", "mask")}
