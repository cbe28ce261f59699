"""Keys of seeds."""

import operator
from typing import Any

import jax
import numpy as np

from ar_jax.typing import PRNGKey

MOST = 2**64 - 1


def seed_key(seed: Any) -> PRNGKey:
    """The key of a seed of 64 bits; of those below 2^32 that of `jax.random.key`, which knows no others.

    Raises:
      ValueError: it is not 0 to 2^64 - 1.
    """
    seed = operator.index(seed)
    if not 0 <= seed <= MOST:
        raise ValueError(f"seed is {seed}; it must be 0 to 2^64 - 1")
    if seed < 2**32:
        return jax.random.key(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(np.resize(words, jax.random.key_data(jax.random.key(0)).shape))
