"""Variational autoencoders: an image to a grid of continuous tokens, and back."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.tokenizers.continuous import Measured, cells, draw, kl_divergence, noise, patchify, unpatchify
from ar_jax.tokenizers.conv import Convolutional, Decoder, Encoder, init
from ar_jax.tokens import Scale, TokenSpec, grid, sides
from ar_jax.typing import Array, Blocks, Float, Level, Metrics, PRNGKey, Size, typed


class KLVAE(Measured, Convolutional, nn.Module):
    """A convolutional autoencoder with a Gaussian posterior at every place. The defaults are KL-16.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1) times those of `patch`.
      features: channels of the finest level.
      mult: channel multiplier of each level, fine to coarse.
      res_blocks: residual blocks per encoder level; the decoder has one more.
      latent: channels of the latent.
      patch: latent places that make a token: the side of a square, or (rows, columns).
      groups: of the group norms.
      kl: weight of the posterior's divergence from a unit Gaussian in nats, against the sum of squares (or magnitudes)
        of all pixel values, as LDM counts it.
      shift, scale: see `Measured`; of latent channels.
      channels: of the image.
      encoder_attention, decoder_attention: levels with attention blocks, see `conv.Encoder`.
      dtype: of the convolutions; the posterior is float32.
    Source: LDM (arXiv:2112.10752), with the sizes of MAR (arXiv:2406.11838).
    """

    size: Size = (256, 256)
    features: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: Blocks = 2
    latent: int = 16
    patch: Scale = 1
    groups: int = 32
    kl: float = 1e-6
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    channels: int = 3
    encoder_attention: tuple[Level, ...] = (-1,)
    decoder_attention: tuple[Level, ...] = ()
    dtype: Any = jnp.float32

    draws = True

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return cells(self.size, tuple(self.downsample * side for side in sides(self.patch)))

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), channels=self.latent * math.prod(sides(self.patch)))

    def setup(self):
        net = {"features": self.features, "mult": self.mult, "res_blocks": self.res_blocks, "groups": self.groups}
        self.encoder = Encoder(out=2 * self.latent, dtype=self.dtype, attention=self.encoder_attention, **net)
        self.decoder = Decoder(out=self.channels, dtype=self.dtype, attention=self.decoder_attention, **net)
        self.quant = nn.Dense(2 * self.latent, kernel_init=init)
        self.post_quant = nn.Dense(self.latent, kernel_init=init)

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Float[Array, "b n c2"]:
        """Tokens of images in [-1, 1], of unit variance once measured: drawn from the posterior, or its mean without a key."""
        return self.tokens_of(*self.posterior(image), key)

    def moments(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c2"]:
        """Mean and log-variance of every number of the latents, beside each other in every token."""
        return jnp.concatenate([patchify(x, self.patch) for x in self.posterior(image)], axis=-1)

    def drawn(self, moments: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b n c"]:
        """Tokens of `moments`, of any float type: those that `encode` draws with this key."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return self.tokens_of(*(unpatchify(x, self.grid, self.patch) for x in (mean, logvar)), key)

    def tokens_of(
        self, mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"], key: PRNGKey | None
    ) -> Float[Array, "b n c2"]:
        return patchify(self.standardise(draw(mean, logvar, noise(mean, key))), self.patch)

    @typed
    def embed(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The tokens themselves."""
        return tokens

    @typed
    def decode(self, tokens: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b H W c"]:
        """Images, about [-1, 1] but not clipped; `key` is unused."""
        return self.pixels(self.restore(unpatchify(tokens, self.grid, self.patch)))

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass, through a draw from the posterior, or its mean without a key.

        Returns:
          The reconstruction; the weighted losses by name; and what training may want to look at: "latents" [b h w c].
        """
        mean, logvar = self.posterior(image)
        latents = draw(mean, logvar, noise(mean, key))
        divergence = kl_divergence(mean, logvar).mean()
        return self.pixels(latents), {"kl": self.kl * divergence / image[0].size}, {"latents": latents}

    def posterior(self, image: Float[Array, "b H W c"]) -> tuple[Float[Array, "b h w c2"], Float[Array, "b h w c2"]]:
        """Mean and log-variance of every latent number, float32."""
        mean, logvar = jnp.split(self.quant(self.encoder(image)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def pixels(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W c2"]:
        """Images from latents as the posterior gives them."""
        return self.decoder(self.post_quant(latents))
