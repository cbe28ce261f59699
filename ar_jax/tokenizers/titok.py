"""TiTok and TA-TiTok: an image as a short line of tokens, which transformers read off it and draw it from."""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.nets.linear import Linear
from ar_jax.nets.vit import ClipViT
from ar_jax.tokenizers.continuous import Measured, cells, draw, kl_divergence, noise, patchify, unpatchify
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, codebook_init, look_up, normalise, vector_quantise
from ar_jax.tokens import MOST, Scale, TokenSpec, grid, sides
from ar_jax.typing import Array, Batch, Float, Int, Many, Metrics, Params, PRNGKey, Size, Tokens, Within, typed


class OnLine(nn.Module):
    """What both forms of TiTok share: learned queries beside the patches of an image become its tokens; learned masks beside the
    tokens become its patches. It works at one size only.

    Attributes:
      size: height and width of the images in pixels, multiples of those of `cell`.
      cell: pixels of a patch: the side of a square, or (rows, columns).
      slots: tokens of an image.
      encoder, decoder: of any widths; kernels around them begin as the encoder's.
      drawn_cell: pixels of a patch that the decoder makes; 0 takes `cell`.
      text_rows, text_width: of the features of a caption that the decoder sees beside the tokens, as TA-TiTok's does; 0 sees none.
        Rows that the mask leaves out are not seen.
      channels: of the image.
      dtype: of the projections around the networks; what lies between encoder and decoder is float32.
    """

    size: Size = (256, 256)
    cell: Scale = 16
    slots: Annotated[int, Within(1, MOST)] = 32
    encoder: ClipViT = ClipViT(12, 768, 12)
    decoder: ClipViT = ClipViT(24, 1024, 16)
    drawn_cell: Scale = 0
    text_rows: Many = 0
    text_width: Many = 0
    channels: int = 3
    dtype: Any = jnp.float32

    no_decay = (
        *("queries", "query_positions", "encoder_first", "encoder_positions"),
        *("masks", "code_positions", "decoder_first", "decoder_positions", "text_positions"),
    )
    last_layer = "smooth/kernel"

    @property
    def grid(self) -> tuple[int]:
        """The shape of the tokens: a line."""
        return (self.slots,)

    @property
    def places(self) -> tuple[int, int]:
        """Rows and columns of patches that the decoder makes."""
        return cells(self.size, sides(self.drawn_cell or self.cell))

    @property
    def conditioned(self) -> tuple[str, ...]:
        """What it decodes with (see `conditioned.said_of`)."""
        return ("text", "text_mask") if self.text_rows else ()

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.decoder.rules

    def init_params(self, key: PRNGKey) -> Params:
        return self.init(key, jnp.zeros((1, *self.size, self.channels)), method="autoencode")["params"]

    def begin(self, encoded: int) -> None:
        """Makes the parts; for `setup`. `encoded` is how many numbers the encoder says of a token."""

        def table(name, rows, width):
            return self.param(name, nn.initializers.normal(width**-0.5), (rows, width))

        (rows, columns), (height, width) = cells(self.size, sides(self.cell)), self.places
        inside, outside = self.encoder.width, self.decoder.width
        self.patches, self.to_code = self.dense(inside), self.dense(encoded, jnp.float32)
        self.queries, self.query_positions = (
            table(name, self.slots, inside) for name in ("queries", "query_positions")
        )
        self.encoder_first = table("encoder_first", 1, inside)
        self.encoder_positions = table("encoder_positions", rows * columns + 1, inside)
        self.from_code, self.code_positions = self.dense(outside), table("code_positions", self.slots, outside)
        self.masks, self.decoder_first = (table(name, 1, outside) for name in ("masks", "decoder_first"))
        self.decoder_positions = table("decoder_positions", height * width + 1, outside)
        if self.text_rows:
            self.text, self.text_positions = self.dense(outside), table("text_positions", self.text_rows, outside)

    def dense(self, features: int, out_dtype: Any = None) -> Linear:
        return Linear(features, self.dtype, out_dtype, nn.initializers.normal(self.encoder.std), bias=True)

    def told(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n d"]:
        """The rows of the queries after the encoder."""
        x = self.patches(patchify((image + 1) / 2, self.cell))
        x = _with(x, self.encoder_first) + self.encoder_positions.astype(x.dtype)
        return self.encoder(_with(x, self.queries + self.query_positions, last=True))[:, -self.slots :]

    def rows_of(self, codes: Float[Array, "b n c"], batch: Batch | None = None) -> Float[Array, "b p d"]:
        """The rows of the patches after the decoder; `batch` has "text" [b r w] and "text_mask" [b r], if there is a caption."""
        x = self.from_code(codes) + self.code_positions.astype(self.dtype)
        masks = jnp.repeat(self.masks, len(self.decoder_positions) - 1, axis=0)
        rows = jnp.concatenate([self.decoder_first, masks]) + self.decoder_positions
        x, valid = _with(x, rows), None
        if self.text_rows:
            said, seen = self._said(batch, len(x))
            x = jnp.concatenate([x, said.astype(x.dtype)], axis=1)
            valid = jnp.pad(seen, ((0, 0), (x.shape[1] - self.text_rows, 0)), constant_values=True)
        return self.decoder(x, valid=valid)[:, 1 : len(rows)]

    def _said(self, batch, images):
        """The rows of captions, and which of them are seen."""
        shape = (images, self.text_rows, self.text_width)
        text, mask = (batch["text"], batch["text_mask"]) if batch else (jnp.zeros(shape), jnp.zeros(shape[:2], bool))
        if text.shape != shape or mask.shape != shape[:2]:
            raise ValueError(
                f"captions have features {list(text.shape)} and a mask {list(mask.shape)}; tokenizer.text_rows and "
                f"tokenizer.text_width ask for {list(shape)} and {list(shape[:2])}"
            )
        return self.text(text) + self.text_positions, jnp.asarray(mask, bool)

    def shown(self, codes: Float[Array, "b n c"], batch: Batch | None = None) -> Float[Array, "b H W rgb"]:
        """Images from what stands for the tokens."""
        patches = self.to_pixels(self.rows_of(codes, batch))
        return 2 * self.smooth(unpatchify(patches, self.places, self.drawn_cell or self.cell)) - 1

    def begin_pixels(self) -> None:
        """Makes the parts of `shown`; for `setup`."""
        rows, columns = sides(self.drawn_cell or self.cell)
        self.to_pixels = self.dense(self.channels * rows * columns, jnp.float32)
        self.smooth = nn.Conv(self.channels, (3, 3), kernel_init=nn.initializers.normal(self.encoder.std))


class TiTok(OnLine, Quantised):
    """An image to a line of codes, and back. The defaults are BL-32 of 8,192 codes.

    With a `proxy`, as in the first TiToks, the decoder predicts the codes of that tokenizer instead of pixels, and the mean of
    its codes by these probabilities goes through its decoder. That is trained in two stages: first the logits, by
    `losses.ProxyCodes`, then the decoders.

    Attributes:
      codes: size of the codebook.
      code_features: width of a code.
      l2_norm: latents and codes are normalised at every use, so search is by cosine.
      vq: weights of the quantiser's losses.
      proxy: a tokenizer of the same images, with a code for each patch of the decoder; its encoder is not part of this one.
      mixed: the array of the encoder's rows is read in memory order as one of channels by rows; those of the first TiToks.
      others: see `OnLine`.
    Source: TiTok (arXiv:2406.07550).
    """

    codes: int = 8192
    code_features: int = 64
    l2_norm: bool = False
    vq: VectorLoss = VectorLoss()
    proxy: MaskgitVQGAN | None = None
    mixed: bool = False

    codebooks = (Codebook("codebook"),)

    @property
    def last_layer(self) -> str:
        """Where gradients of images are measured."""
        return "proxy/decoder/conv_out/kernel" if self.proxy else OnLine.last_layer

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(1, self.slots), codes=(self.codes,), placed=False)

    def setup(self):
        self.begin(self.code_features)
        self.codebook = self.param("codebook", codebook_init(self.l2_norm), (self.codes, self.code_features))
        if self.proxy is None:
            return self.begin_pixels()
        if (self.proxy.size, self.proxy.grid) != (self.size, self.places):
            raise ValueError(
                f"tokenizer.proxy makes {self.proxy.grid} codes of images of {self.proxy.size} pixels, but the decoder has "
                f"{self.places} patches of images of {self.size}; they must be the same"
            )
        self.proxy_hidden, self.to_proxy = self.dense(2 * self.decoder.width), self.dense(self.proxy.codes, jnp.float32)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The (normalised) codes of tokens; vectors in their place stay as they are."""
        return look_up(self._codes(), tokens)

    @typed
    def decode(
        self, tokens: Tokens, *, key: PRNGKey | None = None, batch: Batch | None = None
    ) -> Float[Array, "b H W rgb"]:
        """Images, about [-1, 1] but not clipped, with the captions of `batch`; `key` is unused."""
        return self.pixels(self.embed(tokens), batch)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None, batch: Batch | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """As of `Quantised`; with a proxy it also shows "proxy", the logits [b h w v] of its codes."""
        latents = self.latents(image)
        codes, index, losses = self.quantise(latents)
        seen = {"latents": latents, "tokens": self.in_line(index)}
        if self.proxy is None:
            return self.shown(codes, batch), losses, seen
        seen["proxy"] = self.logits(codes, batch)
        return self.by_proxy(seen["proxy"]), losses, seen

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c"]:
        """What the quantiser sees, before any normalisation."""
        x = self.told(image)
        if self.mixed:
            x = x.reshape(len(x), -1, self.slots).swapaxes(1, 2)
        return self.to_code(x)

    def quantise(self, latents: Float[Array, "b n c"]) -> tuple[Float[Array, "b n c"], Int[Array, "b n"], Metrics]:
        return vector_quantise(normalise(latents) if self.l2_norm else latents, self._codes(), self.vq)

    def pixels(self, codes: Float[Array, "b n c"], batch: Batch | None = None) -> Float[Array, "b H W rgb"]:
        return self.shown(codes, batch) if self.proxy is None else self.by_proxy(self.logits(codes, batch))

    def logits(self, codes: Float[Array, "b n c"], batch: Batch | None = None) -> Float[Array, "b h w v"]:
        """Of the proxy's codes; float32."""
        logits = self.to_proxy(jnp.tanh(self.proxy_hidden(self.rows_of(codes, batch))))
        return logits.reshape(len(logits), *self.places, -1)

    def by_proxy(self, logits: Float[Array, "b h w v"]) -> Float[Array, "b H W rgb"]:
        """Images of the proxy's decoder, from the means of its codes."""
        return self.proxy.pixels(jax.nn.softmax(logits) @ self.proxy.codebook)

    def _codes(self):
        return normalise(self.codebook) if self.l2_norm else self.codebook


