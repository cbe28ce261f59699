"""Filters of logits before the draw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
        return _keep(logits, lambda at_least: jnp.where(at_least, mass, 0).sum(-1) > p * mass.sum(-1))

    return _if(p < 1, likely, logits)


def _if(on, change, logits):
    """What is off costs nothing, also where that is known to the running program only."""
    if isinstance(on, jax.Array):
        return lax.cond(on, change, lambda x: x, logits)
    return change(logits) if on else logits


def _keep(logits, enough):
    """-inf below the largest threshold for which the entries at or above it are `enough`.

    The threshold is found bit by bit: 32 passes over the entries, a twentieth of the time of a sort or of
    `lax.top_k` with a large k on CPU, and exact.
    """
    numbers = jnp.where(logits == 0, 0, logits).astype(jnp.float32)  # -0 ties with 0
    bits = lax.bitcast_convert_type(numbers, jnp.uint32)
    order = jnp.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # unsigned integers in the order of the floats

    def body(i, threshold):
        higher = threshold | (np.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(order >= higher[..., None]), higher, threshold)

    threshold = lax.fori_loop(0, 32, body, jnp.zeros(logits.shape[:-1], jnp.uint32))
    return jnp.where(order >= threshold[..., None], logits, -jnp.inf)


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
