"""The FQGAN tokenizer: several codebooks for every place, which are kept from saying the same."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.nets.vit import ViT
from ar_jax.tokenizers.conv import RULES, Decoder, Encoder, conv3, init, norm
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, codebook_init, normalise
from ar_jax.tokenizers.quantize_factorised import factorised_quantise, look_up_all
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Blocks, Float, Layers, Many, Metrics, PRNGKey, Tokens, typed


class Adapter(nn.Module):
    """Rows of a fixed number, with learned positions, through a ViT with a norm before it.

    Attributes:
      layers, heads: of the ViT, as wide as the rows.
      dtype: of its products.
    """

    layers: Layers
    heads: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        places, width = x.shape[1:]
        x = x + self.param("positions", nn.initializers.normal(width**-0.5), (places, width))
        # use_fast_variance loses digits where the mean is large against the spread
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="first")(x)
        return ViT(self.layers, width, self.heads, eps=1e-5, dtype=self.dtype, name="vit")(x)


class Stream(nn.Module):
    """From the encoder's map to the latents of one codebook.

    Attributes:
      layers, heads: of the adapter.
      latent: channels of the last convolution.
      out: width of a code.
    """

    layers: Layers
    heads: int
    latent: int
    out: int
    groups: int
    dtype: Any

    def setup(self):
        self.adapter = Adapter(self.layers, self.heads, self.dtype)
        self.norm_out = norm(self.groups, self.dtype, None)
        self.conv_out = conv3(self.latent, self.dtype, None)
        self.quant = nn.Dense(self.out, kernel_init=init)

    @typed
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
        return self.quant(self.features(x))

    def features(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w z"]:
        """What the latents are a projection of."""
        rows = self.adapter(x.reshape(len(x), -1, x.shape[-1]))
        return self.conv_out(nn.silu(self.norm_out(rows.reshape(x.shape)))).astype(jnp.float32)


class FeatureHead(nn.Module):
    """Tells features of the whole image from one stream's codes, to be compared with those of a teacher.

    Attributes:
      width: of the features, which is that of the teacher's.
      layers, heads: of the ViT.
    """

    width: int
    layers: Layers
    heads: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, codes: Float[Array, "b n c"]) -> Float[Array, "b n+1 d"]:
        """Rows of which the first is the image's."""
        x = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="fc1")(codes)
        x = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="fc2")(nn.relu(x))
        image = self.param("image", nn.initializers.normal(self.width**-0.5), (1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(image.astype(x.dtype), (len(x), 1, self.width)), x], axis=1)
        return Adapter(self.layers, self.heads, self.dtype, name="adapter")(x).astype(jnp.float32)


class FQGAN(VQGAN):
    """Image to a grid of places with several codes each, and back. The defaults are the dual tokenizer's.

    Sub-code 0 is the visual one; those after it are semantic, the more so the later, if their feature heads learn from
    teachers (`losses.Contrast` on "features_0", "features_1"). Adapters have positions, so it works at one size only.

    Attributes:
      streams: codebooks, and sub-codes of a token; the published ones have two or three.
      layers, heads: of the adapter of each stream.
      feature_widths: of the feature heads of all semantic streams, which is the width of the teachers' features; () has none.
      feature_layers, feature_heads: of these heads.
      disentangle: weight of the squared cosine between codes of the same place.
      codes, code_features: of each codebook.
      vq: weights of the quantisers' losses, for every codebook.
      others: see `VQGAN`.
    Source: FQGAN (arXiv:2411.16681).
    """

    vq: VectorLoss = VectorLoss(entropy=0.03)
    streams: Layers = 2
    layers: Layers = 6
    heads: int = 8
    feature_widths: tuple[Many, ...] = (1024,)
    feature_layers: Blocks = 3
    feature_heads: int = 8
    disentangle: float = 0.1

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        return tuple(Codebook(f"codebook_{k}", (k,)) for k in range(self.streams))

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), codes=(self.codes,) * self.streams)

    @property
    def rules(self) -> Rules:
        return RULES + ViT(1, 1, 1).rules

    def setup(self):
        if self.feature_widths and len(self.feature_widths) != self.streams - 1:
            raise ValueError(
                f"tokenizer.feature_widths is {self.feature_widths}, for {self.streams} streams; give one for each stream "
                f"but the first, {self.streams - 1} in all, or none"
            )
        for name, width, heads in (
            ("mult", self.features * self.mult[-1], self.heads),
            *(("feature_widths", width, self.feature_heads) for width in self.feature_widths),
        ):
            if width % heads:
                raise ValueError(
                    f"tokenizer.{name} makes a network of width {width}, which {heads} heads do not divide evenly"
                )
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = Encoder(mult=self.mult, out=0, **net)
        self.decoder = Decoder(mult=self.decoder_mult or self.mult, out=self.channels, **net)
        self.stream = [
            Stream(self.layers, self.heads, self.latent, self.code_features, self.groups, self.dtype)
            for _ in range(self.streams)
        ]
        self.post_quant = nn.Dense(self.latent, kernel_init=init)
        self.told = [
            FeatureHead(width, self.feature_layers, self.feature_heads, self.dtype, name=f"features_{k}")
            for k, width in enumerate(self.feature_widths)
        ]
        self.tables = [
            self.param(book.path, codebook_init(self.l2_norm), (self.codes, self.code_features))
            for book in self.codebooks
        ]

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The (normalised) codes of tokens, side by side; vectors in their place stay as they are."""
        return look_up_all(self._codes(), tokens)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; `key` is unused.

        Returns:
          The reconstruction; the weighted losses of the quantisers by name; and what training may want to look at:
          "latents" of every stream [b h w c] before quantisation and "tokens" as of `encode`. Feature heads are modules
          of the paths "features_0" and so on.
        """
        latents = self.latents(image)
        codes, index, losses = self.quantise(latents)
        for head, code in zip(self.told, codes[1:]):
            head(code.reshape(len(code), -1, code.shape[-1]))
        recon = self.pixels(jnp.concatenate(codes, axis=-1))
        return recon, losses, {"latents": latents, "tokens": self.in_line(index)}

    def latents(self, image: Float[Array, "b H W c"]) -> tuple[Float[Array, "b h w c"], ...]:
        """What the quantisers see, before any normalisation."""
        x = self.encoder(image)
        return tuple(stream(x) for stream in self.stream)

    def quantise(self, latents: tuple[Float[Array, "*b c"], ...]) -> tuple[tuple[Array, ...], Array, Metrics]:
        each = tuple(z.astype(jnp.float32) for z in latents)
        each = tuple(map(normalise, each)) if self.l2_norm else each
        return factorised_quantise(each, self._codes(), self.vq, self.disentangle)

    def _codes(self):
        return tuple(map(normalise, self.tables)) if self.l2_norm else tuple(self.tables)
