"""The Hita tokenizer: codes of the whole image first, then those of its patches, which are decoded with them in mind."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.machine.sharding import Rules
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.resize import resized, touched
from ar_jax.nets.swiglu import SwiGLU
from ar_jax.tokenizers.conv import RULES, Convolutional, Decoder, Encoder, init
from ar_jax.tokenizers.feature_codes import opened
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, codebook_init, normalise, vector_quantise
from ar_jax.tokens import TokenSpec, pyramid
from ar_jax.train.exported import Exported
from ar_jax.train.teachers import EfficientNet
from ar_jax.typing import Array, Blocks, Bool, Float, Int, Layers, Many, Metrics, Params, PRNGKey, Size, Tokens, typed


def norm(dtype: Any, name: str) -> nn.LayerNorm:
    # use_fast_variance loses digits where the mean is large against the spread
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


class Told(nn.Module):
    """The teacher's rows in the width of the network: two linear layers without biases, each with a norm."""

    width: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b r f"]) -> Float[Array, "b r d"]:
        for i in (1, 2):
            x = Linear(self.width, self.dtype, None, xavier, name=f"fc{i}")(x)
            x = norm(self.dtype, f"norm{i}")(x)
            x = nn.relu(x) if i == 1 else x
        return x


class Mixed(nn.Module):
    """Carriers gather what the teacher and the map say of the image; then the map is read with them in mind.

    Attributes:
      carriers: rows that begin as learned ones.
      first: of carriers, teacher's rows and map, all of which see each other.
      second: of carriers and map; a row sees those before it.
    """

    carriers: int
    first: SwiGLU
    second: SwiGLU
    dtype: Any

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b h w d"], seen: Float[Array, "b r f"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b h w d"]]:
        """Carriers and map, float32, from a map and the teacher's rows."""
        b, h, w, width = x.shape
        begin = nn.initializers.normal(width**-0.5)
        carriers = self.param("carriers", begin, (self.carriers, width)).astype(self.dtype)
        places = self.param("places", begin, (h * w, width))
        told = Told(width, self.dtype, name="told")(seen)
        rows = (x.reshape(b, h * w, width) + places).astype(self.dtype)
        rows = jnp.concatenate([jnp.broadcast_to(carriers, (b, *carriers.shape)), told, rows], axis=1)
        rows = self.first(norm(self.dtype, "first_norm")(rows), np.zeros(rows.shape[1], np.int32))
        rows = jnp.concatenate([rows[:, : self.carriers], rows[:, -h * w :]], axis=1)
        rows = self.second(norm(self.dtype, "second_norm")(rows), np.arange(rows.shape[1], dtype=np.int32))
        rows = rows.astype(jnp.float32)
        return rows[:, : self.carriers], rows[:, self.carriers :].reshape(x.shape)


