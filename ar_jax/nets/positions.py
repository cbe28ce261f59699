"""Positions from token coordinates."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.machine.sharding import platform
from ar_jax.typing import Array, Float, Int, typed

NOWHERE = np.int32(-1)  # coordinate of rows that are no token (condition rows)


@typed
def rotary(
    coords: Int[Array, "#B q 3"] | Float[Array, "#B q 3"], features: int, base: float = 10000.0
) -> Float[Array, "2 #B q e"]:
    """Cosines and sines of two-dimensional rotary positions, float32, each angle twice (once per channel of its pair).

    The first half of a head's channel pairs turns with the row, the second with the column. Rows that lie `NOWHERE`
    get cosine and sine zero, as in LlamaGen: their queries and keys vanish, so every token gives them the same weight.

    Args:
      coords: level, row, column.
      features: channels of a head (e), a multiple of 4.
    Source: LlamaGen (arXiv:2406.06525).
    """
    frequency = base ** (-np.arange(0, features // 2, 2, dtype=np.float32) / np.float32(features // 2))
    angle = (jnp.asarray(coords)[..., 1:, None] * frequency).reshape(*coords.shape[:-1], features // 2)
    somewhere = (jnp.asarray(coords)[..., 1:2] != NOWHERE).astype(jnp.float32)
    return jnp.repeat(jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * somewhere, 2, axis=-1)


@typed
def rotary_line(places: Int[Array, "#B q"], features: int, base: float = 10000.0) -> Float[Array, "2 #B q e"]:
    """As `rotary`, for places on a line, of which all pairs turn with their number.

    Source: RoFormer (arXiv:2104.09864).
    """
    frequency = base ** (-np.arange(0, features, 2, dtype=np.float32) / np.float32(features))
    angle = jnp.asarray(places)[..., None] * frequency
    return jnp.repeat(jnp.stack([jnp.cos(angle), jnp.sin(angle)]), 2, axis=-1)


@typed
def rotary_axes(
    places: Float[np.ndarray, "q a"] | Int[np.ndarray, "q a"], sizes: tuple[int, ...], base: float = 10000.0
) -> Float[np.ndarray, "2 1 q e"]:
    """As `rotary`, of any number of axes, each of which turns so many channels of a head.

    Args:
      places: of every row along every axis.
      sizes: even numbers of channels; they sum to e.
    Source: FLUX's transformer, as in Meissonic (arXiv:2410.08261) and Instella-T2I (arXiv:2506.21022).
    """
    angles = [
        place[:, None] * float(base) ** (-np.arange(0, size, 2) / size) for place, size in zip(places.T, sizes)
    ]
    angle = np.concatenate(angles, axis=-1)
    return np.repeat(np.stack([np.cos(angle), np.sin(angle)]), 2, axis=-1)[:, None].astype(np.float32)


def stretched(coords: Int[Array, "*b 3"], scales: tuple[tuple[int, int], ...], span: int) -> Array:
    """Coordinates whose rows and columns run from 0 to `span` on every level, whatever its size; span 0 keeps them."""
    if not span:
        return coords
    factors = np.array([(1, span / height, span / width) for height, width in scales], np.float32)
    coords = jnp.asarray(coords)
    return coords * jnp.asarray(factors)[coords[..., 0]]


@typed
def rotate(x: Float[Array, "B h q e"], table: Float[Array, "2 #B q e"]) -> Float[Array, "B h q e"]:
    """Turns neighbouring channels (2i, 2i+1) by the table's angles, in float32."""
    cos, sin = table[0][:, None], table[1][:, None]
    turned = _by_product(x) if platform() == "tpu" else _by_exchange(x)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def _by_exchange(x):
    """(a, b) -> (-b, a) of all pairs, float32. A GPU does it where it reads them, in the kernels of what comes next."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    return (jnp.flip(pairs, -1) * np.array([-1, 1], np.float32)).reshape(x.shape)


def _by_product(x):
    """The same by a product with a signed permutation, which is exact: on a TPU it costs a hundredth of the network, while
    moving single channels between lanes costs a quarter."""
    e = x.shape[-1]
    turn = np.zeros((e, e), np.float32)
    turn[np.arange(1, e, 2), np.arange(0, e, 2)], turn[np.arange(0, e, 2), np.arange(1, e, 2)] = -1, 1
    return jnp.einsum(
        "bhqe,ef->bhqf", x, turn.astype(x.dtype), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def sine_grid(side: int, width: int) -> np.ndarray:
    """Sines of the row (even channels) and cosines of the column (odd channels), float32 [side side width].

    Source: FlexVAR (arXiv:2502.20313), where it is what a learned grid begins as.
    """
    wave = np.arange(side)[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    grid = np.empty((side, side, width // 2, 2))
    grid[..., 0], grid[..., 1] = np.sin(wave)[:, None], np.cos(wave)[None]
    return grid.reshape(side, side, -1).astype(np.float32)


def sine_quarters(rows: int, columns: int, width: int) -> np.ndarray:
    """Sines, then cosines of the row, then sines and cosines of the column, float32 [rows*columns width] in raster order.

    Raises:
      ValueError: the width has no quarters.
    """
    if width % 4:
        raise ValueError(f"positions of rows and columns take quarters of a network's width, but the width is {width}")
    wave = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = (np.arange(side)[:, None] * wave for side in (rows, columns))
    row, column = (np.concatenate([np.sin(x), np.cos(x)], -1) for x in (row, column))
    both = np.broadcast_arrays(row[:, None], column[None])
    return np.concatenate(both, -1).reshape(rows * columns, width).astype(np.float32)


@typed
def rotate_halves(x: Float[Array, "B h q e"], table: Float[Array, "2 #B q e"]) -> Float[Array, "B h q e"]:
    """As `rotate`, of pairs of channels half a head apart, in float32; with a table for neighbours it is no rotation."""
    cos, sin = table[0][:, None], table[1][:, None]
    y = x.astype(jnp.float32)
    first, second = jnp.split(y, 2, axis=-1)
    return (y * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


def waves(t: Float[Array, "b"], features: int) -> Float[Array, "b f"]:
    """Sines, then cosines, at frequencies 1..1/10000."""
    half = features // 2
    angle = t[:, None] * np.exp(-np.log(10000.0) * np.arange(half) / max(half - 1, 1)).astype(np.float32)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
