"""Image resizing by the conventions of the published models (PyTorch's, without antialiasing), as matrix products."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.typing import Array, Bool, Float, typed


@typed
def resize(x: Float[Array, "b h w c"], size: tuple[int, int], kind: str = "bicubic") -> Float[Array, "b H W c"]:
    """Resizes both image axes.

    Args:
      x: images or feature maps.
      size: height and width of the result.
      kind: "bicubic" (a = -0.75, four taps also when shrinking), "linear" (two taps, also when shrinking) or "area" (mean
        of the pixels a bin touches).
    Raises:
      ValueError: another kind.
    """
    matrices = {"bicubic": bicubic_matrix, "linear": linear_matrix, "area": area_matrix}
    if kind not in matrices:
        raise ValueError(f"resize kind is {kind!r}; it must be one of {', '.join(matrices)}")
    for axis, n in zip((1, 2), size):
        if x.shape[axis] != n:
            matrix = matrices[kind](n, x.shape[axis])
            moved = jnp.tensordot(matrix.astype(x.dtype), x, (1, axis), precision=lax.Precision.HIGHEST)
            x = jnp.moveaxis(moved, 0, axis)
    return x


@typed
def resized(places: Float[Array, "h w d"], size: tuple[int, int]) -> Float[Array, "n d"]:
    """A learned table of places for a grid of another size, in raster order, as DINOv2, Hita and LightGen do it: as if the grid
    were a tenth of a place larger than it is."""
    down, across = (bicubic_matrix(n, m, n + 0.1) for n, m in zip(size, places.shape[:2]))
    out = jnp.einsum("yh,xw,hwd->yxd", down, across, places, precision=lax.Precision.HIGHEST)
    return out.reshape(-1, places.shape[-1])


@typed
def touched(mask: Bool[Array, "b H W"], size: tuple[int, int]) -> Bool[Array, "b h w"]:
    """Which cells of a grid of that height and width hold anything of a mask; cells are those of "area"."""
    return resize(mask[..., None].astype(jnp.float32), size, "area")[..., 0] > 0


@functools.lru_cache
def bicubic_matrix(n: int, m: int, span: float = 0.0) -> np.ndarray:
    """float32 [n m], from m pixels to n; half-pixel centres, pixels beyond the border repeat it.

    Args:
      span: so many pixels of the result would cover those m; 0 is n.
    """
    a, matrix = -0.75, np.zeros((n, m))
    place = (np.arange(n) + 0.5) * m / (span or n) - 0.5
    left = np.floor(place).astype(int)
    for tap in range(-1, 3):
        u = np.abs(place - left - tap)
        near = (a + 2) * u**3 - (a + 3) * u**2 + 1
        far = a * u**3 - 5 * a * u**2 + 8 * a * u - 4 * a
        np.add.at(matrix, (np.arange(n), np.clip(left + tap, 0, m - 1)), np.where(u <= 1, near, far))
    return matrix.astype(np.float32)


@functools.lru_cache
def linear_matrix(n: int, m: int) -> np.ndarray:
    """float32 [n m], from m pixels to n; half-pixel centres, pixels beyond the border repeat it."""
    place, matrix = np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1), np.zeros((n, m))
    left = np.floor(place).astype(int)
    np.add.at(matrix, (np.arange(n), left), 1 - (place - left))
    np.add.at(matrix, (np.arange(n), np.minimum(left + 1, m - 1)), place - left)
    return matrix.astype(np.float32)


@functools.lru_cache
def smooth_matrix(n: int, m: int) -> np.ndarray:
    """As `linear_matrix`, but the filter widens when the image shrinks (PyTorch's with antialiasing)."""
    stretch = max(m / n, 1.0)
    centre = (np.arange(n)[:, None] + 0.5) * m / n
    weight = np.maximum(0, 1 - np.abs(np.arange(m) + 0.5 - centre) / stretch)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


@functools.lru_cache
def area_matrix(n: int, m: int) -> np.ndarray:
    """float32 [n m], from m pixels to n; bins overlap where n does not divide m."""
    i, pixel = np.arange(n)[:, None], np.arange(m)[None]
    inside = (pixel >= i * m // n) & (pixel < -(-(i + 1) * m // n))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
