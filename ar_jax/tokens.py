"""What a tokenizer's token array looks like, and where its slots lie."""

import collections
import dataclasses
import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.typing import Array, Bool, Index, Int

FARTHEST = 2**16  # levels, rows and columns are fewer
MOST = 2**20  # slots of an image

Scale = int | tuple[int, int]  # p is p x p, else height and width


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """Which code may follow those before it: a finite automaton, for tokens of one code that are drawn in slot order.

    It begins in state 0. In the last state an image has ended, and one code is legal for all that is left: padding, which
    training does not count.

    Attributes:
      kind: int32 [v], the kind of each code; codes of a kind are legal in the same places.
      after: int32 [s kinds], the state after a code of a kind in a state; -1 where that is illegal.
    Raises:
      ValueError: arrays that are no automaton, or a state from which no image can end.
    """

    kind: np.ndarray
    after: np.ndarray

    def __post_init__(self):
        kind, after = self.kind, self.after
        integers = kind.dtype.kind == after.dtype.kind == "i"
        shaped = integers and (kind.ndim, after.ndim) == (1, 2) and kind.size * after.size > 0
        if not (
            shaped and 0 <= kind.min() <= kind.max() < after.shape[1] and -1 <= after.min() <= after.max() < len(after)
        ):
            raise ValueError(
                f"grammar.kind is {kind.dtype.name} {list(kind.shape)} and grammar.after {after.dtype.name} "
                f"{list(after.shape)}; they must be int32 [v], kinds of codes, and [s kinds], states after them or -1"
            )
        last = after[-1, kind]
        if (last >= 0).sum() != 1 or last.max() != len(after) - 1:
            raise ValueError("grammar.after must end with a state in which one code is legal, padding, and stays there")

    @property
    def padding(self) -> int:
        """The code of slots after the end."""
        return int(np.flatnonzero(self.after[-1, self.kind] >= 0)[0])

    @functools.cached_property
    def left(self) -> np.ndarray:
        """The fewest codes that end an image in a state, int32 [s]."""
        before, end = collections.defaultdict(set), len(self.after) - 1
        for state, kind in zip(*np.nonzero(self.after >= 0)):
            before[int(self.after[state, kind])].add(int(state))
        left, waiting = {end: 0}, collections.deque([end])
        while waiting:
            state = waiting.popleft()
            for earlier in before[state] - left.keys():
                left[earlier] = left[state] + 1
                waiting.append(earlier)
        if len(left) <= end:
            raise ValueError(f"grammar.after has {end + 1 - len(left)} states from which no image can end")
        return np.array([left[state] for state in range(end + 1)], np.int32)

    def follow(self, state: Int[Array, "b"], code: Int[Array, "b"]) -> Int[Array, "b"]:
        """The state after a code; after an illegal one the same as before."""
        after = jnp.asarray(self.after)[state, jnp.asarray(self.kind)[code]]
        return jnp.where(after < 0, state, after)

    def legal(self, state: Int[Array, "b"], room: Index) -> Bool[Array, "b v"]:
        """Codes that may come in a state if there is room for so many, itself included; at least one."""
        after = jnp.asarray(self.after)[state]
        fits = (after >= 0) & (jnp.asarray(self.left)[after] < room)
        return fits[:, self.kind]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSpec:
    """The token array of one image.

    Attributes:
      coords: int32 [n 3], level, row and column of each slot.
      codes: sizes of the k sub-codes of a discrete token; () is continuous.
      channels: width of a continuous token; 0 if discrete.
      grammar: of codes that may not follow each other as they like.
      placed: a token speaks of its cell of the image; else, as those on a line do, of the whole.
    """

    coords: np.ndarray
    codes: tuple[int, ...] = ()
    channels: int = 0
    grammar: Grammar | None = None
    placed: bool = True

    def __post_init__(self):
        coords = self.coords
        if coords.ndim != 2 or coords.shape[1] != 3 or coords.dtype.kind != "i":
            raise ValueError(f"coords are {coords.dtype.name} {list(coords.shape)}; they must be int32 [n 3]")
        if coords.size and (coords.min() < 0 or coords.max() >= FARTHEST):
            raise ValueError(f"coords go from {coords.min()} to {coords.max()}; they must be 0 to {FARTHEST - 1}")
        if min(self.codes, default=1) < 1:
            raise ValueError(f"codes is {self.codes}; codebooks have at least one code")
        if self.grammar and self.codes != (len(self.grammar.kind),):
            raise ValueError(f"codes is {self.codes}, but the grammar speaks of {len(self.grammar.kind)} codes")
        if self.grammar and self.grammar.left[0] > self.n:
            raise ValueError(f"an image has {self.n} tokens, but the grammar needs at least {self.grammar.left[0]}")

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
