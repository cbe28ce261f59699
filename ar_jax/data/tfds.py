"""A prepared TensorFlow data set in ArrayRecord format, read without TensorFlow."""

import io
from typing import Any

import numpy as np

from ar_jax.data.base import Data, Info, NoSplit, folder_of
from ar_jax.data.images import read_image
from ar_jax.files.places import local


class Tfds:
    """Records with the features `image` and, if there, `label` and `caption` (or `text`)."""

    def __init__(self, source: Any, caption: str, info: Info, name: str, upright: bool):
        self.upright = upright
        self.source, self.caption, self.info, self.name = source, caption, info, name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.source[index]
        name = f"record {index} of {self.name}"
        record = {"image": read_image(io.BytesIO(found["image"]), name, self.upright)}
        if self.info.classes:
            record["label"] = int(found["label"])
        if self.caption:
            record["caption"] = _text(found[self.caption])
        return record

    def captions(self) -> list[str]:
        return [_text(self.source[i][self.caption]) for i in range(len(self))]


def tfds(data: Data) -> Tfds:
    """The data set prepared in `data.path`, the folder that holds dataset_info.json.

    The test is the split `validation`, else `test`: where there are both, test images rarely have labels.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError("data.name=tfds needs tensorflow-datasets: pip install ar_jax[tfds]") from error
    folder = local(folder_of(data))
    if not (folder / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"data.path={folder} has no dataset_info.json; give the folder of a prepared "
            "version, like .../flowers/1.0.0"
        )
    builder = tensorflow_datasets.builder_from_directory(str(folder))
    features, splits = builder.info.features, list(builder.info.splits)
    if "image" not in features:
        raise ValueError(f"data.path={folder} has the features {', '.join(features)}, and no image")
    test = [split for split in ("validation", "test") if split in splits][:1]
    wanted = {"train": ["train"], "test": test, "all": ["train", *test]}[data.split]
    if not wanted or not set(wanted) <= set(splits):
        raise NoSplit(f"data.split is {data.split}, but data.path={folder} has the splits {', '.join(splits)}")
    encoded = {"image": tensorflow_datasets.decode.SkipDecoding()}  # our reader treats all data sets alike
    try:
        source = builder.as_data_source("+".join(wanted), decoders=encoded)
    except NotImplementedError as error:
        raise ValueError(
            f"data.path={folder} is not in ArrayRecord format; prepare it with "
            "file_format='array_record' (this needs TensorFlow, once)"
        ) from error
    label = dict(features).get("label")
    names = getattr(label, "names", None) or ()  # ClassLabel has both, a plain number neither
    caption = next((key for key in ("caption", "text") if key in features), "")
    info = Info(getattr(label, "num_classes", None) or 0, tuple(names), captions=bool(caption))
    return Tfds(source, caption, info, str(folder), data.upright)


def _text(value: Any) -> str:
    value = np.asarray(value).reshape(-1)[0]  # of several captions of an image, the first
    return value.decode() if isinstance(value, bytes) else str(value)
