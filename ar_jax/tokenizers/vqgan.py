"""The VQGAN tokenizer: a convolutional autoencoder around one codebook."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.tokenizers.conv import Convolutional, Decoder, Encoder, init
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, codebook_init, look_up, normalise, vector_quantise
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Blocks, Float, Int, Layers, Metrics, Size, Tokens, typed


class VQGAN(Convolutional, Quantised):
    """Image to a grid of codes and back. The defaults are LlamaGen's VQ-16; VQ-8 has `mult=(1, 2, 2, 4)`.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1).
      features: channels of the finest level.
      mult: channel multiplier of each encoder level, fine to coarse; the decoder mirrors it.
      decoder_mult: the decoder's, if it differs; empty takes `mult`.
      res_blocks: residual blocks per encoder level; the decoder has one more.
      latent: channels between the network and the projections around the quantiser.
      codes: size of the codebook.
      code_features: width of a code.
      groups: of the group norms.
      l2_norm: latents and codes are normalised at every use, so search is by cosine.
      vq: weights of the quantiser's losses.
      channels: of the image.
      dtype: of the convolutions; the quantiser is float32.
    Source: VQGAN (arXiv:2012.09841), LlamaGen (arXiv:2406.06525).
    """

    size: Size = (256, 256)
    features: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_mult: tuple[Layers, ...] = ()
    res_blocks: Blocks = 2
    latent: int = 256
    codes: int = 16384
    code_features: int = 8
    groups: int = 32
    l2_norm: bool = True
    vq: VectorLoss = VectorLoss()
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook("codebook"),)

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), codes=(self.codes,))

    def setup(self):
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = Encoder(mult=self.mult, out=self.latent, **net)
        self.decoder = Decoder(mult=self.decoder_mult or self.mult, out=self.channels, **net)
        self.quant = nn.Dense(self.code_features, kernel_init=init)
        self.post_quant = nn.Dense(self.latent, kernel_init=init)
        self.codebook = self.param("codebook", codebook_init(self.l2_norm), (self.codes, self.code_features))

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The (normalised) codes of tokens; vectors in their place stay as they are."""
        return look_up(self._codes(), tokens)

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """What the quantiser sees, before any normalisation."""
        return self.quant(self.encoder(image))

    def quantise(self, latents: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
        z = latents.astype(jnp.float32)
        return vector_quantise(normalise(z) if self.l2_norm else z, self._codes(), self.vq)

    def pixels(self, codes: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """Images from a grid of code vectors."""
        return self.decoder(self.post_quant(codes))

    def _codes(self):
        return normalise(self.codebook) if self.l2_norm else self.codebook
