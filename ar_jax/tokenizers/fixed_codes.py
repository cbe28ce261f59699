"""A convolutional autoencoder around codes that are fixed, not learned (FSQ, BSQ)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.tokenizers.conv import Convolutional, Decoder, Encoder, init
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokenizers.quantize_scalar import FSQ
from ar_jax.tokenizers.quantize_spherical import BSQ
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Blocks, Float, Int, Metrics, Size, Tokens, typed


class FixedCodes(Convolutional, Quantised):
    """Image to a grid of codes and back: the network of `VQGAN`, without its codebook.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1).
      features: channels of the finest level.
      mult: channel multiplier of each level, fine to coarse.
      res_blocks: residual blocks per encoder level; the decoder has one more.
      latent: channels between the network and the projections around the quantiser.
      quantiser: which codes there are (`FSQ`, `BSQ`), and the weights of its losses.
      groups: of the group norms.
      channels: of the image.
      dtype: of the convolutions; the quantiser is float32.
    Source: FSQ (arXiv:2309.15505), BSQ (arXiv:2406.07548), in the network of VQGAN (arXiv:2012.09841).
    """

    size: Size = (256, 256)
    features: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: Blocks = 2
    latent: int = 256
    quantiser: FSQ | BSQ = FSQ()
    groups: int = 32
    channels: int = 3
    dtype: Any = jnp.float32

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), codes=self.quantiser.codes)

    def setup(self):
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = Encoder(mult=self.mult, out=self.latent, **net)
        self.decoder = Decoder(mult=self.mult, out=self.channels, **net)
        self.quant = nn.Dense(self.quantiser.features, kernel_init=init)
        self.post_quant = nn.Dense(self.latent, kernel_init=init)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """What tokens stand for; vectors in their place stay as they are."""
        return tokens if jnp.issubdtype(tokens.dtype, jnp.floating) else self.quantiser.look_up(tokens)

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """What the quantiser sees."""
        return self.quant(self.encoder(image)).astype(jnp.float32)

    def quantise(self, latents: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b k"], Metrics]:
        return self.quantiser(latents)

    def pixels(self, codes: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """Images from a grid of codes."""
        return self.decoder(self.post_quant(codes))
