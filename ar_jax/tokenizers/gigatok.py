"""The GigaTok tokenizer: convolutions to a map, queries that read it onto a line, and back; it may be very large."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from ar_jax.machine.sharding import Rules
from ar_jax.nets.linear import Linear
from ar_jax.nets.queries import QFormer, init, norm
from ar_jax.nets.resize import resize
from ar_jax.tokenizers import conv
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokenizers.quantize import (
    Codebook,
    VectorLoss,
    codebook_init,
    look_up,
    normalise,
    rotated,
    straight_through,
    vector_quantise,
)
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Blocks, Float, Index, Int, Layers, Many, Metrics, PRNGKey, Size, Tokens, typed


def pooled(x: Float[Array, "b h w c"], tokens: int) -> Float[Array, "b n c"]:
    """Means of a map over ever smaller cells: of all of it, all of it again, its halves, quarters and so on, coarse to fine.

    Raises:
      ValueError: the number of tokens is no power of two.
    """
    if tokens < 1 or tokens & (tokens - 1):
        raise ValueError(f"tokenizer.tokens is {tokens}; it must be a power of two")
    levels = [max(group - 1, 0) for group in range(tokens.bit_length())]
    cells = [resize(x, (2 ** (level // 2), 2 ** ((level + 1) // 2)), "area") for level in levels]
    return jnp.concatenate([some.reshape(len(x), -1, x.shape[-1]) for some in cells], axis=1)


class ToLine(nn.Module):
    """A map onto a line: queries, which begin as its means (`pooled`), read it.

    Attributes:
      net: reads.
      tokens: on the line, a power of two.
      out: channels of the result.
    """

    net: QFormer
    tokens: int
    out: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b h w z"]) -> Float[Array, "b n c"]:
        def dense(features, name, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, init(self.net.std), bias=True, name=name)

        memory = dense(self.net.width, "embed")(norm(self.net.eps, self.dtype, "before")(x))
        queries = dense(self.net.width, "first")(pooled(memory, self.tokens))
        place, slot = places(self, memory.shape[1] * memory.shape[2], self.tokens)
        rows, _ = self.net(queries, slot, memory.reshape(len(x), -1, self.net.width), place)
        return dense(self.out, "last", jnp.float32)(rows)


class ToMap(nn.Module):
    """From a line to a map: queries, which all begin as what the line's first token is, read it.

    Attributes:
      net: reads; its rows after layer `tap` are what a teacher may look at.
      size: height and width of the map.
      out: channels of the result.
      target: width of the teacher's features, which the module "told" tells from those rows; 0 has none.
    """

    net: QFormer
    size: tuple[int, int]
    out: int
    target: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b n z"]) -> Float[Array, "b h w c"]:
        width, count = self.net.width, self.size[0] * self.size[1]
        memory = norm(self.net.eps, self.dtype, "before")(x)
        memory = Linear(width, self.dtype, None, init(self.net.std), bias=True, name="embed")(memory)
        place, slot = places(self, count, x.shape[1])
        queries = jnp.broadcast_to(memory[:, :1], (len(x), count, width))
        rows, tapped = self.net(queries, place, memory, slot)
        if self.target:
            Told(self.target, self.net.std, self.dtype, name="told")(tapped.reshape(len(x), *self.size, width))
        y = rows.reshape(len(x), *self.size, width)
        return nn.Conv(self.out, (3, 3), kernel_init=init(self.net.std), dtype=self.dtype, name="last")(y).astype(jnp.float32)


class Told(nn.Module):
    """The features of a teacher, told from rows by a perceptron; trained, and of no use in the end."""

    out: int
    std: float
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
        hidden = 4 * x.shape[-1]
        for name in ("fc1", "fc2"):
            x = nn.silu(Linear(hidden, self.dtype, None, init(self.std), bias=True, name=name)(x))
        return Linear(self.out, self.dtype, jnp.float32, init(self.std), bias=True, name="fc3")(x)


def places(module: nn.Module, cells: int, tokens: int) -> tuple[Array, Array]:
    """Learned places of the map's cells and of the line's tokens, in a module's `nn.compact` method."""
    width = module.net.width
    begin = nn.initializers.normal(width**-0.5)
    return module.param("cells", begin, (cells, width)), module.param("slots", begin, (tokens, width))


