"""ViT-VQGAN: transformers around one codebook."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.vit import ViT
from ar_jax.tokenizers.continuous import patchify, unpatchify
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, codebook_init, look_up, normalise, vector_quantise
from ar_jax.tokenizers.vitok import OfPatches
from ar_jax.tokens import Scale, TokenSpec, grid, sides
from ar_jax.typing import Array, Float, Int, Metrics, Size, Tokens, typed


class ViTVQGAN(OfPatches, Quantised):
    """Image to a grid of codes, one a patch, and back. The defaults are ViT-VQGAN-Small; it works at one size only.

    Attributes:
      size: height and width of the images in pixels, multiples of those of `cell`.
      cell: pixels that make a token: the side of a square, or (rows, columns).
      encoder, decoder: with learned positions before them. After each comes a perceptron with a tanh, as wide inside as those
        of the network.
      codes: size of the codebook.
      code_features: width of a code.
      l2_norm: latents and codes are normalised at every use, so search is by cosine.
      vq: weights of the quantiser's losses.
      channels: of the image.
      dtype: of the projections around the networks; the quantiser is float32.
    Source: ViT-VQGAN (arXiv:2110.04627). Neither code nor weights are published; what is not said of the network (initial
    values, where positions are added in the decoder) is a proposal.
    """

    size: Size = (256, 256)
    cell: Scale = 8
    encoder: ViT = ViT(8, 512, 8)
    decoder: ViT = ViT(8, 512, 8)
    codes: int = 8192
    code_features: int = 32
    l2_norm: bool = True
    vq: VectorLoss = VectorLoss()
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook("codebook"),)

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), codes=(self.codes,))

    def setup(self):
        def dense(features, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, xavier, bias=True)

        def places(name, net):
            return self.param(f"{name}_positions", nn.initializers.normal(0.02), (self.spec.n, net.width))

        def inside(net):
            return dense(net.hidden or 4 * net.width)

        rows, columns = sides(self.cell)
        self.patches, self.from_code = dense(self.encoder.width), dense(self.decoder.width)
        self.encoder_positions, self.decoder_positions = (
            places("encoder", self.encoder),
            places("decoder", self.decoder),
        )
        self.code_hidden, self.to_code = inside(self.encoder), dense(self.code_features, jnp.float32)
        self.pixel_hidden, self.to_pixels = inside(self.decoder), dense(self.channels * rows * columns, jnp.float32)
        self.codebook = self.param("codebook", codebook_init(self.l2_norm), (self.codes, self.code_features))

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The (normalised) codes of tokens; vectors in their place stay as they are."""
        return look_up(self._codes(), tokens)

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """What the quantiser sees, before any normalisation."""
        x = self.patches(patchify(image, self.cell))
        x = self.encoder(x + self.encoder_positions.astype(x.dtype))
        return self.to_code(jnp.tanh(self.code_hidden(x))).reshape(len(x), *self.grid, -1)

    def quantise(
        self, latents: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Int[Array, "b h w"], Metrics]:
        return vector_quantise(normalise(latents) if self.l2_norm else latents, self._codes(), self.vq)

    def pixels(self, codes: Float[Array, "b h w c"]) -> Float[Array, "b H W rgb"]:
        x = self.from_code(codes).reshape(len(codes), self.spec.n, -1)
        x = self.decoder(x + self.decoder_positions.astype(x.dtype))
        return unpatchify(self.to_pixels(jnp.tanh(self.pixel_hidden(x))), self.grid, self.cell)

    def _codes(self):
        return normalise(self.codebook) if self.l2_norm else self.codebook
