"""Codebooks that no gradient trains: every code is the moving average of the vectors that chose it."""

import dataclasses

import jax.numpy as jnp

from ar_jax.typing import Array, Float, Int, Share, typed


@dataclasses.dataclass(frozen=True)
class Average:
    """How a codebook follows the vectors that choose its codes.

    Attributes:
      decay: of the averages, an update.
      eps: added to the number of vectors of every code, so that none is divided by zero.
      rare: codes that fewer vectors choose, on average in an update, begin anew as vectors of the batch; 0 never does.
    Source: VQ-VAE (arXiv:1711.00937), appendix A.1; the restart as in DQ-VAE (arXiv:2305.11718).
    """

    decay: Share = 0.99
    eps: float = 1e-5
    rare: float = 1.0


@typed
def followed(
    sizes: Float[Array, "v"], sums: Float[Array, "v c"], vectors: Float[Array, "m c"], index: Int[Array, "m"],
    decay: float,
) -> tuple[Float[Array, "v"], Float[Array, "v c"]]:  # fmt: skip
    """The averages after one more batch: numbers of vectors, and sums of vectors, by code."""
    count = jnp.zeros_like(sizes).at[index].add(1.0)
    total = jnp.zeros_like(sums).at[index].add(vectors)
    return decay * sizes + (1 - decay) * count, decay * sums + (1 - decay) * total


@typed
def restarted(
    sizes: Float[Array, "v"], sums: Float[Array, "v c"], fresh: Float[Array, "v c"], rare: float
) -> tuple[Float[Array, "v"], Float[Array, "v c"]]:
    """Rare codes (see `Average`) become vectors of `fresh`, as if one vector had chosen each."""
    few = sizes < rare
    return jnp.where(few, 1.0, sizes), jnp.where(few[:, None], fresh, sums)


@typed
def centres(sizes: Float[Array, "v"], sums: Float[Array, "v c"], eps: float) -> Float[Array, "v c"]:
    """The codes: sums of vectors by their numbers, to which `eps` is added so that their total stays."""
    total = sizes.sum()
    return sums / ((sizes + eps) / (total + len(sizes) * eps) * total)[:, None]
