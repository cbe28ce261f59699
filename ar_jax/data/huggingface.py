"""Data sets of the package `datasets` (Hugging Face), memory-mapped and read at random."""

import itertools
from typing import TYPE_CHECKING, Any

from ar_jax.data.base import Data, NoSplit, folder_of, seen_classes
from ar_jax.data.columns import columns, text_of
from ar_jax.files.places import local

if TYPE_CHECKING:
    import datasets


class HuggingFace:
    """The rows of any `datasets.Dataset` with an image column (see `columns`); images are decoded by us, as everywhere.

    Args:
      name: for messages.
      every: all splits, where labels have no names and classes are those seen.
      upright: of `read_image`.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        name: str = "the data set",
        every: "list[datasets.Dataset]" = (),
        upright: bool = True,
    ):
        self.upright = upright
        self.name, self.columns = name, columns(dataset.features.arrow_schema, name)
        self.rows = dataset.select_columns(self.columns.used).with_format("arrow")
        unnamed = self.columns.label and not self.columns.class_names
        labels = [_labels(split, self.columns.label) for split in every or [dataset]] if unnamed else []
        self.seen, names = seen_classes(itertools.chain(*labels))
        self.info = self.columns.info(self.seen, names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.columns.record(
            self.rows[index].to_pylist()[0], f"record {index} of {self.name}", self.upright, self.seen
        )

    def captions(self) -> list[str]:
        column = self.rows.select_columns([self.columns.caption])
        return [
            text_of(value)
            for rows in column.iter(batch_size=10_000)
            for value in rows[self.columns.caption].to_pylist()
        ]


def huggingface(data: Data) -> HuggingFace:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote into the folder `data.path`.

    Of a DatasetDict the test is the split `validation` (or `val`), else `test`. A Dataset alone is the training split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data.name=huggingface needs the package datasets: pip install ar_jax[huggingface]") from error
    folder = local(folder_of(data))
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise FileNotFoundError(
            f"data.path={folder} has neither dataset_dict.json nor state.json; give what save_to_disk(FOLDER) wrote"
        )
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of Arrow, JSON and the package's own
        raise ValueError(f"data.path={folder} is no data set that can be read: {error}") from error
    if isinstance(found, datasets.Dataset):
        if data.split == "test":
            raise NoSplit(f"data.split is test, but data.path={folder} is a single Dataset; save a DatasetDict")
        return HuggingFace(found, str(folder), upright=data.upright)
    test = [split for split in ("validation", "val", "test") if split in found][:1]
    wanted = {"train": ["train"], "test": test, "all": ["train", *test]}[data.split]
    if not wanted or not set(wanted) <= set(found):
        raise NoSplit(f"data.split is {data.split}, but data.path={folder} has the splits {', '.join(found)}")
    chosen = datasets.concatenate_datasets([found[split] for split in wanted])
    every = [found[split] for split in ("train", *test) if split in found]
    return HuggingFace(chosen, str(folder), every, data.upright)


def _labels(dataset, label):
    """The different ones of a column."""
    import pyarrow.compute

    return pyarrow.compute.unique(dataset.data.column(label)).drop_null().to_pylist() if len(dataset) else []
