"""Attention decided by integers: every row carries the step at which its token becomes known."""

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.typing import Array, Bool, Float, Index, Int, typed

PADDING = np.int32(-(2**30))  # step of padded caption rows and of cache rows not written yet


@typed
def visible(query_step: Int[Array, "#B q"], key_step: Int[Array, "#B r"], first: Index = 0) -> Bool[Array, "#B q r"]:
    """Which rows a row may see: those whose step is not later, and always itself.

    Args:
      query_step: steps of the querying rows.
      key_step: steps of all rows; nobody sees a row whose step is `PADDING`.
      first: place of the first querying row among all rows.
    """
    past = (key_step[:, None, :] <= query_step[:, :, None]) & (key_step > PADDING)[:, None, :]
    own = first + np.arange(query_step.shape[1])[:, None] == np.arange(key_step.shape[1])
    return past | own


@typed
def attend(
    q: Float[Array, "B h q e"], k: Float[Array, "B h r e"], v: Float[Array, "B h r e"], mask: Bool[Array, "#B q r"]
) -> Float[Array, "B h q e"]:
    """Scaled dot-product attention with a float32 softmax."""
    logits = jnp.einsum("bhqe,bhre->bhqr", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf))
    return jnp.einsum("bhqr,bhre->bhqe", weights.astype(v.dtype), v)
