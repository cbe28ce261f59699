"""Images, captions and cached tokens, from disk to batches of numpy arrays.

source = open_source(data)                          # random access to records
for batch in batches(source, data, batch=256, seed=0): ...
"""

from ar_jax.data.base import Data, Info, NoSplit, Source, Unreadable, in_order, label_ids, read_info, renumbered
from ar_jax.data.images import centre_crop, flip, random_crop, read_image, ten_crop
from ar_jax.data.packed import open_records
from ar_jax.data.pipeline import batches
from ar_jax.data.records import write_shards
from ar_jax.data.sources import SOURCES, Opened, Spread, open_source, plain

__all__ = [
    "SOURCES",
    "Data",
    "Info",
    "NoSplit",
    "Opened",
    "Source",
    "Spread",
    "Unreadable",
    "batches",
    "centre_crop",
    "flip",
    "in_order",
    "label_ids",
    "open_records",
    "open_source",
    "plain",
    "random_crop",
    "read_image",
    "read_info",
    "renumbered",
    "ten_crop",
    "write_shards",
]
