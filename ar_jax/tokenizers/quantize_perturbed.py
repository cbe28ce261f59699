"""Latents that training replaces by codes near to theirs, as a generator's wrong draws would; pure functions."""

import jax.numpy as jnp
from jax import lax

from ar_jax.tokenizers.quantize import distances, straight_through
from ar_jax.typing import Array, Float, Int, Share, typed


@typed
def perturb(
    z: Float[Array, "b *n c"],
    codes: Float[Array, "b *n c"],
    codebook: Float[Array, "v c"],
    uniform: Float[Array, "b *n"],
    neighbour: Int[Array, "b *n"],
    alpha: float | Float[Array, ""],
    beta: Share,
    most: int,
) -> Float[Array, "b *n c"]:
    """Of the first int(b beta) images, replaces tokens by one of the codes nearest to their latents, straight-through.

    A token keeps the nearest where its `uniform` is larger than alpha, else it takes the `neighbour`-th; so with neighbours
    drawn among delta, alpha (1 - 1/delta) of the tokens change. The codebook gets no gradient from these images.

    Args:
      z: latents; normalise them and the codebook beforehand for cosine search.
      codes: what they were quantised to, which the other images keep.
      codebook: codes.
      uniform: draws in 0..1.
      neighbour: numbers in 0..most, by ascending distance.
      alpha: probability that a token is replaced.
      beta: share of images.
      most: nearest codes that are looked for.
    Source: RobustTok (arXiv:2503.08354). There the images are the first of every device's batch, here of the whole one.
    """
    count = int(len(z) * beta)
    if not count:
        return codes
    some = z[:count]
    near = lax.top_k(-distances(some, codebook), min(most, len(codebook)))[1]
    which = jnp.where(uniform[:count] > alpha, 0, neighbour[:count])
    chosen = jnp.asarray(codebook)[jnp.take_along_axis(near, which[..., None], axis=-1)[..., 0]]
    return jnp.concatenate([straight_through(some, chosen), codes[count:]])


@typed
def annealed(time: float | Float[Array, "*b"] | Int[Array, "*b"], start: float, end: float, least: float) -> Array:
    """1 up to `start`, `least` from `end` on, and a straight line between them; float32, of any unit of time."""
    gone = jnp.clip((jnp.asarray(time, jnp.float32) - start) / (end - start), 0, 1)
    return 1 - (1 - least) * gone
