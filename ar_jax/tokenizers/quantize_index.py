"""Quantisation with index back-propagation: the choice of a code has a gradient that reaches every code."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from ar_jax.tokenizers import quantize_blocks as blocks
from ar_jax.typing import Array, Float, Int, Metrics, typed


@dataclasses.dataclass(frozen=True)
class IndexLoss:
    """Weights of the training losses of index back-propagation.

    Attributes:
      both: pulls codes and latents to each other; the code has its gradient through the index.
      commit: pulls latents to their codes.
      codebook: pulls codes to the latents.
      entropy: sample entropy minus batch entropy of the soft assignment; pushes towards confident, even use.
      temperature: of the soft assignment in `entropy`; that of the index is 1.
    """

    both: float = 1.0
    commit: float = 1.0
    codebook: float = 0.25
    entropy: float = 0.05
    temperature: float = 0.01


@typed
def products(z: Float[Array, "*b c"], codebook: Float[Array, "v c"]) -> Float[Array, "*b v"]:
    """Inner product with every code, float32."""
    return jnp.einsum("...c,vc->...v", z, codebook, precision=lax.Precision.HIGHEST)


@typed
def index_quantise(
    z: Float[Array, "*b c"], codebook: Float[Array, "v c"], loss: IndexLoss = IndexLoss(), limit: int = blocks.BLOCK
) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
    """Replaces each vector by the code with the largest inner product (the first of equals), through a soft index.

    The published index is h - sg(p) + p: one-hot h forward, p = softmax(z E^T) backward, [pixels, codes] both. Here neither is
    made. Its product with the codebook E is the chosen code, whose gradient reaches that code, plus sg(E) averaged with p
    minus the same without gradient: so p reaches latents and all codes. That average, and the entropies, are summed over
    blocks of codes (`quantize_blocks`), at most `limit` numbers of [pixels, codes] at a time.

    Args:
      z: latents, not normalised.
      codebook: codes, of the size of latents.
      loss: weights.
      limit: see above.

    Returns:
      The codes, their indices, and the weighted losses "index", "commit", "codebook", "entropy".
    Source: IBQ (arXiv:2412.02692).
    """
    rows = blocks.rows_of(z)

    def affinity(some):
        return products(z, some)

    def sharp(some):
        return products(z, some) / loss.temperature

    index, top = blocks.best(affinity, codebook, rows, limit)
    code, soft = codebook[index], blocks.mixture(affinity, codebook, top, rows, limit)
    quantised = code + (soft - lax.stop_gradient(soft))
    losses = {
        "index": loss.both * jnp.square(quantised - z).mean(),
        "commit": loss.commit * jnp.square(lax.stop_gradient(code) - z).mean(),
        "codebook": loss.codebook * jnp.square(code - lax.stop_gradient(z)).mean(),
    }
    if loss.entropy:
        sample, batch = blocks.entropies(sharp, codebook, top / loss.temperature, rows, limit)
        losses["entropy"] = loss.entropy * (sample - batch)
    return quantised, index, losses
