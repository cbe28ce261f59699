"""The tokenizer of MaskGIT as it was released in PyTorch: purely convolutional, with codes as wide as the network's output."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.tokenizers.conv import RULES, conv3, init, norm
from ar_jax.tokenizers.quantize import VectorLoss, codebook_init
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.typing import Array, Float, typed


class ResBlock(nn.Module):
    """norm, swish, 3x3 convolution, twice, plus the input; without biases.

    Where the number of channels changes, the branch plus its own projection: the input is dropped. That is how the
    released weights were trained.
    """

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = x
        for i in (1, 2):
            y = nn.silu(norm(self.groups, self.dtype, name=f"norm{i}")(y))
            y = conv3(self.features, self.dtype, name=f"conv{i}", use_bias=False)(y)
        if x.shape[-1] == self.features:
            return y + x
        return y + _point(self.features, self.dtype, "nin_shortcut", use_bias=False)(y)


class Encoder(nn.Module):
    """Image to latent grid, averaged two by two between levels. Attributes: as of `conv.Encoder`."""

    features: int
    mult: tuple[int, ...]
    res_blocks: int
    out: int
    groups: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w z"]:
        x = conv3(self.features, self.dtype, name="conv_in", use_bias=False)(x)
        for level, mult in enumerate(self.mult):
            x = _blocks(self, x, f"res_{level}", self.features * mult, self.res_blocks)
            if level < len(self.mult) - 1:
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = _blocks(self, x, "mid", x.shape[-1], 2)
        x = nn.silu(norm(self.groups, self.dtype, name="norm_out")(x))
        return _point(self.out, self.dtype, "conv_out")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """Latent grid to image; the mirror of `Encoder`. Attributes: as there; `mult` is fine to coarse here too."""

    features: int
    mult: tuple[int, ...]
    res_blocks: int
    out: int
    groups: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        x = conv3(self.features * self.mult[-1], self.dtype, name="conv_in")(x)
        x = _blocks(self, x, "mid", x.shape[-1], 2)
        for level, mult in reversed(list(enumerate(self.mult))):
            x = _blocks(self, x, f"res_{level}", self.features * mult, self.res_blocks)
            if level > 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = conv3(x.shape[-1], self.dtype, name=f"up_{level}")(x)
        x = nn.silu(norm(self.groups, self.dtype, name="norm_out")(x))
        return conv3(self.out, self.dtype, name="conv_out")(x).astype(jnp.float32)


class MaskgitVQGAN(VQGAN):
    """Image to a grid of codes and back. The defaults are the released model's.

    Its networks work on [0, 1]; as all tokenizers it takes and gives images in [-1, 1].

    Attributes:
      res_blocks: residual blocks per level of the encoder and of the decoder, and two more in the middle.
      latent: 0, for the quantiser has no projections around it.
      vq: the published weights, which pull codes a quarter as much as latents.
      others: see `VQGAN`.
    Source: MaskGIT (arXiv:2202.04200); RAR (arXiv:2411.00776) and TiTok (arXiv:2406.07550) build on these weights.
    """

    latent: int = 0
    codes: int = 1024
    code_features: int = 256
    l2_norm: bool = False
    vq: VectorLoss = VectorLoss(codebook=0.25, commit=1.0)

    @property
    def rules(self) -> Rules:
        return RULES[:3]  # the others are of attention

    def setup(self):
        if self.latent:
            raise ValueError(
                f"tokenizer.latent is {self.latent}, but MaskgitVQGAN has no projections around its quantiser; give 0, "
                f"and the width of a code as tokenizer.code_features"
            )
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = Encoder(mult=self.mult, out=self.code_features, **net)
        self.decoder = Decoder(mult=self.decoder_mult or self.mult, out=self.channels, **net)
        self.codebook = self.param("codebook", codebook_init(self.l2_norm), (self.codes, self.code_features))

    def latents(self, image):
        return self.encoder((image + 1) / 2)

    def pixels(self, codes):
        return 2 * self.decoder(codes) - 1


def _blocks(net, x, name, features, count):
    for i in range(count):
        x = ResBlock(features, net.groups, net.dtype, name=f"{name}_{i}")(x)
    return x


def _point(features, dtype, name, **options):
    return nn.Conv(features, (1, 1), kernel_init=init, dtype=dtype, name=name, **options)
