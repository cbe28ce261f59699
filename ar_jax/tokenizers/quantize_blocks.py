"""Search and soft assignment over large codebooks, some codes at a time: no array [pixels, codes] ever lies in memory.

All functions take `affinity`, which gives how well some codes fit every latent, float32 [*b v] of codes [v c], and `rows`, the
number of latents. At most `limit` of these numbers make a block. The backward pass computes a block's again, and holds up to
nine arrays of its size: 144 MiB, whatever the codebook. The rest is as large as the latents, the codebook, or [codes]. Codes
are what is divided, not latents, so that latents may be divided over devices in any way.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ar_jax.typing import Array, Float, Int, typed

BLOCK = 2**22  # numbers of [pixels, codes] in a block, 16 MiB of float32

Affinity = Callable[[Array], Array]  # codes [v c] -> float32 [*b v]


def few(rows: int, codes: int, limit: int = BLOCK) -> bool:
    """Whether all latents and all codes are a single block."""
    return rows * codes <= limit


@typed
def best(
    affinity: Affinity, codes: Float[Array, "v c"], rows: int, limit: int = BLOCK
) -> tuple[Int[Array, "*b"], Float[Array, "*b"]]:
    """The code with the largest affinity to every latent, the first of equals, and that affinity; without gradients."""

    def step(found, block):
        first, some, real = block
        fit = lax.stop_gradient(jnp.where(real, affinity(some), -jnp.inf))
        index, top = (first + fit.argmax(-1)).astype(jnp.int32), fit.max(-1)
        better = top > found[1]
        return (jnp.where(better, index, found[0]), jnp.where(better, top, found[1])), None

    blocks = _blocks(codes, rows, limit)
    shape = jax.eval_shape(affinity, blocks[1][0]).shape[:-1]
    return lax.scan(step, (jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf)), blocks)[0]


@typed
def mixture(
    affinity: Affinity, codes: Float[Array, "v c"], top: Float[Array, "*b"], rows: int, limit: int = BLOCK
) -> Float[Array, "*b c"]:
    """softmax(affinity) codes, with the gradient of the affinities only; `top` is the largest affinity of every latent."""
    total = _normaliser(affinity, codes, top, rows, limit)

    def of_block(first, some, real):
        p = _share(affinity, total, some, real)
        return jnp.matmul(p, lax.stop_gradient(some), precision=lax.Precision.HIGHEST)

    return _summed(of_block, codes, rows, limit)


@typed
def entropies(
    affinity: Affinity, codes: Float[Array, "v c"], top: Float[Array, "*b"], rows: int, limit: int = BLOCK
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean entropy of softmax(affinity) and the entropy of its mean over latents, nats; `top` as for `mixture`."""
    total = _normaliser(affinity, codes, top, rows, limit)

    def of_block(first, some, real):
        log = affinity(some) - total[..., None]
        p = jnp.exp(jnp.where(real, log, -jnp.inf))
        average = p.reshape(-1, p.shape[-1]).mean(0)
        return (p * jnp.where(real, log, 0)).sum(-1), (average * jnp.log(average + 1e-5)).sum()

    sample, batch = _summed(of_block, codes, rows, limit)
    return -sample.mean(), -batch


def _normaliser(affinity: Affinity, codes: Array, top: Array, rows: int, limit: int) -> Array:
    """Logarithm of the sum of exp(affinity) over all codes, [*b]."""

    def of_block(first, some, real):
        return _share(affinity, top, some, real).sum(-1)

    return top + jnp.log(_summed(of_block, codes, rows, limit))


def _share(affinity: Affinity, total: Array, some: Array, real: Array) -> Array:
    # what is no code is left out before the exponential, whose gradient might be infinite there
    return jnp.exp(jnp.where(real, affinity(some) - total[..., None], -jnp.inf))


def _summed(of_block: Callable, codes: Array, rows: int, limit: int):
    """Sum over blocks of what a function makes of each; the backward pass calls it again."""
    blocks = _blocks(codes, rows, limit)
    again = jax.checkpoint(of_block, prevent_cse=False)

    def step(sums, block):
        return jax.tree.map(jnp.add, sums, again(*block)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_block, *(x[0] for x in blocks)))
    return lax.scan(step, zeros, blocks)[0]


def _blocks(codes: Array, rows: int, limit: int) -> tuple[Array, Array, Array]:
    """First index [i], codes [i v c] and which of them are real [i v] of every block; the last one is filled up."""
    v = len(codes)
    count = -(-v // max(1, limit // max(rows, 1)))
    size = -(-v // count)
    count = -(-v // size)
    padded = jnp.pad(codes, ((0, count * size - v), (0, 0))).reshape(count, size, -1)
    first = size * jnp.arange(count, dtype=jnp.int32)
    return first, padded, first[:, None] + jnp.arange(size) < v


def rows_of(z: Array) -> int:
    """How many latents an array [*b c] holds."""
    return math.prod(z.shape[:-1])
