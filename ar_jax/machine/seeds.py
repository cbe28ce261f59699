"""Random keys of the whole numbers that people give."""

import operator
from typing import Annotated

import jax
import numpy as np

from ar_jax.typing import PRNGKey, Within

Seed = Annotated[int, Within(0, 2**64 - 1)]


def key_of(seed: int) -> PRNGKey:
    """The key of a seed of up to 64 bits, as JAX makes it where numbers have 64; `jax.random.key` takes the lower 32 of them.

    Raises:
      ValueError: it has more, or is negative.
    """
    seed = _checked(seed)
    if seed < 2**32:
        return jax.random.key(seed)
    words = np.array([seed >> 32, seed % 2**32], np.uint32)
    return jax.random.wrap_key_data(np.resize(words, jax.random.key_data(jax.random.key(0)).shape))


def narrow(seed: int) -> int:
    """A seed for what takes 32 bits: itself, if it has no more.

    Raises:
      ValueError: it has more than 64, or is negative.
    """
    seed = _checked(seed)
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


def _checked(seed):
    seed = operator.index(seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be a whole number from 0 to 2^64 - 1")
    return seed
