"""Lookup-free quantisation: a code is the signs of a latent, so there is no codebook to search or to train.

Integer codes are little-endian: channel 0 is the least significant bit. A token of k sub-codes holds the first
`bits[0]` channels in its first one, the next `bits[1]` in the second, and so on.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.tokenizers.quantize import straight_through
from ar_jax.typing import Array, Float, Int, Metrics, typed


@dataclasses.dataclass(frozen=True)
class SignLoss:
    """Weights of the training losses of lookup-free quantisation.

    Attributes:
      entropy: mean entropy of the soft assignment of a latent minus `even` times that of the mean assignment; pushes towards
        confident, even use.
      commit: pulls latents to their signs.
      temperature: of the soft assignment.
      even: weight of the second entropy beside the first.
    """

    entropy: float = 0.1
    commit: float = 0.25
    temperature: float = 0.01
    even: float = 1.0


@typed
def signs_of(tokens: Int[Array, "*b k"], bits: tuple[int, ...]) -> Float[Array, "*b c"]:
    """Signs, float32 -1 or 1, of tokens with so many bits a sub-code."""
    parts = [(tokens[..., i, None] >> np.arange(size)) & 1 for i, size in enumerate(bits)]
    return 2.0 * jnp.concatenate(parts, axis=-1) - 1.0


@typed
def tokens_of(z: Float[Array, "*b c"], bits: tuple[int, ...]) -> Int[Array, "*b k"]:
    """Tokens of latents: what is above zero is a set bit.

    Raises:
      ValueError: the latents have not as many channels as there are bits, or a sub-code does not fit int32.
    """
    check_bits(bits)
    if z.shape[-1] != sum(bits):
        raise ValueError(f"bits {bits} are {sum(bits)} channels, but the latents have {z.shape[-1]}")
    parts = jnp.split((z > 0).astype(jnp.int32), np.cumsum(bits)[:-1], axis=-1)
    return jnp.stack([(part << np.arange(part.shape[-1])).sum(-1) for part in parts], axis=-1).astype(jnp.int32)


def check_bits(bits: tuple[int, ...]) -> None:
    """Raises a ValueError if sub-codes of so many bits are no int32 tokens."""
    if not bits or min(bits) < 1 or max(bits) > 30:
        raise ValueError(
            f"bits is {bits}; it must be the bits of each sub-code, 1 to 30, so that a code fits int32 "
            f"(more in all: several sub-codes, such as (16, 16))"
        )


@typed
def sign_quantise(
    z: Float[Array, "*b c"], bits: tuple[int, ...], loss: SignLoss = SignLoss()
) -> tuple[Float[Array, "*b c"], Int[Array, "*b k"], Metrics]:
    """Replaces each latent by its signs, straight-through.

    Args:
      z: latents, not normalised.
      bits: of every sub-code; their sum is c.
      loss: weights.

    Returns:
      -1 and 1 with the gradient of z, the tokens, and the weighted losses "entropy" and "commit".
    Source: MAGVIT-v2 (arXiv:2310.05737), Open-MAGVIT2 (arXiv:2409.04410).
    """
    tokens = tokens_of(z, bits)
    signs = jnp.where(z > 0, 1.0, -1.0).astype(z.dtype)
    losses = {"commit": loss.commit * jnp.square(z - signs).mean()}
    if loss.entropy:
        sample, batch = sign_entropies(z, loss.temperature)
        losses["entropy"] = loss.entropy * (sample - loss.even * batch)
    return straight_through(z, signs), tokens, losses


@typed
def sign_entropies(
    z: Float[Array, "*b c"], temperature: float = 0.01, group: int = 0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean entropy of the soft assignment of a latent to all 2^c codes, and the entropy of its mean over latents; nats.

    The soft assignment is a softmax over 2 z.code / temperature. Its bits are independent, so that the first entropy is a sum
    over bits. The mean does not fall apart, but is exact all the same: the probabilities of the lower half of the bits and
    those of the upper half are [pixels, 2^(c/2)] each, and one product of the two sums over pixels. 2^18 codes take 1,024
    numbers a pixel and one table of 2^18, not [pixels, 2^18].

    Args:
      z: latents.
      temperature: of the softmax.
      group: bits whose joint use is measured; the second entropy is then the sum over groups of so many channels, an
        upper bound of the joint one, for codes whose table (4 * 2^c bytes) is too large. 0 is all.
    """
    z = z.reshape(-1, z.shape[-1]).astype(jnp.float32)
    logits = 4 * z / temperature
    set_, clear = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    sample = -(set_ * jax.nn.log_sigmoid(logits) + clear * jax.nn.log_sigmoid(-logits)).sum(-1).mean()
    size = group or z.shape[-1]
    parts = [(clear[:, i : i + size], set_[:, i : i + size]) for i in range(0, z.shape[-1], size)]
    return sample, sum((_entropy(_average(*part)) for part in parts), jnp.zeros(()))


def _average(clear, set_):
    """Mean probability of every code [2^c]."""
    half = -(-clear.shape[-1] // 2)
    low, high = (_products(clear[:, part], set_[:, part]) for part in (slice(half), slice(half, None)))
    return jnp.einsum("nh,nl->hl", high, low, precision=jax.lax.Precision.HIGHEST).reshape(-1) / len(clear)


def _products(clear, set_):
    """Probabilities of all settings of some bits, [n 2^c], the first the least significant."""
    every = jnp.ones((len(clear), 1))
    for pair in zip(clear.T, set_.T):
        every = jnp.concatenate([every * side[:, None] for side in pair], axis=1)
    return every


def _entropy(p):
    return -(p * jnp.log(p + 1e-5)).sum()
