"""ViTok: a variational autoencoder of transformers, whose tokens are patches."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.vit import TurnedViT
from ar_jax.tokenizers.continuous import Measured, cells, draw, kl_divergence, noise, patchify, unpatchify
from ar_jax.tokens import Scale, TokenSpec, grid, sides
from ar_jax.typing import Array, Float, Metrics, Params, PRNGKey, Size, typed


class OfPatches:
    """What tokenizers of patches of pixels share; for modules with fields `size`, `cell`, `channels`, `encoder` and `decoder`."""

    patch = 1  # places of the latent that make a token
    last_layer = "to_pixels/kernel"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return cells(self.size, sides(self.cell))

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.decoder.rules

    def init_params(self, key: PRNGKey) -> Params:
        return self.init(key, jnp.zeros((1, *self.size, self.channels)), method="autoencode")["params"]


class ViTok(OfPatches, Measured, nn.Module):
    """Image to a grid of continuous tokens, one a patch, and back. The defaults are S-B/16: a token of 16 numbers.

    Nothing but the rotary positions knows where a patch lies, so that the same parameters serve images of other sizes. The
    published networks may also draw latents from a row of queries of any length; that is not here.

    Attributes:
      size: height and width of the images in pixels, multiples of those of `cell`.
      cell: pixels that make a token: the side of a square, or (rows, columns).
      latent: numbers of a token.
      encoder, decoder: of any widths; the published encoders have their decoder's.
      kl: weight of the posterior's divergence from a unit Gaussian in nats, a mean over all numbers of the latents.
      shift, scale: see `Measured`.
      channels: of the image.
      dtype: of the projections around the networks; the posterior is float32.
    Source: ViTok (arXiv:2501.09755); the networks are those of its author's public reimplementation.
    """

    size: Size = (256, 256)
    cell: Scale = 16
    latent: int = 16
    encoder: TurnedViT = TurnedViT(6, 768, 12)
    decoder: TurnedViT = TurnedViT(12, 768, 12)
    kl: float = 1e-3
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    channels: int = 3
    dtype: Any = jnp.float32

    draws = True
    no_decay = ("pixel_bias",)

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), channels=self.latent)

    def setup(self):
        def dense(features, out_dtype=None, bias=True):
            return Linear(features, self.dtype, out_dtype, xavier, bias=bias)

        rows, columns = sides(self.cell)
        self.patches, self.to_code = dense(self.encoder.width), dense(2 * self.latent, jnp.float32)
        self.from_code = dense(self.decoder.width)
        self.to_pixels = dense(self.channels * rows * columns, jnp.float32, bias=False)
        self.pixel_bias = self.param("pixel_bias", nn.initializers.zeros, (self.channels,))

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Float[Array, "b n c2"]:
        """Tokens of images in [-1, 1], of unit variance once measured: drawn from the posterior, or its mean without a key."""
        return self.drawn(self.moments(image), key=key)

    @typed
    def moments(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c2"]:
        """Mean and log-variance of every number of the latents, beside each other in every token; float32."""
        x = self.encoder(self.patches(patchify(image, self.cell)), self.spec.coords)
        mean, logvar = jnp.split(self.to_code(x), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, -30, 20)], axis=-1)

    def drawn(self, moments: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b n c"]:
        """Tokens of `moments`, of any float type: those that `encode` draws with this key."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return self.standardise(draw(mean, logvar, noise(mean, key)))

    @typed
    def embed(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The tokens themselves."""
        return tokens

    @typed
    def decode(self, tokens: Float[Array, "b n c"], *, key: PRNGKey | None = None) -> Float[Array, "b H W c2"]:
        """Images, about [-1, 1] but not clipped; `key` is unused."""
        return self.shown(self.restore(tokens))

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass, through a draw from the posterior, or its mean without a key.

        Returns:
          The reconstruction; the weighted losses by name; and what training may want to look at: "latents" [b h w c].
        """
        mean, logvar = jnp.split(self.moments(image), 2, axis=-1)
        latents = draw(mean, logvar, noise(mean, key))
        divergence = kl_divergence(mean, logvar).mean() / mean[0].size
        seen = {"latents": latents.reshape(len(latents), *self.grid, -1)}
        return self.shown(latents), {"kl": self.kl * divergence}, seen

    def shown(self, latents: Float[Array, "b n c"]) -> Float[Array, "b H W c2"]:
        """Images from latents as the posterior gives them."""
        x = self.decoder(self.from_code(latents), self.spec.coords)
        return unpatchify(self.to_pixels(x), self.grid, self.cell) + self.pixel_bias
