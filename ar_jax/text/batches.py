"""Captions of any lengths through a network that takes tokens of few shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ar_jax.typing import Array, Bool, Float, typed

BATCH = 64


@typed
def in_batches(
    tokenizer: Any, forward: Callable[[Array, Array], Array], captions: Sequence[str], rows: int, width: int
) -> tuple[Float[np.ndarray, "N {rows} {width}"], Bool[np.ndarray, "N {rows}"]]:
    """A hidden row for every token of every caption, float32, and which rows are tokens.

    Rows are padded on the left: the last row is always the closing token, padded rows are zero.

    Args:
      tokenizer: of the package `tokenizers`; longer captions lose words at their end, the closing token stays.
      forward: right-padded tokens int32 [64 r] and their numbers int32 [64] -> hidden rows [64 r d].
      rows: tokens of a caption at most.
      width: d.
    """
    tokenizer.no_padding()
    tokenizer.enable_truncation(rows)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(captions))]
    features = np.zeros((len(ids), rows, width), np.float32)
    mask = np.zeros((len(ids), rows), bool)
    shortest_first = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(ids), BATCH):
        batch = shortest_first[start : start + BATCH]
        most = max(16, 1 << (len(ids[batch[-1]]) - 1).bit_length())  # few lengths, so few compilations
        tokens, length = np.zeros((BATCH, most), np.int32), np.ones(BATCH, np.int32)
        for row, i in enumerate(batch):
            tokens[row, : len(ids[i])] = ids[i]
            length[row] = len(ids[i])
        hidden = np.asarray(forward(tokens, length))
        for row, i in enumerate(batch):
            features[i, rows - len(ids[i]) :] = hidden[row, : len(ids[i])]
            mask[i, rows - len(ids[i]) :] = True
    return features, mask
