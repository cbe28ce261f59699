"""Open-MAGVIT2's tokenizer: a convolutional autoencoder whose codes are the signs of the latents."""

from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.tokenizers.conv import RULES, Convolutional, ResBlock, conv3, init, norm
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokenizers.quantize_lookup_free import SignLoss, check_bits, sign_quantise, signs_of
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Blocks, Float, Int, Metrics, Size, Tokens, Within, typed

Bits = Annotated[int, Within(1, 30)]


class Encoder(nn.Module):
    """Image to latent grid, without attention; one stride-2 convolution between levels.

    Attributes:
      features, mult, groups: as of `conv.Encoder`.
      res_blocks: residual blocks per level, and as many in the middle.
      out: channels of the result.
    """

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
            x = _blocks(self, x, f"res_{level}", self.features * mult)
            if level < len(self.mult) - 1:
                x = conv3(x.shape[-1], self.dtype, name=f"down_{level}", strides=2, padding=1)(x)
        x = _blocks(self, x, "mid", x.shape[-1])
        x = nn.silu(norm(self.groups, self.dtype, name="norm_out")(x))
        x = nn.Conv(self.out, (1, 1), kernel_init=init, dtype=self.dtype, name="conv_out")(x)
        return x.astype(jnp.float32)


class Decoder(nn.Module):
    """Latent grid to image; the mirror of `Encoder`, with norms that the latents' statistics modulate, one a level.

    Attributes: as of `Encoder`; `mult` is fine to coarse here too.
    """

    features: int
    mult: tuple[int, ...]
    res_blocks: int
    out: int
    groups: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        x = conv3(self.features * self.mult[-1], self.dtype, name="conv_in")(z)
        x = _blocks(self, x, "mid", x.shape[-1])
        for level, mult in reversed(list(enumerate(self.mult))):
            x = Modulated(self.groups, self.dtype, name=f"adaptive_{level}")(x, z)
            x = _blocks(self, x, f"res_{level}", self.features * mult)
            if level > 0:
                x = conv3(4 * x.shape[-1], self.dtype, name=f"up_{level}")(x)
                x = depth_to_space(x)
        x = nn.silu(norm(self.groups, self.dtype, name="norm_out")(x))
        return conv3(self.out, self.dtype, name="conv_out")(x).astype(jnp.float32)


class Modulated(nn.Module):
    """Group norm without parameters, scaled and shifted by what the spread and the mean of each latent channel say."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"], z: Float[Array, "b y x z"]) -> Float[Array, "b h w d"]:
        plain = nn.GroupNorm(
            self.groups, epsilon=1e-6, dtype=self.dtype, use_bias=False, use_scale=False, use_fast_variance=False
        )
        z = z.astype(jnp.float32)
        spread = jnp.sqrt(z.var((1, 2), ddof=1) + 1e-6)
        gamma, beta = (nn.Dense(x.shape[-1], kernel_init=init, name=name) for name in ("gamma", "beta"))
        scale, shift = gamma(spread)[:, None, None], beta(z.mean((1, 2)))[:, None, None]
        return (plain(x) * scale + shift).astype(x.dtype)


@typed
def depth_to_space(x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
    """Channels [4d] to two by two pixels of d: pixel (i, j) holds the channels from (2i + j) d on."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


class LookupFree(Convolutional, Quantised):
    """Image to a grid of signs and back. The defaults are Open-MAGVIT2's for 256 pixels; its other has `mult=(1, 2, 2, 4)`.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1) with at least two latents.
      features, mult, groups, channels, dtype: see `VQGAN`.
      res_blocks: residual blocks per level, and as many in the middle, of encoder and decoder.
      bits: of every sub-code of a token; their sum is the number of latent channels. One code of 2^18 is (18,); its
        generators draw (6, 12), which takes the same weights. Weights do not depend on how bits are shared out.
      lfq: weights of the quantiser's losses.
    Source: Open-MAGVIT2 (arXiv:2409.04410), MAGVIT-v2 (arXiv:2310.05737).
    """

    size: Size = (256, 256)
    features: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: Blocks = 4
    bits: tuple[Bits, ...] = (6, 12)
    groups: int = 32
    lfq: SignLoss = SignLoss()
    channels: int = 3
    dtype: Any = jnp.float32

    @property
    def spec(self) -> TokenSpec:
        check_bits(self.bits)
        if self.grid == (1, 1):
            raise ValueError(
                f"tokenizer.size is {self.size}, a single latent of {self.downsample} pixels a side; the decoder needs the "
                f"spread of at least two"
            )
        return TokenSpec(grid(*self.grid), codes=tuple(2**size for size in self.bits))

    @property
    def rules(self) -> Rules:
        return RULES[:3]  # the others are of attention

    def setup(self):
        net = {
            "features": self.features, "mult": self.mult, "res_blocks": self.res_blocks, "groups": self.groups,
            "dtype": self.dtype,
        }  # fmt: skip
        self.encoder = Encoder(out=sum(self.bits), **net)
        self.decoder = Decoder(out=self.channels, **net)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The signs of tokens; vectors in their place stay as they are."""
        return tokens if jnp.issubdtype(tokens.dtype, jnp.floating) else signs_of(tokens, self.bits)

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """What the quantiser sees."""
        return self.encoder(image)

    def pixels(self, signs: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """Images from a grid of signs."""
        return self.decoder(signs)

    def quantise(self, latents: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b k"], Metrics]:
        return sign_quantise(latents.astype(jnp.float32), self.bits, self.lfq)


def _blocks(net, x, name, features):
    for i in range(net.res_blocks):
        x = ResBlock(features, net.groups, net.dtype, bias=False, name=f"{name}_{i}")(x)
    return x
