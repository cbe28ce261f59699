"""Filters of logits before the draw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.machine.sharding import platform
from ar_jax.typing import Array, Float, Index, Share, typed


@typed
def top_k(logits: Float[Array, "*b v"], k: Index) -> Float[Array, "*b v"]:
    """Keeps everything not below the k-th largest entry (ties stay), -inf elsewhere; 0 keeps all."""
    return _if((k > 0) & (k < logits.shape[-1]), lambda x: _keep(x, lambda at_least: at_least.sum(-1) >= k), logits)


@typed
def top_p(logits: Float[Array, "*b v"], p: float | Float[Array, ""]) -> Float[Array, "*b v"]:
    """Keeps the most likely entries until their probability exceeds p, at least one (ties stay); 1 keeps all."""

    def likely(logits):
        mass = jnp.exp(logits - logits.max(-1, keepdims=True))
        whole = mass.sum(-1, keepdims=True)
        return _keep(logits, lambda at_least: jnp.where(at_least, mass[..., None, :], 0).sum(-1) > p * whole)

    return _if(p < 1, likely, logits)


def _if(on, change, logits):
    """What is off costs nothing, also where that is known to the running program only."""
    if isinstance(on, jax.Array):
        return lax.cond(on, change, lambda x: x, logits)
    return change(logits) if on else logits


def _keep(logits, enough):
    """-inf below the largest threshold for which the entries at or above it [*b t v] are `enough` [*b t].

    The threshold is found digit by digit, from the first on: every pass over the entries tries all values of one. That is
    exact, and needs no sort. A GPU takes digits of four bits, so that it starts a few kernels for eight passes, not for 32; a
    CPU, for which all work counts, takes bits.
    """
    size = 1 if platform() == "cpu" else 4
    numbers = jnp.where(logits == 0, 0, logits).astype(jnp.float32)  # -0 ties with 0
    bits = lax.bitcast_convert_type(numbers, jnp.uint32)
    order = jnp.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # unsigned integers in the order of the floats
    values = np.arange(1, 2**size, dtype=np.uint32)

    def body(i, threshold):
        place = np.uint32(32 - size) - size * i.astype(jnp.uint32)
        # the larger a threshold, the fewer are at or above it: it is the first so many that are enough
        digit = enough(order[..., None, :] >= (threshold | values << place)[..., None])
        return threshold | digit.sum(-1, keepdims=True, dtype=jnp.uint32) << place

    zero = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    threshold = lax.fori_loop(0, 32 // size, body, zero, unroll=size > 1)
    return jnp.where(order >= threshold, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Filter:
    """Logits to logits: top-k, then top-p. Any function of this form can stand in its place in `Sampling`.

    Entries stay whose likelier ones have less than `top_p` together, which is both LlamaGen's rule (from the largest
    down) and VAR's (from the smallest up), but for what rounding does to the sums.
    """

    top_k: int = 0
    """Draw from the k most likely codes; 0 is off."""
    top_p: Share = 1.0
    """Draw from the most likely codes of this probability mass, in (0, 1]; 1 is off."""
    banned: tuple[int, ...] = ()
    """Codes that are never drawn."""

    arrays = ("top_k", "top_p")  # fields that may be arrays, so that a compiled program takes any (see `demo.easel`)

    def __post_init__(self):
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.banned and min(self.banned) < 0:
            raise ValueError(f"banned must be codes, 0 or more, got {self.banned}")

    def __call__(self, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
        if self.banned:
            if max(self.banned) >= logits.shape[-1]:
                raise ValueError(f"banned has code {max(self.banned)}, but there are only {logits.shape[-1]} codes")
            if len(set(self.banned)) == logits.shape[-1]:
                raise ValueError(f"banned is all of the {logits.shape[-1]} codes; leave some to be drawn")
            logits = logits.at[..., np.array(self.banned)].set(-jnp.inf)
        return top_p(top_k(logits, self.top_k), self.top_p)


@dataclasses.dataclass(frozen=True)
class Inside:
    """Logits to logits: the most likely entries stay as long as they have at most `top_p` together, and always one. `Filter`
    keeps one more, that which exceeds it.

    Source: samplers of masked diffusion language models, as in block diffusion (arXiv:2503.09573).
    """

    top_p: Share = 1.0
    """Draw from the most likely codes within this probability mass, in (0, 1]; 1 is off."""

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def __call__(self, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
        if self.top_p == 1:
            return logits
        rank = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
        mass = jnp.cumsum(-jnp.sort(-jax.nn.softmax(logits), axis=-1), axis=-1)
        inside = jnp.take_along_axis(mass <= self.top_p, rank, axis=-1)
        return jnp.where(inside | (rank == 0), logits, -jnp.inf)