class Spread(nn.Module):
    """A map out of carriers and patches: a row sees those before it, and each patch is read a few rows early.

    Attributes:
      net: the network.
      early: how many.
      target: width of the teacher's features, told from the carriers alone; 0 does not.
      side: of the teacher's grid.
    """

    net: SwiGLU
    early: int
    target: int
    side: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(
        self, carriers: Float[Array, "b n d"], x: Float[Array, "b h w d"]
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b s s f"] | None]:
        (b, h, w, width), n = x.shape, carriers.shape[1]
        begin = nn.initializers.normal(width**-0.5)
        slots = self.param("slots", begin, (n, width))
        places = self.param("places", begin, (h * w, width))
        rows = jnp.concatenate([carriers + slots, x.reshape(b, h * w, width) + places], axis=1)
        rows = self.net(norm(self.dtype, "norm")(rows), np.arange(n + h * w, dtype=np.int32))
        shown = rows[:, n - self.early : n - self.early + h * w].reshape(x.shape).astype(jnp.float32)
        if not self.target:
            return shown, None
        ask = self.param("ask", begin, (1, width)) + resized(places.reshape(h, w, width), (self.side,) * 2)
        rows = jnp.concatenate([carriers, jnp.broadcast_to(ask, (b, *ask.shape)).astype(carriers.dtype)], axis=1)
        step = np.minimum(np.arange(rows.shape[1], dtype=np.int32), n)  # the carriers do not see who asks
        rows = self.net(norm(self.dtype, "ask_norm")(rows), step)
        told = Linear(self.target, self.dtype, jnp.float32, xavier, bias=True, name="tell")(rows[:, n:])
        return shown, told.reshape(b, self.side, self.side, -1)


class Hita(Convolutional, nn.Module):
    """Image to codes of the whole image, the carriers, and then of its patches, and back. The defaults are the published ones.

    Level 0 of the tokens are the carriers, level 1 the patches; it works at one size only. The published code drops a tenth of
    the attention's weights in training, which is not here.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1).
      carriers: how many.
      features: channels of the finest level.
      mult: channel multiplier of each level, fine to coarse; the decoder mirrors it.
      res_blocks: residual blocks per encoder level; the decoder has one more.
      latent: channels of the map, and width of the transformers.
      layers, heads: of each transformer.
      head_features: of a head of the first one.
      hidden: width of their perceptrons; 0 is that of `SwiGLU`.
      early: a patch is decoded from the row so many places before its own, `carriers` at most.
      codes: size of each of the two codebooks.
      code_features: width of a patch's code.
      carrier_features: width of a carrier's.
      groups: of the group norms.
      vq: weights of the losses of each quantiser; search is by cosine.
      teacher: a network that encoding asks too: `open` reads its parameters, a call with them turns images into maps [b H W c],
        of which the last `side` squared places are those of a square grid, and any before them (a class token) are of the whole
        image. They are no part of the tokenizer's parameters, so its file has to stay where it is. Published is DINOv2-L/14
        with registers at 224 pixels, after the last norm.
      feature_width: of its features.
      side: of its grid.
      tell: weight of the loss by which the carriers alone must tell its features (Hita-U); 0 has none (Hita-V).
      channels: of the image.
      dtype: of all products; quantisers are float32.
    Source: Hita (arXiv:2507.02358).
    """

    size: Size = (336, 336)
    carriers: Layers = 128
    features: int = 128
    mult: tuple[Layers, ...] = (1, 1, 2, 2, 4)
    res_blocks: Blocks = 2
    latent: int = 512
    layers: Layers = 3
    heads: Layers = 8
    head_features: Many = 64
    hidden: Many = 0
    early: Many = 4
    codes: int = 16384
    code_features: int = 8
    carrier_features: int = 12
    groups: int = 32
    vq: VectorLoss = VectorLoss()
    teacher: EfficientNet | Exported = EfficientNet()
    feature_width: Many = 1024
    side: Layers = 16
    tell: float = 1.0
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook("carrier_codebook", levels=(0,)), Codebook("codebook", levels=(1,)))

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(pyramid(((1, self.carriers), self.grid)), codes=(self.codes,))

    @property
    def rules(self) -> Rules:
        return RULES + SwiGLU(1, 1, 1).rules

    def setup(self):
        if self.early > self.carriers:
            raise ValueError(
                f"tokenizer.early is {self.early}, but there are {self.carriers} carriers; give at most as many"
            )
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = Encoder(mult=self.mult, out=self.latent, **net)
        self.decoder = Decoder(mult=self.mult, out=self.channels, **net)
        sizes = {"hidden": self.hidden, "dtype": self.dtype}
        first, second, third = (
            SwiGLU(self.layers, self.latent, self.heads, features=features, bias=bias, **sizes, parent=None)
            for features, bias in ((self.head_features, False), (0, True), (0, True))
        )
        self.mixed = Mixed(self.carriers, first, second, self.dtype)
        self.spread = Spread(third, self.early, self.feature_width if self.tell else 0, self.side, self.dtype)
        self.quant, self.carrier_quant = (
            nn.Dense(width, kernel_init=init) for width in (self.code_features, self.carrier_features)
        )
        self.post_quant, self.carrier_post_quant = (nn.Dense(self.latent, kernel_init=init) for _ in range(2))
        begin = codebook_init(True)
        self.codebook = self.param("codebook", begin, (self.codes, self.code_features))
        self.carrier_codebook = self.param("carrier_codebook", begin, (self.codes, self.carrier_features))

    def init_params(self, key: PRNGKey) -> Params:
        """Without a look at the teacher, which may not be at hand."""
        seen = jnp.zeros((1, self.side**2, self.feature_width))
        return self.init(key, jnp.zeros((1, *self.size, self.channels)), seen, method="whole")["params"]

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n 1"]:
        """Codes of images in [-1, 1], carriers first; `key` is unused.

        Raises:
          ValueError: the teacher's file is missing, or its features have another width.
        """
        return in_line(self.quantise(self.latents(image, self.seen(image)))[1])

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The codes of tokens, of length 1; the narrower ones have zeros at their end. Vectors stay as they are."""
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return tokens
        n, wide = self.carriers, max(self.code_features, self.carrier_features)
        tables = [jnp.pad(x, ((0, 0), (0, wide - x.shape[-1]))) for x in self._codes()]
        return jnp.concatenate([tables[0][tokens[:, :n, 0]], tables[1][tokens[:, n:, 0]]], axis=1)

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W rgb"]:
        """Images, about [-1, 1] but not clipped; `key` is unused."""
        return self.decoder(self.spread(*self.given(tokens))[0])

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; `key` is unused.

        Returns:
          The reconstruction; the weighted losses of both quantisers and of the features that carriers tell; and what
          training may want to look at: "latents" of carriers [b n c] and of patches [b h w c] before quantisation, and
          "tokens" as of `encode`.
        """
        return self.whole(image, self.seen(image))

    def whole(
        self, image: Float[Array, "b H W c"], seen: Float[Array, "b r f"]
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """As `autoencode`, with the rows that the teacher makes of the images."""
        latents = self.latents(image, seen)
        codes, index, losses = self.quantise(latents)
        shown, told = self.spread(self.carrier_post_quant(codes[0]), self.post_quant(codes[1]))
        if told is not None:
            wanted = normalise(seen[:, -(self.side**2) :])
            told = normalise(told.reshape(len(told), self.side**2, -1))
            losses["features"] = self.tell * (1 - (told * wanted).sum(-1)).mean()
        return self.decoder(shown), losses, {"latents": latents, "tokens": in_line(index)}

    def seen(self, image: Float[Array, "b H W c"]) -> Float[Array, "b r f"]:
        """The rows that the teacher makes of images."""
        found = self.teacher(opened(self.teacher), image).astype(jnp.float32)
        found = found.reshape(len(found), -1, found.shape[-1])
        if found.shape[-1] != self.feature_width or found.shape[1] < self.side**2:
            raise ValueError(
                f"tokenizer.feature_width is {self.feature_width} and tokenizer.side {self.side}, but the teacher gives "
                f"{found.shape[1]} places of width {found.shape[-1]}; give its width and the side of its grid"
            )
        return lax.stop_gradient(found)

    def latents(
        self, image: Float[Array, "b H W c"], seen: Float[Array, "b r f"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b h w c"]]:
        """What the quantisers see of carriers and patches, before normalisation."""
        carriers, patches = self.mixed(self.encoder(image), seen)
        return self.carrier_quant(carriers), self.quant(patches)

    def quantise(self, latents: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, Array], Metrics]:
        """Codes, their numbers and the weighted losses, of carriers and patches."""
        found = [vector_quantise(normalise(z.astype(jnp.float32)), x, self.vq) for z, x in zip(latents, self._codes())]
        codes, index, losses = zip(*found)
        named = {f"{name}/{part}": x for part, some in zip(("carriers", "patches"), losses) for name, x in some.items()}
        return codes, index, named

    def given(self, tokens: Tokens) -> tuple[Float[Array, "b n d"], Float[Array, "b h w d"]]:
        """What `spread` reads of tokens."""
        codes, n = self.embed(tokens), self.carriers
        patches = codes[:, n:, : self.code_features].reshape(len(codes), *self.grid, -1)
        return self.carrier_post_quant(codes[:, :n, : self.carrier_features]), self.post_quant(patches)

    def known(self, tokens: Tokens, free: Bool[Array, "b H W"]) -> Bool[Array, "b n"]:
        """What editing keeps: patches without a free pixel, and the carriers, which speak of the whole image, if there is none."""
        whole = jnp.broadcast_to(~free.any((1, 2))[:, None], (len(free), self.carriers))
        return jnp.concatenate([whole, ~touched(free, self.grid).reshape(len(free), -1)], axis=1)

    def _codes(self):
        return normalise(self.carrier_codebook), normalise(self.codebook)


def in_line(index: tuple[Array, Array]) -> Int[Array, "b n 1"]:
    """Carriers, then patches."""
    return jnp.concatenate([x.reshape(len(x), -1) for x in index], axis=1)[..., None]
