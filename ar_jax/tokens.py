"""What a tokenizer's token array looks like, and where its slots lie."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSpec:
    """The token array of one image.

    Attributes:
      coords: int32 [n 3], level, row and column of each slot.
      codes: sizes of the k sub-codes of a discrete token; () is continuous.
      channels: width of a continuous token; 0 if discrete.
    """

    coords: np.ndarray
    codes: tuple[int, ...] = ()
    channels: int = 0

    @property
    def n(self) -> int:
        return len(self.coords)


def grid(height: int, width: int, level: int = 0) -> np.ndarray:
    """Coordinates of a grid in raster order, int32 [height*width 3]."""
    row, column = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    return np.stack([np.full_like(row, level), row, column], axis=-1)
