"""Instella-T2I's tokenizer: an image as a short line of tokens of many bits each."""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ar_jax.machine import shares
from ar_jax.machine.sharding import Rules
from ar_jax.nets.head_rms import Doubling, Halving, init
from ar_jax.nets.linear import Linear
from ar_jax.nets.transformer import RMSNorm
from ar_jax.tokenizers.continuous import cells, patchify
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokens import MOST, TokenSpec, grid
from ar_jax.typing import Array, Float, Int, Many, Metrics, Params, PRNGKey, Size, Tokens, Within, typed


class BinaryLine(Quantised):
    """An image to a line of tokens of bits, and back; a token stands for the sum of its set bits' vectors.

    Learned rows beside the patches become the tokens; one learned row in the place of every patch becomes the pixels. Parameters
    do not depend on the size of the image, and tokens decode to images of other sizes.

    Attributes:
      size: height and width of the images in pixels, multiples of twice `cell`.
      cell: side of a patch in pixels.
      slots: tokens of an image.
      bits: of a token.
      encoder: halves the map of patches on its way.
      decoder: doubles it.
      scale: places of patches are stretched to those of an image with such a side in pixels, whatever its size; 0 takes them as they
        are.
      temperature: training draws a bit with probability sigmoid(z / temperature), z its logit.
      code_weight: of the mean of p (1 - p), p = sigmoid(z).
      channels: of the image.
      dtype: of the projections around the networks; bits are found in float32.
    Source: Instella-T2I (arXiv:2506.21022).
    """

    size: Size = (1024, 1024)
    cell: Annotated[int, Within(1, 2**10)] = 16
    slots: Annotated[int, Within(1, MOST)] = 128
    bits: Annotated[int, Within(1, 2**12)] = 64
    encoder: Halving = Halving(12, 768, 12)
    decoder: Doubling = Doubling(16, 1024, 16)
    scale: Many = 1024
    temperature: Annotated[float, Within(1e-3, 1e3)] = 1.0
    code_weight: float = 0.1
    channels: int = 3
    dtype: Any = jnp.float32

    no_decay = ("queries", "mask")
    last_layer = "to_pixels/kernel"

    @property
    def grid(self) -> tuple[int]:
        """The shape of the tokens: a line."""
        return (self.slots,)

    @property
    def half(self) -> tuple[int, int]:
        """Rows and columns of the halved map."""
        return cells(self.size, (2 * self.cell, 2 * self.cell))

    @property
    def span(self) -> int:
        """See `Resizing`."""
        return self.scale // self.cell

    @property
    def spec(self) -> TokenSpec:
        _ = self.half  # refuses sizes that it has not
        return TokenSpec(grid(1, self.slots), codes=(2,) * self.bits, placed=False)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.encoder.rules

    def init_params(self, key: PRNGKey) -> Params:
        return self.init(key, jnp.zeros((1, *self.size, self.channels)), method="autoencode")["params"]

    def setup(self):
        def dense(features, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, init, bias=True)

        def table(name, rows, width):
            return self.param(name, nn.initializers.normal(width**-0.5), (rows, width))

        inside, outside = self.encoder.width, self.decoder.width
        self.patches, self.told = dense(inside), dense(inside)
        self.queries = table("queries", self.slots, inside)
        self.told_norm, self.code_norm, self.image_norm = (
            RMSNorm(eps) for eps in (self.encoder.eps, self.decoder.eps, self.decoder.eps)
        )
        self.quant = dense(self.bits, jnp.float32)
        self.embedding = table("embedding", self.bits, inside)
        self.from_code, self.mask = dense(outside), table("mask", 1, outside)
        self.to_pixels = dense(self.channels * self.cell**2, jnp.float32)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass, with drawn bits, or the likelier ones without a key; as of `Quantised`."""
        latents = self.latents(image)
        codes, index, losses = self.quantise(latents, key)
        return self.pixels(codes), losses, {"latents": latents, "tokens": index}

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """Sums of the vectors of the bits that are set; vectors in their place stay as they are."""
        return tokens if jnp.issubdtype(tokens.dtype, jnp.floating) else self.summed(tokens.astype(jnp.float32))

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n k"]:
        """Logits of the bits, float32."""
        return self.quant(self.states(image))

    def states(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n d"]:
        """What the encoder makes of the learned rows."""
        height, width = self.half
        patches = self.patches(patchify(image, self.cell)).reshape(len(image), 2 * height, 2 * width, -1)
        queries = jnp.broadcast_to(self.queries, (len(image), *self.queries.shape))
        return self.told(self.told_norm(self.encoder(queries, patches, self.span)[0]))

    def quantise(
        self, latents: Float[Array, "b n k"], key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b n c"], Int[Array, "b n k"], Metrics]:
        """With a key, bits are drawn. Gradients pass to their probabilities, those of temperature 1."""
        p = jax.nn.sigmoid(latents)
        if key is None:
            bits = p > 0.5
        else:
            chance = jax.nn.sigmoid(latents / self.temperature)
            bits = shares.draw(jax.random.uniform, key, p.shape) < chance
        codes = self.summed(bits + p - lax.stop_gradient(p))
        return codes, bits.astype(jnp.int32), {"code": self.code_weight * (p * (1 - p)).mean()}

    def summed(self, bits: Float[Array, "b n k"]) -> Float[Array, "b n c"]:
        return jnp.matmul(bits, self.embedding, precision=lax.Precision.HIGHEST)

    def pixels(self, codes: Float[Array, "b n c"]) -> Float[Array, "b H W c"]:
        """Images from sums of vectors."""
        b, (height, width), p = len(codes), self.half, self.cell
        line = self.from_code(self.code_norm(codes))
        empty = jnp.broadcast_to(self.mask, (b, height, width, self.decoder.width))
        _, image = self.decoder(line, empty, self.span // 2)
        x = self.to_pixels(self.image_norm(image)).reshape(b, 2 * height, 2 * width, p, p, self.channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, *self.size, self.channels)
