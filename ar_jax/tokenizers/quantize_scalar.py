"""Finite scalar quantisation (FSQ): every number of a latent is rounded to one of a few levels; there is no codebook to learn."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from ar_jax.tokenizers.quantize import straight_through
from ar_jax.typing import Array, Float, Int, Metrics, typed

EDGE = 1e-3  # how far beyond the outermost levels the bounds lie, relative to half of their span
MOST = 2**31 - 1  # codes that int32 counts


@typed
def bounded(z: Float[Array, "*b c"], levels: tuple[int, ...]) -> Float[Array, "*b c"]:
    """Numbers between the outermost levels, whole where a level is: -L/2..L/2-1 of an even number of levels, else around 0.

    Of an even number of levels tanh is shifted, so that 0 stays 0.
    """
    half = (np.array(levels) - 1) * (1 + EDGE) / 2
    offset = np.where(np.array(levels) % 2, 0.0, 0.5)
    shift = np.arctanh(offset / half)
    return jnp.tanh(z + shift.astype(np.float32)) * half.astype(np.float32) - offset.astype(np.float32)


@typed
def scalar_quantise(
    z: Float[Array, "*b c"], levels: tuple[int, ...]
) -> tuple[Float[Array, "*b c"], Int[Array, "*b c"]]:
    """Rounds every number to one of its channel's levels, with the gradient of `bounded`.

    Args:
      z: latents, float32.
      levels: of each channel, two or more.

    Returns:
      The codes, about -1..1, and the digits of every channel, 0..levels-1.
    Source: FSQ (arXiv:2309.15505).
    """
    x = bounded(z, levels)
    whole = jnp.round(x)
    half = np.array(levels) // 2
    return straight_through(x, whole) / half.astype(np.float32), whole.astype(jnp.int32) + half


@typed
def scalar_codes(digits: Int[Array, "*b c"], levels: tuple[int, ...]) -> Float[Array, "*b c"]:
    """What digits stand for; the inverse of `scalar_quantise`."""
    half = np.array(levels) // 2
    return (digits - half).astype(jnp.float32) / half.astype(np.float32)


@typed
def joined(digits: Int[Array, "*b c"], levels: tuple[int, ...]) -> Int[Array, "*b"]:
    """One number for all digits, 0..product of the levels - 1; the first digit counts ones, the second the first's levels.

    Raises:
      ValueError: int32 does not hold it.
    """
    return (digits * _places(levels)).sum(-1).astype(jnp.int32)


@typed
def split(index: Int[Array, "*b"], levels: tuple[int, ...]) -> Int[Array, "*b c"]:
    """The digits of a number; the inverse of `joined`."""
    return (index[..., None] // _places(levels) % np.array(levels, np.int32)).astype(jnp.int32)


def _places(levels):
    if math.prod(levels) > MOST:
        raise ValueError(
            f"levels {levels} make {math.prod(levels)} codes in one, but int32 counts {MOST}; keep the digits apart "
            "(joint False)"
        )
    return np.cumprod([1, *levels[:-1]]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class FSQ:
    """Finite scalar quantisation as the quantiser of a tokenizer (`fixed_codes.FixedCodes`). It has no losses.

    Source: FSQ (arXiv:2309.15505).
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Of each channel, two or more: (8, 6, 5) is about 2^8 codes, (8, 5, 5, 5) 2^10, (7, 5, 5, 5, 5) 2^12, (8, 8, 8, 5, 5, 5)
    2^16."""
    joint: bool = True
    """One code for all channels; else every channel is a sub-code."""

    def __post_init__(self):
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"quantiser.levels is {self.levels}; it must be two or more levels for each channel")
        if self.joint:
            _places(self.levels)

    @property
    def features(self) -> int:
        """Channels of a latent."""
        return len(self.levels)

    @property
    def codes(self) -> tuple[int, ...]:
        """Sizes of the sub-codes."""
        return (math.prod(self.levels),) if self.joint else self.levels

    def __call__(self, z: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b k"], Metrics]:
        """Codes with the gradient of z, tokens, weighted losses by name."""
        codes, digits = scalar_quantise(z, self.levels)
        return codes, joined(digits, self.levels)[..., None] if self.joint else digits, {}

    def look_up(self, tokens: Int[Array, "*b k"]) -> Float[Array, "*b c"]:
        """What tokens stand for."""
        return scalar_codes(split(tokens[..., 0], self.levels) if self.joint else tokens, self.levels)
