"""What a tokenizer's token array looks like, and where its slots lie."""

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.typing import Array

FARTHEST = 2**16  # levels, rows and columns are fewer
MOST = 2**20  # slots of an image

Scale = int | tuple[int, int]  # p is p x p, else height and width


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

    def __post_init__(self):
        coords = self.coords
        if coords.ndim != 2 or coords.shape[1] != 3 or coords.dtype.kind != "i":
            raise ValueError(f"coords are {coords.dtype.name} {list(coords.shape)}; they must be int32 [n 3]")
        if coords.size and (coords.min() < 0 or coords.max() >= FARTHEST):
            raise ValueError(f"coords go from {coords.min()} to {coords.max()}; they must be 0 to {FARTHEST - 1}")
        if min(self.codes, default=1) < 1:
            raise ValueError(f"codes is {self.codes}; codebooks have at least one code")

    @property
    def n(self) -> int:
        return len(self.coords)

    def zeros(self, images: int) -> Array:
        """Tokens of so many images: int32 [b n k] codes or float32 [b n c]."""
        return jnp.zeros((images, self.n, self.channels or len(self.codes)), jnp.int32 if self.codes else jnp.float32)

    @property
    def scales(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every level."""
        level, *place = self.coords.T
        return tuple(tuple(int(side[level == i].max()) + 1 for side in place) for i in range(level.max() + 1))


def grid(height: int, width: int, level: int = 0) -> np.ndarray:
    """Coordinates of a grid in raster order, int32 [height*width 3].

    Raises:
      ValueError: a million slots or more.
    """
    if height * width > MOST:
        raise ValueError(f"a grid of {height}x{width} tokens is larger than the {MOST} that an image may have")
    row, column = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    return np.stack([np.full_like(row, level), row, column], axis=-1)


def pyramid(scales: tuple[Scale, ...]) -> np.ndarray:
    """Coordinates of grids one after the other, in the order given (coarse to fine), int32 [n 3].

    Raises:
      ValueError: no scale, or one without slots.
    """
    if sum(math.prod(sides(scale)) for scale in scales) > MOST:
        raise ValueError(f"scales are of more than the {MOST} tokens that an image may have")
    if not scales or min(min(sides(scale)) for scale in scales) < 1:
        raise ValueError(f"scales is {scales}; it must be at least one side, or pair (height, width), of 1 or more")
    return np.concatenate([grid(*sides(scale), level) for level, scale in enumerate(scales)])


def sides(scale: Scale) -> tuple[int, int]:
    """Height and width of a scale."""
    return (scale, scale) if isinstance(scale, int) else tuple(scale)


def maps(x: Array, scales: tuple[Scale, ...]) -> list[Array]:
    """Cuts [b m ...], which holds the first scales one after the other, into one [b h w ...] per scale.

    Raises:
      ValueError: m is not the size of the first so many scales.
    """
    ends = list(itertools.accumulate(math.prod(sides(scale)) for scale in scales))
    if x.shape[1] not in ends:
        raise ValueError(f"{x.shape[1]} tokens are no whole number of the scales {scales}; it must be one of {ends}")
    ends = ends[: ends.index(x.shape[1]) + 1]
    spans = zip([0, *ends], ends, scales)
    return [x[:, start:end].reshape(len(x), *sides(scale), *x.shape[2:]) for start, end, scale in spans]


def rows(maps: list[Array]) -> Array:
    """Joins maps [b h w ...] of scales one after the other to [b m ...]; the inverse of `maps`."""
    return jnp.concatenate([x.reshape(len(x), -1, *x.shape[3:]) for x in maps], axis=1)


def by_side(order: Any, spec: TokenSpec) -> np.ndarray:
    """Longer side of the scale that each step of an order draws, int [steps].

    Raises:
      ValueError: its steps are not the scales.
    """
    sizes = tuple(height * width for height, width in spec.scales)
    if order.sizes != sizes:
        raise ValueError(f"largest and known speak of scales, but {len(order.sizes)} steps draw {len(sizes)} scales")
    return np.max(spec.scales, axis=1)
