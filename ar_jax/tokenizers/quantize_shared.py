"""Quantisers of two descriptions of a place at once, which share one index, as pure functions over the codebook."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.nets.resize import resize
from ar_jax.tokenizers.quantize import VectorLoss, normalise, vector_quantise
from ar_jax.tokens import rows
from ar_jax.typing import Array, Float, Int, Metrics, PRNGKey, Share, typed


@typed
def halves_normalised(x: Float[Array, "*b c"], first: int) -> Float[Array, "*b c"]:
    """Vectors whose first so many numbers, and whose others, are each brought to length 1."""
    return jnp.concatenate([normalise(x[..., :first]), normalise(x[..., first:])], axis=-1)


@typed
def shared_quantise(
    z: Float[Array, "*b c"],
    codebook: Float[Array, "v c"],
    first: int,
    loss: VectorLoss = VectorLoss(),
    weight: float = 1.0,
) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
    """Replaces each vector by the code that is nearest in both of its parts together, straight-through.

    Parts are normalised, each by itself, of latents and of codes. Losses are means over all numbers, so that the wider part
    weighs more.

    Args:
      z: latents, the semantic part first.
      codebook: codes, likewise; both parts of a row have the same index.
      first: width of the semantic part.
      loss: weights.
      weight: of the squared distance of the second part, beside 1 of the first.

    Returns:
      The codes with the gradient of z (through its normalisation), their indices, and the weighted losses "codebook",
      "commit", "entropy".
    Source: TokenFlow (arXiv:2412.03069).
    """
    z, codes = halves_normalised(z, first), halves_normalised(codebook, first)
    scale = np.where(np.arange(z.shape[-1]) < first, 1.0, weight**0.5).astype(np.float32)
    _, index, losses = vector_quantise(z * scale, codes * scale, loss)
    code = codes[index]
    losses |= {
        "codebook": loss.codebook * jnp.square(code - lax.stop_gradient(z)).mean(),
        "commit": loss.commit * jnp.square(lax.stop_gradient(code) - z).mean(),
    }
    return z + lax.stop_gradient(code - z), index, losses


@typed
def shared_residual_quantise(
    latents: Float[Array, "b h w c"],
    codebook: Float[Array, "v c"],
    first: int,
    sizes: tuple[tuple[int, int], ...],
    loss: VectorLoss = VectorLoss(),
    weight: float = 1.0,
    skip: Share = 0.0,
    key: PRNGKey | None = None,
) -> tuple[Float[Array, "b h w c"], Int[Array, "b n"], Float[Array, "b n c"], Metrics]:
    """Describes a map as a sum over scales, each of which is quantised by `shared_quantise` in its size and enlarged.

    Args:
      sizes: height and width of every scale, coarse to fine; the last is that of `latents`.
      skip: with a key, the probability that one scale but the first, drawn at random, is left out for all images.
      others: as of `shared_quantise`.

    Returns:
      The sum, indices of all scales, what they stand for, and the weighted losses, means over the scales that are in use.
    Source: TokenFlow (arXiv:2412.03069).
    """
    left = jnp.int32(-1)
    if key is not None and skip and len(sizes) > 1:
        chance, which = jax.random.split(key)
        left = jnp.where(jax.random.uniform(chance) < skip, jax.random.randint(which, (), 1, len(sizes)), -1)
    rest, total, levels = latents, jnp.zeros_like(latents), []
    for level, size in enumerate(sizes):
        z, used = resize(rest, size, "area"), (left != level).astype(jnp.float32)
        code, index, losses = shared_quantise(z, codebook, first, loss, weight)
        added = used * resize(code, latents.shape[1:3])
        total, rest = total + added, rest - lax.stop_gradient(added)
        levels.append((index, lax.stop_gradient(z), jax.tree.map(lambda x, used=used: used * x, losses), used))
    index, z, losses, used = zip(*levels)
    losses = jax.tree.map(lambda *x: sum(x) / sum(used), *losses)
    return total, rows(index), rows(z), losses
