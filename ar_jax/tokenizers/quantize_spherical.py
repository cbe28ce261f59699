"""Binary spherical quantisation (BSQ): a latent of length 1 becomes the nearest corner of a cube, one bit for each channel."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nets.resize import resize
from ar_jax.tokenizers.quantize import normalise, straight_through
from ar_jax.typing import Array, Bool, Float, Int, Metrics, typed

MOST = 30  # bits that an int32 index holds


@dataclasses.dataclass(frozen=True)
class SphericalLoss:
    """Weights of the training losses of BSQ. The defaults are those of the published code, which Infinity multiplies by 4."""

    commit: float = 0.25
    """Pulls latents of length 1 to their codes."""
    entropy: float = 0.1
    """Entropy of every bit minus that of its mean over the batch, by `sharpness`: confident, evenly used bits."""
    sharpness: float = 100.0
    """Of the probability of a bit, sigmoid(4 sharpness u / sqrt(channels))."""


@typed
def corner(bits: Int[Array, "*b d"] | Bool[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The code of bits: a vector of length 1, whose numbers are +-1/sqrt(d)."""
    return normalise(2 * bits.astype(jnp.float32) - 1)


@typed
def spherical_quantise(
    z: Float[Array, "*b d"], loss: SphericalLoss = SphericalLoss()
) -> tuple[Float[Array, "*b d"], Int[Array, "*b d"], Metrics]:
    """Brings each vector to length 1 and takes the signs of its numbers, straight-through.

    Args:
      z: latents, float32, of any length: how long they were is lost.
      loss: weights.

    Returns:
      The codes with the gradient of the vector of length 1, the bits (0 where a number is 0 or less), and the weighted
      losses "commit", "entropy".
    Source: BSQ (arXiv:2406.07548), as Infinity (arXiv:2412.04431) has it.
    """
    u = normalise(z)
    bits = (u > 0).astype(jnp.int32)
    code = corner(bits)
    sample, batch = bit_entropies(u, loss.sharpness)
    losses = {
        "commit": loss.commit * jnp.square(u - jax.lax.stop_gradient(code)).mean(),
        "entropy": loss.entropy * (sample - batch) / loss.sharpness,
    }
    return straight_through(u, code), bits, losses


@typed
def unlikely(u: Float[Array, "*b d"], sharpness: float = 100.0) -> Float[Array, "*b d"]:
    """Probability that a bit is 0, of vectors of length 1."""
    return jax.nn.sigmoid(-4 * sharpness / math.sqrt(u.shape[-1]) * u)


@typed
def bit_entropies(u: Float[Array, "*b d"], sharpness: float = 100.0) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Entropy in nats of all bits of a vector, mean over vectors; and that of the bits' mean probabilities."""

    def entropy(p):
        # not log(1 - p + 1e-8): compiled, that sum is reordered and may be 0
        return -sum(x * jnp.log(jnp.maximum(x, 1e-8)) for x in (p, 1 - p)).sum(-1)

    p = unlikely(u, sharpness).reshape(-1, u.shape[-1])
    return entropy(p).mean(), entropy(p.mean(0))


@typed
def index_of(bits: Int[Array, "*b d"]) -> Int[Array, "*b"]:
    """One number for all bits, 0..2^d - 1; the first bit is the most significant.

    Raises:
      ValueError: there are too many for int32.
    """
    return (bits * _places(bits.shape[-1])).sum(-1).astype(jnp.int32)


