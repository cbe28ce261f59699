"""Caption features beside the images of a source: computed once and kept on disk, or read from a file."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from ar_jax.data.base import Data, Info, NoSplit, Source
from ar_jax.files import cache
from ar_jax.files.places import local, path_of

MOST_CAPTIONS = 1_000_000  # different captions that are encoded here: of 20 words 80 GB of features of a T5 of width 2048
AT_ONCE = 512
PART = 8 * AT_ONCE  # captions of a file
KEPT = "real rows in bfloat16"

Rows = Callable[[int], tuple[np.ndarray, np.ndarray]]  # record -> features [rows c], mask [rows]


class Texted:
    """A source whose records also have "text" [rows c], bfloat16 or float32, and "text_mask" bool [rows], left-padded."""

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
            "no captions; leave data.text empty, or add captions (of a folder of images: captions.jsonl, captions.csv, Hugging "
            "Face's metadata.jsonl or .csv, or a .txt beside every image)"
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
    """The first `rows` real rows of [r c] at the end of [rows c], after zeros; and their mask. float32, if not bfloat16."""
    real = features[np.asarray(mask, bool)][:rows]
    padded = np.zeros((rows, features.shape[-1]), jnp.bfloat16 if real.dtype == jnp.bfloat16 else np.float32)
    padded[rows - len(real) :] = real
    return padded, np.arange(rows) >= rows - len(real)


def _encode(captions: Sequence[str], data: Data) -> tuple[str, Rows, int]:
    """Features of every different caption, encoded once: their real rows are kept in the cache, in bfloat16."""
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
    paths = [folder / f"{cache.key([encoder.identity, rows, KEPT, *part])}.safetensors" for part in parts]

    def write(i: int, path: Path) -> None:
        starts = tqdm(range(0, len(parts[i]), AT_ONCE), desc=f"captions {i + 1}/{len(parts)}", disable=None)
        found = [encoder.encode(parts[i][start : start + AT_ONCE], rows) for start in starts]
        real = [words[is_word] for features, mask in found for words, is_word in zip(features, np.asarray(mask))]
        ends = np.cumsum([len(words) for words in real])
        save_file({"rows": bits(np.concatenate(real)), "ends": ends}, path, {"encoder": encoder.identity})

    cache.make(paths, write)
    where = np.fromiter((unique[caption] for caption in captions), np.int32, len(captions))
    files = [_kept(path, len(part)) for path, part in zip(paths, parts)]

    def row(i: int) -> tuple[np.ndarray, np.ndarray]:
        part, j = divmod(int(where[i]), PART)
        ends, kept = files[part]
        words = from_bits(kept[int(ends[j - 1]) if j else 0 : int(ends[j])])
        return words, np.ones(len(words), bool)

    return encoder.name, row, _shape(files[0][1])[1]


def bits(features: np.ndarray) -> np.ndarray:
    """Features rounded to bfloat16, as uint16, which every format of files knows."""
    return np.asarray(features).astype(jnp.bfloat16).view(np.uint16)


def from_bits(kept: np.ndarray) -> np.ndarray:
    """bfloat16 of `bits`; float32, which older caches hold, as it is."""
    return kept.view(jnp.bfloat16) if kept.dtype == np.uint16 else kept


def _kept(path: Path, count: int) -> tuple[np.ndarray, Any]:
    """Where the rows of each caption end, and all rows, of which slices are read."""
    try:
        arrays = _safetensors(path, ("rows", "ends"))[1]
        ends = arrays["ends"][:]
        if len(ends) != count or ends[-1] != _shape(arrays["rows"])[0]:
            raise ValueError(f"it holds {len(ends)} captions with {_shape(arrays['rows'])[0]} rows, not {count}")
    except Exception as error:
        raise ValueError(f"{path}, features of captions that were kept, is damaged ({error}); delete it") from error
    return ends, arrays["rows"]


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


def _safetensors(path: Path, keys: tuple[str, ...] = ("features", "mask")) -> tuple[str, dict[str, Any]]:
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")
    encoder = (file.metadata() or {}).get("encoder", "")
    return encoder, {key: file.get_slice(key) for key in keys}
