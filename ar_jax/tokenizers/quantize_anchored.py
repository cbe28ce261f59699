"""Codebooks whose rare codes are drawn to latents."""

import jax.numpy as jnp

from ar_jax.tokenizers.quantize import distances
from ar_jax.typing import Array, Float, Int, Share, typed


@typed
def anchored(
    used: Float[Array, "v"], codes: Float[Array, "v c"], latents: Float[Array, "m c"], index: Int[Array, "m"],
    decay: Share = 0.99,
) -> tuple[Float[Array, "v"], Float[Array, "v c"]]:  # fmt: skip
    """How often codes are used on average, and codes moved to the nearest latent each, the more the rarer they are used.

    Args:
      used: share of the tokens of each code, an average over batches that this one is counted into.
      codes: the codebook, as this batch was quantised with.
      latents: of the batch.
      index: their codes.
    Source: CVQ-VAE (arXiv:2307.15139), as in TA-TiTok (arXiv:2501.07730).
    """
    share = jnp.zeros_like(used).at[index].add(1 / len(index))
    used = decay * used + (1 - decay) * share
    anchors = latents[jnp.argmin(distances(latents, codes), axis=0)]
    moved = jnp.exp(-10 * len(codes) * used / (1 - decay) - 1e-3)[:, None]
    return used, (1 - moved) * codes + moved * anchors
