"""Quantisers as pure functions over codebooks."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ar_jax.typing import Array, Float, Int, Metrics, typed


@typed
def normalise(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """x / max(|x|, 1e-12) along the last axis."""
    # The inner maximum keeps the gradient of the root finite at zero.
    return x / jnp.maximum(jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-30)), 1e-12)


@typed
def distances(z: Float[Array, "*b c"], codebook: Float[Array, "v c"]) -> Float[Array, "*b v"]:
    """Squared Euclidean distance to every code, float32."""
    dots = jnp.einsum("...c,vc->...v", z, codebook, precision=lax.Precision.HIGHEST)
    return jnp.square(z).sum(-1, keepdims=True) + jnp.square(codebook).sum(-1) - 2 * dots


def straight_through(z, code):
    """`code` in the forward pass, the gradient of `z` in the backward pass."""
    return z + lax.stop_gradient(code - z)


@dataclasses.dataclass(frozen=True)
class VectorLoss:
    """Weights of the training losses of vector quantisation.

    Attributes:
      codebook: pulls codes to the latents.
      commit: pulls latents to their codes.
      entropy: sample entropy minus batch entropy of the soft assignment; pushes towards confident, even use.
      temperature: of that soft assignment.
    """

    codebook: float = 1.0
    commit: float = 0.25
    entropy: float = 0.0
    temperature: float = 0.01


@typed
def vector_quantise(
    z: Float[Array, "*b c"], codebook: Float[Array, "v c"], loss: VectorLoss = VectorLoss()
) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
    """Replaces each vector by its nearest code (the first of equals), straight-through.

    Args:
      z: latents; normalise both arguments beforehand for cosine search.
      codebook: codes.
      loss: weights.

    Returns:
      The codes with the gradient of z, their indices, and the weighted losses "codebook", "commit", "entropy".
    Source: VQ-VAE (arXiv:1711.00937); entropy term as in LlamaGen (arXiv:2406.06525).
    """
    distance = distances(z, codebook)
    index = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    code = codebook[index]
    losses = {
        "codebook": loss.codebook * jnp.square(code - lax.stop_gradient(z)).mean(),
        "commit": loss.commit * jnp.square(lax.stop_gradient(code) - z).mean(),
    }
    if loss.entropy:
        losses["entropy"] = loss.entropy * _entropy_loss(-distance / loss.temperature)
    return straight_through(z, code), index, losses


def _entropy_loss(affinity):
    affinity = affinity.reshape(-1, affinity.shape[-1])
    p = jax.nn.softmax(affinity)
    sample = -(p * jax.nn.log_softmax(affinity + 1e-5)).sum(-1).mean()
    average = p.mean(0)
    return sample + (average * jnp.log(average + 1e-5)).sum()


@typed
def usage(index: Int[Array, "*b"], codes: int) -> Metrics:
    """How a batch uses its codebook.

    Returns:
      "usage", the share of codes that occur, and "code_perplexity", exp of the entropy of their frequencies (1..codes).
    """
    frequency = jnp.bincount(index.reshape(-1), length=codes) / index.size
    entropy = -(frequency * jnp.log(jnp.maximum(frequency, 1e-30))).sum()
    return {"usage": (frequency > 0).mean(), "code_perplexity": jnp.exp(entropy)}
