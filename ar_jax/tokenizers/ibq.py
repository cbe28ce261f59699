"""IBQ's tokenizer: a VQGAN with attention whose codes are chosen by inner product, with gradients through the index."""

import flax.linen as nn

from ar_jax.tokenizers.conv import Decoder, Encoder, init
from ar_jax.tokenizers.quantize_index import IndexLoss, index_quantise
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.typing import Array, Blocks, Float, Int, Level, Metrics, typed


class IBQ(VQGAN):
    """Image to a grid of codes and back. The defaults are the released model's of 2^18 codes for 256 pixels.

    Attributes:
      attention: levels with an attention block after each residual block, 0 the finest, -1 the coarsest.
      l2_norm: False, for codes are chosen by their inner product with the latent as they are.
      vq: weights of the quantiser's losses.
      others: see `VQGAN`.
    Source: IBQ (arXiv:2412.02692).
    """

    res_blocks: Blocks = 4
    codes: int = 2**18
    code_features: int = 256
    l2_norm: bool = False
    vq: IndexLoss = IndexLoss()
    attention: tuple[Level, ...] = (-1,)

    def setup(self):
        if self.l2_norm:
            raise ValueError("tokenizer.l2_norm is True, but IBQ takes latents and codes as they are; give False")
        net = {
            "features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype,
            "attention": self.attention,
        }  # fmt: skip
        self.encoder = Encoder(mult=self.mult, out=self.latent, **net)
        self.decoder = Decoder(mult=self.decoder_mult or self.mult, out=self.channels, **net)
        self.quant = nn.Dense(self.code_features, kernel_init=init)
        self.post_quant = nn.Dense(self.latent, kernel_init=init)
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (self.codes, self.code_features))

    @typed
    def quantise(self, latents: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
        return index_quantise(latents.astype("float32"), self.codebook, self.vq)
