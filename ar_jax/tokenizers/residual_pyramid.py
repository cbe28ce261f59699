"""The residual pyramid: a convolutional autoencoder around one codebook that describes the latent scale by scale."""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.nets.resize import resize, touched
from ar_jax.tokenizers.conv import Convolutional, Decoder, Encoder, init
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, codebook_init, look_up, residual_quantise
from ar_jax.tokens import Scale, TokenSpec, maps, pyramid, rows, sides
from ar_jax.typing import Array, Blocks, Bool, Float, Index, Int, Metrics, PRNGKey, Share, Size, Tokens, typed

Held = tuple[Array, Array]
HELD = ("context", "decode", "decode_until")  # methods that take it


class Summed:
    """What tokenizers share whose latent is a sum over scales; for modules with `spec`, `grid`, `embed`, `part` and `pixels`."""

    shrunk = "area"  # how a sum is brought to the size of the next scale

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every scale's map of codes."""
        return self.spec.scales

    def maps(self, codes: Float[Array, "b n c"]) -> list[Float[Array, "b h w d"]]:
        """Codes of the first scales' tokens, as maps."""
        return maps(codes, self.spec.scales)

    def rows(self, maps: list[Float[Array, "b h w d"]]) -> Float[Array, "b n c"]:
        """The inverse of `maps`."""
        return rows(maps)

    @typed
    def context(self, tokens: Tokens, held: Held | None = None) -> Float[Array, "b n c"]:
        """What is known of every slot from coarser scales: their sum in its scale's size; zeros on the first scale.

        A level depends on the tokens of the levels before it only, so later ones may be anything.

        Args:
          held: tokens of another image, and bool [b h w], the cells of the latent in which they do not count.
        """
        sizes, sums = self.sizes, self.sums(tokens, held)
        start = jnp.zeros((len(tokens), *sizes[0], sums[0].shape[-1]))
        return self.rows([start, *(resize(x, size, self.shrunk) for x, size in zip(sums, sizes[1:]))])

    @typed
    def own(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """What every slot's own scale adds to the latent, in that scale's size; depends on no other scale."""
        return self.rows([resize(x, size, self.shrunk) for x, size in zip(self.parts(tokens), self.sizes)])

    @typed
    def decode(
        self, tokens: Tokens, held: Held | None = None, *, key: PRNGKey | None = None
    ) -> Float[Array, "b H W rgb"]:
        """Images in [-1, 1], from the tokens of all scales or of the first few; `held` as in `context`, `key` is unused."""
        return jnp.clip(self.pixels(self.sums(tokens, held)[-1]), -1, 1)

    @typed
    def decode_until(self, tokens: Tokens, level: Index, held: Held | None = None) -> Float[Array, "b H W rgb"]:
        """What `decode` gives of the scales up to a level; later tokens may be anything."""
        return jnp.clip(self.pixels(jnp.stack(self.sums(tokens, held))[level]), -1, 1)

    @nn.nowrap
    def held(self, frozen: Callable, tokens: Tokens, free: Bool[Array, "b H W"]) -> Callable:
        """The frozen tokenizer with the latent of `tokens` wherever no pixel is free (see `decode.edit`)."""
        cells = touched(free, self.grid)

        def call(*arguments, method):
            return frozen(*arguments, *([(tokens, cells)] if method in HELD else []), method=method)

        return call

    def parts(self, tokens: Tokens) -> list[Float[Array, "b h w c"]]:
        """What each of the first scales, whose tokens are given, adds to the latent."""
        return [self.part(level, codes) for level, codes in enumerate(self.maps(self.embed(tokens)))]

    def sums(self, tokens: Tokens, held: Held | None = None) -> list[Float[Array, "b h w c"]]:
        """The latent as it is known after each of the first scales, whose tokens are given."""
        sums = list(itertools.accumulate(self.parts(tokens)))
        if held is None:
            return sums
        others, free = held
        return [jnp.where(free[..., None], own, other) for own, other in zip(sums, self.sums(others))]


class ResidualPyramid(Summed, Convolutional, nn.Module):
    """Image to grids of codes, coarse to fine, and back. The defaults are VAR's tokenizer for 256 pixels.

    The latent is a sum over scales: each adds its codes, enlarged to the size of the latent and smoothed by a
    convolution. So the first scales are an image too, and what is known of it so far (`context`) predicts the next.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels of `mult` - 1).
      scales: sides, or pairs (height, width), coarse to fine; the last is the size of the latent. Parameters serve any
        list (with `smoothers` 0, any of the same length).
      features: channels of the finest level.
      mult: channel multiplier of each encoder level, fine to coarse; the decoder mirrors it.
      res_blocks: residual blocks per encoder level; the decoder has one more.
      codes: size of the codebook, which all scales share.
      code_features: width of a code, and of the latent.
      kernel: side of the convolutions around the quantiser.
      smoothers: convolutions that smooth enlarged codes, each serving neighbouring scales; 0 is one for every scale.
      smoothing: their share in what is added, 0..1.
      groups: of the group norms.
      cosine: codes are searched by angle.
      vq: weights of the quantiser's losses.
      channels: of the image.
      dtype: of the encoder and decoder; the quantiser is float32.
    Source: VAR (arXiv:2404.02905).
    """

    size: Size = (256, 256)
    scales: tuple[Scale, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    features: int = 160
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: Blocks = 2
    codes: int = 4096
    code_features: int = 32
    kernel: int = 3
    smoothers: Blocks = 4
    smoothing: Share = 0.5
    groups: int = 32
    cosine: bool = False
    vq: VectorLoss = VectorLoss()
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook("codebook"),)

    @property
    def spec(self) -> TokenSpec:
        if not self.scales or sides(self.scales[-1]) != self.grid:
            raise ValueError(
                f"tokenizer.scales is {self.scales}, but its last one must be the latent's {self.grid}: images of "
                f"{self.size} pixels divided by {self.downsample}"
            )
        return TokenSpec(pyramid(self.scales), codes=(self.codes,))

    def setup(self):
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = Encoder(mult=self.mult, out=self.code_features, **net)
        self.decoder = Decoder(mult=self.mult, out=self.channels, **net)
        self.quant = nn.Conv(self.code_features, (self.kernel, self.kernel), kernel_init=init)
        self.post_quant = nn.Conv(self.code_features, (self.kernel, self.kernel), kernel_init=init)
        self.smooth = Smooth(self.smoothers or len(self.scales))
        self.codebook = self.param("codebook", codebook_init(l2_norm=False), (self.codes, self.code_features))

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n 1"]:
        """Codes of images in [-1, 1], of all scales; `key` is unused, the codes are deterministic."""
        _, index, _, _ = self.quantise(self.latents(image))
        return index[..., None]

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The codes of tokens, without what other scales add; vectors in their place stay as they are."""
        return look_up(self.codebook, tokens)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; `key` is unused.

        Returns:
          The reconstruction, not clipped; the weighted losses of the quantiser by name; and what training may want to
          look at: "latents" [b n c], what each slot's code stands for, and "tokens" as of `encode`.
        """
        total, index, latents, losses = self.quantise(self.latents(image))
        return self.pixels(total), losses, {"latents": latents, "tokens": index[..., None]}

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """What the quantiser sees."""
        return self.quant(self.encoder(image)).astype(jnp.float32)

    def quantise(
        self, latents: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Int[Array, "b n"], Float[Array, "b n c"], Metrics]:
        """See `residual_quantise`."""
        return residual_quantise(latents, self.codebook, self.spec.scales, self.part, self.vq, self.cosine)

    def part(self, level: int, codes: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """What a scale's map of codes adds to the latent."""
        x = resize(codes, self.grid)
        smoother = smoother_of_level(len(self.scales), self.smooth.count)[level]
        return (1 - self.smoothing) * x + self.smoothing * self.smooth(x, smoother)

    def pixels(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """Images from a latent, not clipped."""
        return self.decoder(self.post_quant(latents))


class Smooth(nn.Module):
    """3x3 convolutions side by side, of which a call takes one."""

    count: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], which: int) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        each = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))
        kernel = self.param("kernel", each, (self.count, 3, 3, c, c))[which]
        bias = self.param("bias", nn.initializers.zeros, (self.count, c))[which]
        form = ("NHWC", "HWIO", "NHWC")
        precision = lax.Precision.HIGHEST  # its sums choose the next codes
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form, precision=precision) + bias


def smoother_of_level(levels: int, smoothers: int) -> np.ndarray:
    """Which of the convolutions smooths which level, int [levels]: the nearest to its place between first and last.

    Exact ties fall as float64 rounds, as in the published model.
    """
    edge = 1 / 12 if smoothers == 4 else 1 / (2 * smoothers)
    ticks = np.linspace(edge, 1 - edge, smoothers)
    return np.array([np.abs(ticks - level / max(levels - 1, 1)).argmin() for level in range(levels)])