class TiTokVAE(OnLine, Measured):
    """An image to a line of continuous tokens, and back. The defaults are BL-32 of 16 numbers.

    Attributes:
      latent: numbers of a token.
      kl: weight of the posterior's divergence from a unit Gaussian in nats, a sum over all numbers of an image.
      shift, scale: see `Measured`.
      others: see `OnLine`.
    Source: TiTok (arXiv:2406.07550), in the form of TA-TiTok (arXiv:2501.07730).
    """

    latent: int = 16
    kl: float = 1e-6
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    draws = True
    patch = 1  # places of the latent that make a token

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(1, self.slots), channels=self.latent, placed=False)

    def setup(self):
        self.begin(2 * self.latent)
        self.begin_pixels()

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Float[Array, "b n c2"]:
        """Tokens of images in [-1, 1], of unit variance once measured: drawn from the posterior, or its mean without a key."""
        return self.drawn(self.moments(image), key=key)

    @typed
    def moments(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c2"]:
        """Mean and log-variance of every number of the latents, beside each other in every token; float32."""
        mean, logvar = jnp.split(self.to_code(self.told(image)), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, -30, 20)], axis=-1)

    def drawn(self, moments: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b n c"]:
        """Tokens of `moments`, of any float type: those that `encode` draws with this key."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return self.standardise(draw(mean, logvar, noise(mean, key)))

    @typed
    def embed(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The tokens themselves."""
        return tokens

    @typed
    def decode(
        self, tokens: Float[Array, "b n c"], *, key: PRNGKey | None = None, batch: Batch | None = None
    ) -> Float[Array, "b H W c2"]:
        """Images, about [-1, 1] but not clipped, with the captions of `batch`; `key` is unused."""
        return self.shown(self.restore(tokens), batch)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None, batch: Batch | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass, through a draw from the posterior, or its mean without a key.

        Returns:
          The reconstruction; the weighted losses by name; and what training may want to look at: "latents" [b n c].
        """
        mean, logvar = jnp.split(self.moments(image), 2, axis=-1)
        latents = draw(mean, logvar, noise(mean, key))
        return self.shown(latents, batch), {"kl": self.kl * kl_divergence(mean, logvar).mean()}, {"latents": latents}


def _with(x: Array, rows: Array, last: bool = False) -> Array:
    """Rows [m d], the same for all images, before those of each image [b q d], or after them."""
    rows = jnp.broadcast_to(rows.astype(x.dtype), (len(x), *rows.shape))
    return jnp.concatenate([x, rows] if last else [rows, x], axis=1)