@typed
def bits_of(index: Int[Array, "*b"], count: int) -> Int[Array, "*b d"]:
    """The bits of a number, so many; the inverse of `index_of`."""
    return (index[..., None] // _places(count) % 2).astype(jnp.int32)


def _places(count):
    if count > MOST:
        raise ValueError(f"{count} bits are no int32 index, which holds {MOST}; keep the bits apart (joint False)")
    return 2 ** np.arange(count, dtype=np.int32)[::-1]


class Described(NamedTuple):
    """What `residual_spherical_quantise` says of a map, scale by scale.

    Attributes:
      total: [b h w d], the sum of all parts.
      bits: int32 [b h w d] of every scale.
      sums: [b h w d] after every scale.
      latents: [b h w d], what the bits of every scale stand for, of length 1.
      losses: weighted, by name, means over the scales.
    """

    total: Array
    bits: list[Array]
    sums: list[Array]
    latents: list[Array]
    losses: Metrics


def residual_spherical_quantise(
    latents: Float[Array, "b h w d"],
    sizes: tuple[tuple[int, int], ...],
    loss: SphericalLoss = SphericalLoss(),
    detach: bool = True,
    flips: list[Bool[Array, "b h w d"]] | None = None,
    kept: Float[Array, "l"] | None = None,
) -> Described:
    """Describes a map as a sum: every scale takes the bits, in its size, of what the scales before it left over.

    Codes have length 1 on every scale and are enlarged linearly; nothing smooths them.

    Args:
      latents: the map, float32.
      sizes: height and width of every scale.
      loss: weights.
      detach: what is left over is taken without the gradient of the parts before; the released training does not.
      flips: bits that are added wrongly, of every scale: later bits then correct the mistakes (bitwise self-correction).
        The bits returned are the right ones.
      kept: 1 for scales that count, 0 for those that add nothing and have no loss.
    Source: Infinity (arXiv:2412.04431); what its training adds up is known from copies of its code.
    """
    full = latents.shape[1:3]
    rest, total = latents, jnp.zeros_like(latents)
    bits, sums, units, losses = [], [], [], []
    for level, size in enumerate(sizes):
        z = resize(rest, size, "area")
        code, right, some = spherical_quantise(z, loss)
        if flips is not None:
            code = corner(right ^ flips[level].astype(jnp.int32))
        part = resize(code, full, "linear")
        part = part if kept is None else kept[level] * part
        total = total + part
        rest = rest - (jax.lax.stop_gradient(part) if detach else part)
        bits.append(right)
        sums.append(total)
        units.append(normalise(z))
        losses.append(some)
    share = jnp.ones(len(sizes)) if kept is None else kept
    losses = {name: (jnp.stack([some[name] for some in losses]) * share).sum() / share.sum() for name in losses[0]}
    return Described(total, bits, sums, units, losses)


@typed
def flipped(uniform: Float[Array, "b h w d"], percent: Int[Array, ""] | int) -> Bool[Array, "b h w d"]:
    """Which bits of a scale are added wrongly: each with a probability in percent, which one scale of a batch shares.

    Infinity draws it evenly from 0..30.
    """
    return uniform < jnp.asarray(percent, jnp.float32) / 100


@dataclasses.dataclass(frozen=True)
class BSQ:
    """Binary spherical quantisation as the quantiser of a tokenizer (`fixed_codes.FixedCodes`).

    Source: BSQ (arXiv:2406.07548).
    """

    bits: int = 18
    """Channels of a latent."""
    joint: bool = False
    """One code for all bits, the first the most significant; else every bit is a sub-code."""
    loss: SphericalLoss = SphericalLoss()

    def __post_init__(self):
        if self.bits < 1:
            raise ValueError(f"quantiser.bits is {self.bits}; there must be one at least")
        if self.joint:
            _places(self.bits)

    @property
    def features(self) -> int:
        """Channels of a latent."""
        return self.bits

    @property
    def codes(self) -> tuple[int, ...]:
        """Sizes of the sub-codes."""
        return (2**self.bits,) if self.joint else (2,) * self.bits

    def __call__(self, z: Float[Array, "*b d"]) -> tuple[Float[Array, "*b d"], Int[Array, "*b k"], Metrics]:
        """Codes with the gradient of z, tokens, weighted losses by name."""
        codes, bits, losses = spherical_quantise(z, self.loss)
        return codes, index_of(bits)[..., None] if self.joint else bits, losses

    def look_up(self, tokens: Int[Array, "*b k"]) -> Float[Array, "*b d"]:
        """What tokens stand for."""
        return corner(bits_of(tokens[..., 0], self.bits) if self.joint else tokens)
