"""Which columns of a table hold the image, the label and the caption, by its Arrow schema; for Parquet and Hugging Face."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from ar_jax.data.base import Info, Unreadable
from ar_jax.data.images import read_image

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")  # columns of bytes that are taken for images
LABELS = ("label", "labels", "class", "cls", "fine_label")
CAPTIONS = ("caption", "text", "captions", "prompt")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of columns; a label or caption that is not there is ""."""

    image: str
    label: str
    caption: str
    class_names: tuple[str, ...]  # if the schema knows them

    @property
    def used(self) -> list[str]:
        return [name for name in (self.image, self.label, self.caption) if name]

    def info(self, seen: np.ndarray, names: tuple[str, ...]) -> Info:
        """Of the data set; labels without names are those of `seen_classes`."""
        classes = (len(self.class_names) or len(seen)) if self.label else 0
        return Info(classes, self.class_names or names, captions=bool(self.caption))

    def record(self, row: dict[str, Any], name: str, upright: bool, seen: np.ndarray) -> dict[str, Any]:
        """What a source gives for a row of Python values; see `read_image` and `info`."""
        record = {"image": _image(row[self.image], name, upright)}
        if self.label:
            label = -1 if row[self.label] is None else int(row[self.label])
            record["label"] = label if label < 0 or self.class_names else int(np.searchsorted(seen, label))
        if self.caption:
            record["caption"] = text_of(row[self.caption])
        return record


def columns(schema: Any, where: str) -> Columns:
    """Reads off a `pyarrow.Schema`, with the features that Hugging Face writes into its metadata.

    The image is the first feature of that kind, else the first column of {bytes, path}, else one of bytes with a usual
    name; the label a ClassLabel, else whole numbers with a usual name; the caption text with a usual name (of several
    captions of an image the first).

    Raises:
      ValueError: there is no image.
    """
    import pyarrow as pa

    types = {field.name: field.type for field in schema}
    kinds, features = {}, _features(schema.metadata or {})
    for name, feature in features.items():
        kinds[name] = feature.get("_type") if isinstance(feature, dict) else None

    def first(*choices):
        return next((name for choice in choices for name in choice), "")

    def usual(names, fits):
        return [name for name in names if name in types and fits(types[name])]

    def is_text(kind):
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def is_bytes(kind):
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    image = first(
        [name for name in types if kinds.get(name) == "Image"],
        [name for name, kind in types.items() if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0],
        usual(IMAGES, is_bytes),
    )
    if not image:
        raise ValueError(f"{where} has the columns {', '.join(types)}, and no image")
    named = [name for name in types if kinds.get(name) == "ClassLabel"]
    label = first([name for name in LABELS if name in named], named, usual(LABELS, pa.types.is_integer))
    names = features[label].get("names") if label in named else None
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Columns(image, label, first(usual(CAPTIONS, is_text)), tuple(names) if fits else ())


def text_of(value: Any) -> str:
    """A caption; of several the first."""
    if isinstance(value, list):
        value = value[0] if value else ""
    return value or ""


def _features(metadata):
    try:
        found = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _image(value, name, upright) -> Image.Image:
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise Unreadable(name, "it has no bytes, only a path or nothing; save the data set with its images embedded")
    return read_image(io.BytesIO(content), name, upright)
