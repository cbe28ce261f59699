"""The VQGAN-LC tokenizer: a hundred thousand features of a frozen network as codebook, of which a projection is trained."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from ar_jax.tokenizers.conv import Decoder, Encoder, init
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, normalise
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.typing import Array, Float, Level


class VQGANLC(VQGAN):
    """Image to a grid of codes and back. The defaults are the released model's.

    Codes are a linear projection of features that are never trained, so that all of them move in every update, and all are
    used. They begin as `python -m ar_jax.codebook` makes them of a teacher (`tokenizer.start` takes its folder); without it
    as random numbers.

    Attributes:
      feature_width: of the frozen features.
      attention: levels with attention blocks, see `conv.Encoder`.
      vq: the published weights, 0.33 and 1, times 0.1 of their sum.
      others: see `VQGAN`.
    Source: VQGAN-LC (arXiv:2406.11837).
    """

    codes: int = 100_000
    l2_norm: bool = False
    vq: VectorLoss = VectorLoss(codebook=0.033, commit=0.1)
    feature_width: int = 768
    attention: tuple[Level, ...] = (-1,)

    codebooks = (Codebook(""),)

    def setup(self):
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = Encoder(mult=self.mult, out=self.latent, attention=self.attention, **net)
        self.decoder = Decoder(mult=self.decoder_mult or self.mult, out=self.channels, attention=self.attention, **net)
        self.quant = nn.Dense(self.code_features, kernel_init=init)
        self.post_quant = nn.Dense(self.latent, kernel_init=init)
        random = nn.initializers.normal(self.code_features**-0.5)
        self.projector = nn.Dense(self.code_features, kernel_init=random, precision=lax.Precision.HIGHEST)
        self.frozen = self.param("frozen", nn.initializers.normal(1.0), (self.codes, self.feature_width))

    def _codes(self) -> Float[Array, "v c"]:
        codes = self.projector(lax.stop_gradient(jnp.asarray(self.frozen, jnp.float32)))
        return normalise(codes) if self.l2_norm else codes
