"""The pyramid of bits: a convolutional autoencoder whose latent is a sum over scales of codes that are signs, not table entries."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.continuous import patchify, unpatchify
from ar_jax.tokenizers.conv import RULES, Convolutional, Decoder, Encoder
from ar_jax.tokenizers.quantize_spherical import Described, SphericalLoss, corner, residual_spherical_quantise
from ar_jax.tokenizers.residual_pyramid import Summed
from ar_jax.tokens import Scale, TokenSpec, maps, pyramid, sides
from ar_jax.typing import Array, Blocks, Float, Int, Metrics, PRNGKey, Share, Size, Tokens, typed

# Published scales by height / width of the image; of 1 / these ratios, the same with sides exchanged.
_TALL = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
STAGES = (7, 10, 12, 13)  # how many of them images of about 256^2, 512^2, 768^2 and 1024^2 pixels have
PIXELS = 16  # of an image for one place of the last scale, a side


def scales_of_ratio(ratio: float) -> tuple[tuple[int, int], ...]:
    """The 13 published scales of the images whose height / width is nearest to a ratio."""
    lists = {}
    for tall, text in _TALL.items():
        scales = tuple(tuple(map(int, pair.split("x"))) for pair in text.split())
        lists |= {tall: scales, 1 / tall: tuple(pair[::-1] for pair in scales)}
    return lists[min(lists, key=lambda known: abs(known - ratio))]


def published_scales(size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The scales of images of that height and width in pixels; () if none are published."""
    scales = scales_of_ratio(size[0] / size[1])
    for count in STAGES:
        if scales[count - 1] == tuple(side / PIXELS for side in size):
            return scales[:count]
    return ()