class StyledDecoder(nn.Module):
    """Map to image: `conv.Decoder` without attention, with levels whose statistics are set by those of the map.

    Attributes: as of `conv.Decoder`.
    """

    features: int
    mult: tuple[int, ...]
    res_blocks: int
    out: int
    groups: int = 32
    dtype: Any = jnp.float32

    attention = ()
    middle = False
    last_silu = True

    @nn.compact
    @typed
    def __call__(self, style: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        spread, mean = style.var((1, 2), ddof=1), style.mean((1, 2))
        x = conv.conv3(self.features * self.mult[-1], self.dtype, name="conv_in")(style)
        x = conv.middle(self, x)
        for level, mult in reversed(list(enumerate(self.mult))):
            x = self.styled(x, spread, mean, level)
            x = conv.blocks(self, x, level, mult, self.res_blocks + 1)
            if level > 0:
                x = doubled(conv.conv3(4 * x.shape[-1], self.dtype, name=f"up_{level}")(x))
        return conv.last(self, x, self.out)

    def styled(self, x, spread, mean, level):
        def dense(name):
            return nn.Dense(x.shape[-1], kernel_init=init(0.02), dtype=self.dtype, name=f"{name}_{level}")

        scale, bias = dense("spread")(jnp.sqrt(spread + 1e-6)), dense("mean")(mean)
        # use_fast_variance loses digits where the mean is large against the spread
        plain = nn.GroupNorm(
            self.groups, epsilon=1e-6, dtype=self.dtype, use_bias=False, use_scale=False, use_fast_variance=False
        )
        return plain(x) * scale[:, None, None] + bias[:, None, None]


def doubled(x: Array) -> Array:
    """A map [b h w 4c] at twice the size, [b 2h 2w c]: its channels are those of the upper left, upper right, lower left and
    lower right pixel."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c // 4)


class GigaTok(conv.Convolutional, Quantised):
    """Image to codes on a line and back. The defaults are S-B's; it works at one size only.

    Semantic regularisation is a teacher that looks at "to_map/told" (`losses.Teacher`, not projected). Without it larger
    tokenizers reconstruct better, but what is generated of their codes gets worse.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1).
      tokens: on the line, a power of two.
      features: channels of the finest level.
      mult: channel multiplier of each level, fine to coarse.
      decoder_mult: the decoder's, of as many levels, if it differs; empty takes `mult`.
      res_blocks: residual blocks per encoder level; the decoder has one more.
      latent: channels of the map, and between the networks on the line and the quantiser.
      encoder_net: reads the map onto the line.
      decoder_net: reads the line onto the map; the teacher looks at its layer `tap`.
      target: width of the teacher's features; 0 has no module for them.
      codes: size of the codebook.
      code_features: width of a code.
      groups: of the group norms.
      l2_norm: latents and codes are normalised at every use, so search is by cosine.
      vq: weights of the quantiser's losses; tokenizers of billions of parameters need its entropy.
      rotation: the gradient of a latent is that of its code, turned by the angle between them, in place of the same; the released
        weights were trained so, and their authors see no difference.
      shortcut: updates in which the convolutions learn to decode what they encode, past the line, and the line to give back
        that map. As published, but for the perceptual and adversarial losses of that image; the published recipe of new
        models has none.
      channels: of the image.
      dtype: of convolutions and projections; the quantiser is float32.
    Source: GigaTok (arXiv:2504.08736). Convolutions begin as LlamaGen's.
    """

    size: Size = (256, 256)
    tokens: Many = 256
    features: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_mult: tuple[Layers, ...] = ()
    res_blocks: Blocks = 2
    latent: int = 256
    encoder_net: QFormer = QFormer(6, 512, 8)
    decoder_net: QFormer = QFormer(12, 768, 12, tap=3)
    target: Many = 768
    codes: int = 16384
    code_features: int = 8
    groups: int = 32
    l2_norm: bool = True
    vq: VectorLoss = VectorLoss()
    rotation: bool = False
    shortcut: Many = 0
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook("codebook"),)
    stepped = True

    @property
    def grid(self) -> tuple[int]:
        """Of the tokens, which lie on a line."""
        return (self.tokens,)

    @property
    def map(self) -> tuple[int, int]:
        """Height and width of what the convolutions make."""
        return super().grid

    @property
    def spec(self) -> TokenSpec:
        _ = self.map  # refuses sizes that it has not
        return TokenSpec(grid(1, self.tokens), codes=(self.codes,), placed=False)

    @property
    def rules(self) -> Rules:
        return conv.RESIDUAL + self.encoder_net.rules

    def setup(self):
        if len(self.decoder_mult or self.mult) != len(self.mult):
            raise ValueError(
                f"tokenizer.decoder_mult is {self.decoder_mult}; it must have {len(self.mult)} levels, as tokenizer.mult"
            )
        if self.map == (1, 1):
            raise ValueError(
                f"tokenizer.size is {self.size}, of which the convolutions make a single cell, which has no spread; give more"
            )
        if self.target and not self.decoder_net.tap:
            raise ValueError(
                f"tokenizer.target is {self.target}, but decoder_net.tap is 0; give the layer that the teacher looks at"
            )
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = conv.Encoder(mult=self.mult, out=self.latent, attention=(), middle=False, **net)
        self.decoder = StyledDecoder(mult=self.decoder_mult or self.mult, out=self.channels, **net)
        self.to_line = ToLine(self.encoder_net, self.tokens, self.latent, self.dtype)
        self.to_map = ToMap(self.decoder_net, self.map, self.latent, self.target, self.dtype)
        self.quant = nn.Dense(self.code_features, kernel_init=conv.init)
        self.post_quant = nn.Dense(self.latent, kernel_init=conv.init)
        self.codebook = self.param("codebook", codebook_init(self.l2_norm), (self.codes, self.code_features))

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The (normalised) codes of tokens; vectors in their place stay as they are."""
        return look_up(self._codes(), tokens)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None, step: Index = 0
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; `key` is unused, `step` is the number of the update, for `shortcut`.

        Returns:
          As of `VQGAN`; while the shortcut is taken, with the losses "shortcut" of its image and "map" of the line's map.
          The module "to_map/told" tells the teacher's features as a map.
        """
        seen = self.encoder(image)
        latents = self.quant(self.to_line(seen))
        codes, index, losses = self.quantise(latents)
        again = self.to_map(self.post_quant(codes))
        if self.shortcut:
            on = jnp.asarray(step < self.shortcut, jnp.float32)
            losses["shortcut"] = on * jnp.square(self.decoder(seen) - image).mean()
            losses["map"] = on * jnp.square(again - lax.stop_gradient(seen)).mean()
        return self.decoder(again), losses, {"latents": latents, "tokens": self.in_line(index)}

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c"]:
        """What the quantiser sees, before any normalisation."""
        return self.quant(self.to_line(self.encoder(image)))

    def quantise(self, latents: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
        z = latents.astype(jnp.float32)
        z, through = normalise(z) if self.l2_norm else z, rotated if self.rotation else straight_through
        return vector_quantise(z, self._codes(), self.vq, through=through)

    def pixels(self, codes: Float[Array, "b n c"]) -> Float[Array, "b H W c"]:
        """Images from the codes of a line."""
        return self.decoder(self.to_map(self.post_quant(codes)))

    def _codes(self):
        return normalise(self.codebook) if self.l2_norm else self.codebook
