"""The Bernoulli autoencoder: a latent of bits, each drawn with a probability of its own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.machine import shares
from ar_jax.tokenizers.conv import Convolutional, Decoder, Encoder, init, norm
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokenizers.quantize_lookup_free import check_bits
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Blocks, Float, Int, Level, Metrics, PRNGKey, Size, Tokens, typed


class BinaryAutoencoder(Convolutional, Quantised):
    """Image to a grid of bits and back; a token stands for the sum of its set bits' vectors.

    Every bit is a sub-code, or several together are one (`parts`).

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1).
      features: channels of the finest level.
      mult: channel multiplier of each level, fine to coarse.
      res_blocks: residual blocks per level of the encoder.
      decoder_blocks: of the decoder; 0 is as many.
      latent: channels between the network and the bits.
      bits: of a token.
      parts: how many bits each sub-code has, the first the most significant; () gives each bit a sub-code of its own.
      attention: levels with attention blocks, see `conv.Encoder`.
      groups: of the group norms.
      norm_first: the decoder begins with one.
      deterministic: bits are never drawn: 1 where that is likelier. Else training draws them, and `encode` with a key.
      unit: inside, images lie in [0, 1], not in [-1, 1]: ELM's form.
      code_weight: of the mean of s (1 - s), s the logistic function of a bit's probability: as published, where it hardly acts.
      channels: of the image.
      dtype: of the convolutions; bits are found in float32.
    Source: Binary Latent Diffusion (arXiv:2304.04820); with `unit`, the tokenizer of ELM (arXiv:2410.16257).
    """

    size: Size = (256, 256)
    features: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    decoder_blocks: Blocks = 0
    latent: int = 256
    bits: int = 64
    attention: tuple[Level, ...] = (-1,)
    groups: int = 32
    norm_first: bool = True
    deterministic: bool = False
    unit: bool = False
    code_weight: float = 0.0
    parts: tuple[int, ...] = ()
    channels: int = 3
    dtype: Any = jnp.float32

    @property
    def spec(self) -> TokenSpec:
        if self.bits < 1 or self.res_blocks < 1:
            raise ValueError(
                f"tokenizer.bits is {self.bits} and tokenizer.res_blocks {self.res_blocks}; both must be 1 or more"
            )
        if self.parts:
            check_bits(self.parts)
            if sum(self.parts) != self.bits:
                raise ValueError(
                    f"tokenizer.parts is {self.parts}; its sum must be tokenizer.bits, which is {self.bits}"
                )
        return TokenSpec(grid(*self.grid), codes=tuple(2**size for size in self.parts) or (2,) * self.bits)

    def setup(self):
        net = {"mult": self.mult, "features": self.features, "groups": self.groups, "attention": self.attention}
        net |= {"dtype": self.dtype, "last_silu": False}
        self.encoder = Encoder(out=self.latent, res_blocks=self.res_blocks, **net)
        self.decoder = Decoder(out=self.channels, res_blocks=(self.decoder_blocks or self.res_blocks) - 1, **net)
        self.quant = nn.Dense(self.bits, kernel_init=init)
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (self.bits, self.latent))
        if self.norm_first:
            self.norm = norm(self.groups, self.dtype, None)

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n k"]:
        """Tokens of images in [-1, 1], with bits that are drawn with a key, else the likelier ones."""
        return self._tokens(self.drawn_bits(self.probabilities(image), key))

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """Sums of the vectors of the bits that are set; vectors in their place stay as they are."""
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return tokens
        return self.summed((bits_of(tokens, self.parts) if self.parts else tokens).astype(jnp.float32))

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass, with drawn bits, or the likelier ones without a key; gradients pass to their probabilities.

        Returns:
          The reconstruction; the weighted losses by name; and what training may want to look at: "latents" [b h w k], the
          probabilities, and "tokens" as of `encode`.
        """
        p = self.probabilities(image)
        bits = self.drawn_bits(p, key)
        seen = {"latents": p, "tokens": self._tokens(bits)}
        return self.pixels(self.summed(bits + p - lax.stop_gradient(p))), {"code": self.code_weight * penalty(p)}, seen

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """What the probabilities are made of."""
        return self.encoder((image + 1) / 2 if self.unit else image)

    def probabilities(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w k"]:
        """That bits are 1, float32."""
        return jax.nn.sigmoid(self.quant(self.latents(image)).astype(jnp.float32))

    def drawn_bits(self, p: Float[Array, "b h w k"], key: PRNGKey | None) -> Float[Array, "b h w k"]:
        """Bits as float32, without a gradient."""
        if key is None or self.deterministic:
            return (p > 0.5).astype(jnp.float32)
        return (shares.draw(jax.random.uniform, key, p.shape) < p).astype(jnp.float32)

    def _tokens(self, bits: Float[Array, "b h w c"]) -> Int[Array, "b n k"]:
        """Tokens of bits as float32."""
        bits = bits.reshape(len(bits), -1, self.bits).astype(jnp.int32)
        return codes_of(bits, self.parts) if self.parts else bits

    def summed(self, bits: Float[Array, "*b k"]) -> Float[Array, "*b c"]:
        return jnp.matmul(bits, self.embedding, precision=lax.Precision.HIGHEST)

    def pixels(self, codes: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """Images from a grid of sums of vectors."""
        image = self.decoder(self.norm(codes) if self.norm_first else codes)
        return 2 * image - 1 if self.unit else image


@typed
def codes_of(bits: Int[Array, "*b c"], parts: tuple[int, ...]) -> Int[Array, "*b k"]:
    """Sub-codes of so many bits each, the first the most significant."""
    each = jnp.split(bits, np.cumsum(parts)[:-1], axis=-1)
    return jnp.stack([(part << np.arange(size)[::-1]).sum(-1) for part, size in zip(each, parts)], -1).astype(jnp.int32)


@typed
def bits_of(tokens: Int[Array, "*b k"], parts: tuple[int, ...]) -> Int[Array, "*b c"]:
    """Bits of sub-codes; the inverse of `codes_of`."""
    return jnp.concatenate([tokens[..., i, None] >> np.arange(size)[::-1] & 1 for i, size in enumerate(parts)], -1)


@typed
def penalty(p: Float[Array, "*b"]) -> Float[Array, ""]:
    """Mean of s (1 - s), s the logistic function of probabilities."""
    s = jax.nn.sigmoid(p)
    return (s * (1 - s)).mean()
