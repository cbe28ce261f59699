"""The pyramid of independent scales: each is a complete description of the image, so any list of scales will do."""

import math

import jax.numpy as jnp

from ar_jax.nets.resize import resize
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import Scale, TokenSpec, maps, pyramid, rows, sides
from ar_jax.typing import Array, Float, Index, Int, Metrics, PRNGKey, Tokens, typed


class Pyramid(VQGAN):
    """A VQGAN whose latent is averaged to grids of several sizes, each quantised by itself.

    The decoder makes an image of `downsample` pixels a side from every code, whatever the grid; `decode` takes the last
    scale. Scales are no part of the parameters: `clone(scales=...)` is the same tokenizer.

    Attributes:
      size: height and width of the images that are encoded.
      scales: sides, or pairs (height, width), coarse to fine.
      coarse: weight in training of the pixels of all scales but the last.
      others: as in `VQGAN`.
    Source: FlexVAR (arXiv:2502.20313); how its tokenizer was trained is not published, see `autoencode`.
    """

    scales: tuple[Scale, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    codes: int = 8912
    code_features: int = 32
    coarse: float = 1.0

    adjustable = ("scales",)

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(pyramid(self.scales), codes=(self.codes,))

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n 1"]:
        """Codes of images in [-1, 1], of all scales; `key` is unused, the codes are deterministic."""
        _, index, _ = self.quantise(self.averages(self.latents(image)))
        return index[..., None]

    @typed
    def context(self, tokens: Int[Array, "b n 1"]) -> Float[Array, "b n c"]:
        """The codes of the scale before in the size of each slot's own; zeros on the first scale.

        A level depends on the tokens of the level before it only, so later ones may be anything.
        """
        first, *others = self.spec.scales
        start = jnp.zeros((len(tokens), *first, self.code_features))
        return rows([start, *map(resize, maps(self.embed(tokens), self.scales), others)])

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W rgb"]:
        """Images of the last scale, about [-1, 1] but not clipped; `key` is unused."""
        last = sides(self.scales[-1])
        codes = self.embed(tokens[:, -math.prod(last) :])
        return self.pixels(codes.reshape(len(codes), *last, -1))

    @typed
    def decode_until(self, tokens: Tokens, level: Index) -> Float[Array, "b H W rgb"]:
        """Images of a level, enlarged to the size of the last one before they are decoded; later tokens may be anything."""
        last = sides(self.scales[-1])
        return self.pixels(jnp.stack([resize(x, last) for x in maps(self.embed(tokens), self.scales)])[level])

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; `key` is unused: every scale is quantised and decoded.

        The last scale is the reconstruction, for all losses that training knows. A coarser one shows the image averaged
        to its own pixels, by squared differences ("coarse", a mean over scales): a grid of averaged latents then is the
        latent of a small image, which makes small grids worth many codes and decodes at any size.

        Returns:
          The reconstruction; the weighted losses of the quantiser and of the coarse scales by name; and what training
          may want to look at: "latents" [b n c] before quantisation and "tokens" as of `encode`.
        Raises:
          ValueError: the last scale is not the latent's size.
        """
        if sides(self.scales[-1]) != self.grid:
            raise ValueError(
                f"tokenizer.scales is {self.scales}, but in training its last one must be the latent's {self.grid}: "
                f"images of {self.size} pixels divided by {self.downsample}"
            )
        latents = self.averages(self.latents(image))
        codes, index, losses = self.quantise(latents)
        *coarse, recon = (self.pixels(x) for x in maps(codes, self.scales))
        if coarse:
            errors = [jnp.square(x - resize(image, x.shape[1:3], "area")).mean() for x in coarse]
            losses["coarse"] = self.coarse * sum(errors) / len(errors)
        return recon, losses, {"latents": latents, "tokens": index[..., None]}

    def averages(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b n c"]:
        """Latents averaged to all scales."""
        return rows([resize(latents, size, "area") for size in self.spec.scales])