class BitPyramid(Summed, Convolutional, nn.Module):
    """Image to grids of bits, coarse to fine, and back. The defaults are Infinity's 32-bit tokenizer for 256 pixels.

    A place of a scale has `bits` bits, each of which is a sub-code: 2^bits codes would not fit an integer, nor any table.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels of `mult` - 1).
      scales: sides, or pairs (height, width), coarse to fine, of grids of tokens; the last is the size of the latent
        divided by `patch`. Parameters serve any list.
      features: channels of the finest level.
      mult: channel multiplier of each level, fine to coarse.
      res_blocks: residual blocks per encoder level; the decoder has one more.
      bits: channels of the latent.
      patch: side of the square of places whose bits make a token: channel by channel, then row by row.
      groups: of the group norms.
      vq: weights of the quantiser's losses.
      scale_drop: in training every scale but the last is left out with this probability, for the whole batch.
      detach: in training, what a scale describes is without the gradient of those before.
      channels: of the image.
      dtype: of the encoder and decoder; the quantiser is float32.
    Source: Infinity (arXiv:2412.04431); its training is known from copies of its code.
    """

    size: Size = (256, 256)
    scales: tuple[Scale, ...] = scales_of_ratio(1)[: STAGES[0]]
    features: int = 128
    mult: tuple[int, ...] = (1, 2, 4, 4, 4)
    res_blocks: Blocks = 2
    bits: int = 32
    patch: int = 1
    groups: int = 32
    vq: SphericalLoss = SphericalLoss(commit=1.0, entropy=0.4)
    scale_drop: Share = 0.0
    detach: bool = False
    channels: int = 3
    dtype: Any = jnp.float32

    shrunk = "linear"

    @property
    def spec(self) -> TokenSpec:
        if self.bits < 1 or self.patch < 1:
            raise ValueError(f"tokenizer.bits is {self.bits} and tokenizer.patch {self.patch}; both must be 1 or more")
        if not self.scales or tuple(self.patch * side for side in sides(self.scales[-1])) != self.grid:
            raise ValueError(
                f"tokenizer.scales is {self.scales}, but its last one times tokenizer.patch {self.patch} must be the "
                f"latent's {self.grid}: images of {self.size} pixels divided by {self.downsample}"
            )
        return TokenSpec(pyramid(self.scales), codes=(2,) * (self.bits * self.patch**2))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.patch * height, self.patch * width) for height, width in self.spec.scales)

    @property
    def rules(self) -> Rules:
        return RULES[:3]  # the others are of attention

    def setup(self):
        net = {"mult": self.mult, "features": self.features, "res_blocks": self.res_blocks, "groups": self.groups}
        net |= {"dtype": self.dtype, "attention": (), "middle": False}
        self.encoder = Encoder(out=self.bits, **net)
        self.decoder = Decoder(out=self.channels, **net)

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n k"]:
        """Bits of images in [-1, 1], of all scales; `key` is unused, they are deterministic."""
        return self.rows(self.quantise(self.latents(image)).bits)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The codes of tokens, without what other scales add, `bits` numbers for each place; vectors stay as they are."""
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return tokens
        places = tokens.reshape(*tokens.shape[:2], self.bits, -1)
        return jnp.moveaxis(corner(jnp.moveaxis(places, 2, 3)), 3, 2).reshape(tokens.shape)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; `key` draws which scales are left out, without it none is.

        Returns:
          The reconstruction, not clipped; the weighted losses of the quantiser by name; and what training may want to
          look at: "latents" [b n c], what each slot's bits stand for, and "tokens" as of `encode`.
        """
        kept = None
        if self.scale_drop and key is not None:
            kept = jax.random.uniform(key, (len(self.scales),)) >= self.scale_drop
            kept = kept.at[-1].set(True).astype(jnp.float32)
        said = self.quantise(self.latents(image), kept=kept)
        seen = {"latents": self.rows(said.latents), "tokens": self.rows(said.bits)}
        return self.pixels(said.total), said.losses, seen

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        """What the quantiser sees."""
        return self.encoder(image).astype(jnp.float32)

    def quantise(self, latents: Float[Array, "b h w d"], **options: Any) -> Described:
        """See `residual_spherical_quantise`, whose options these are."""
        return residual_spherical_quantise(latents, self.sizes, self.vq, self.detach, **options)

    @typed
    def corrected(
        self, latents: Float[Array, "b h w d"], flips: list[Array]
    ) -> tuple[Int[Array, "b n k"], Float[Array, "b n c"]]:
        """What a generator is trained on that corrects its own mistakes: the right bits of every slot, and its `context`.

        Args:
          latents: of an image, before quantisation.
          flips: bool [b h w d], bits that are added wrongly, of every scale (`quantize_spherical.flipped`); the right bits of later scales
            and their contexts follow from them.
        """
        said = self.quantise(latents, flips=flips)
        start = jnp.zeros((len(latents), *self.sizes[0], self.bits))
        known = [resize(x, size, self.shrunk) for x, size in zip(said.sums, self.sizes[1:])]
        return self.rows(said.bits), self.rows([start, *known])

    def part(self, level: int, codes: Float[Array, "b h w d"]) -> Float[Array, "b H W d"]:
        """What a scale's map of codes adds to the latent."""
        return resize(codes, self.grid, "linear")

    def pixels(self, latents: Float[Array, "b h w d"]) -> Float[Array, "b H W c"]:
        """Images from a latent, not clipped."""
        return self.decoder(latents)

    def maps(self, codes: Float[Array, "b n c"]) -> list[Float[Array, "b h w d"]]:
        parts = maps(codes, self.spec.scales)
        return [unpatchify(x.reshape(len(x), -1, x.shape[-1]), x.shape[1:3], self.patch) for x in parts]

    def rows(self, maps: list[Array]) -> Array:
        """The inverse of `maps`; of bits too."""
        return jnp.concatenate([_patches(x, self.patch) for x in maps], axis=1)


def _patches(x, patch):
    rows = patchify(x.astype(jnp.float32), patch)  # bits are exact in float32
    return rows.astype(x.dtype)
