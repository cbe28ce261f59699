"""Dropout, whose random numbers are those of the whole batch on any mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.machine import shares
from ar_jax.typing import Array


class Dropout(nn.Dropout):
    """Flax's, of numbers whose first axis are the rows of a batch (see `machine.shares`)."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        if nn.merge_param("deterministic", self.deterministic, deterministic) or self.rate == 0:
            return x
        kept = shares.draw(jax.random.uniform, self.make_rng(self.rng_collection), x.shape) < 1 - self.rate
        return jnp.where(kept, x / (1 - self.rate), 0) if self.rate < 1 else jnp.zeros_like(x)
