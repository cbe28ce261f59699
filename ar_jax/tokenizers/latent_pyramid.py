"""The pyramid of latents: what a continuous tokenizer says of an image, averaged to several sizes."""

import math
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.nets.resize import resize
from ar_jax.tokenizers.continuous import Around, Measured
from ar_jax.tokens import Scale, TokenSpec, maps, pyramid, rows, sides
from ar_jax.typing import Array, Float, Having, Index, Metrics, PRNGKey, Within, typed


class LatentPyramid(Around, Measured, nn.Module):
    """A continuous tokenizer whose grid of tokens is averaged to grids of several sizes; `decode` takes the last one.

    Its parameters are those of the tokenizer it is made of.

    Attributes:
      base: the tokenizer (`KLVAE`, `Patches`).
      scales: sides, or pairs (height, width), coarse to fine; the last one is the base's grid.
      via: side of the grid that a scale is enlarged to before it is averaged to the next one's; 0 is the last scale.
      shift, scale: see `Measured`; of the numbers of a token, on top of what the base does.
    Source: FlowAR (arXiv:2412.15205).
    """

    base: Annotated[nn.Module, Having("grid", "encode", "decode")]
    scales: tuple[Scale, ...] = (1, 2, 4, 8, 16)
    via: Annotated[int, Within(0, 1024)] = 0
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    adjustable = ("via",)

    @property
    def spec(self) -> TokenSpec:
        if not self.scales or sides(self.scales[-1]) != self.base.grid:
            raise ValueError(f"tokenizer.scales is {self.scales}, but its last one must be the base's {self.base.grid}")
        return TokenSpec(pyramid(self.scales), channels=self.base.spec.channels)

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Float[Array, "b n c2"]:
        """Tokens of images in [-1, 1], of all scales; `key` as in the base."""
        return self.pyramid_of(self.base.encode(image, key=key))

    def moments(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c2"]:
        """Of the base; the scales are made of what is drawn."""
        return self.base.moments(image)

    def drawn(self, moments: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b m c"]:
        """Tokens of `moments`, of all scales: those that `encode` draws with this key."""
        return self.pyramid_of(self.base.drawn(moments, key=key))

    def pyramid_of(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b m c"]:
        """Tokens of all scales from those of the base."""
        tokens = self.standardise(tokens)
        return self.averages(tokens.reshape(len(tokens), *self.base.grid, -1))

    def averages(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b n c"]:
        """Latents averaged to all scales."""
        return rows([resize(latents, size, "area") for size in self.spec.scales])

    @typed
    def embed(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The tokens themselves."""
        return tokens

    @typed
    def context(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The scale before in the size of each slot's own, enlarged and then averaged; zeros on the first scale.

        A level depends on the tokens of the level before it only, so later ones may be anything.
        """
        first, *others = self.spec.scales
        full = (self.via, self.via) if self.via else sides(self.scales[-1])
        before = maps(tokens, self.scales)[:-1]
        known = [resize(resize(x, full), size, "area") for x, size in zip(before, others)]
        return rows([jnp.zeros((len(tokens), *first, tokens.shape[-1])), *known])

    @typed
    def decode(self, tokens: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b H W c"]:
        """Images of the last scale, about [-1, 1] but not clipped; `key` is unused."""
        return self.base.decode(self.restore(tokens[:, -math.prod(sides(self.scales[-1])) :]))

    @typed
    def decode_until(self, tokens: Float[Array, "b n c2"], level: Index) -> Float[Array, "b H W c"]:
        """Images of a level, enlarged to the last one before they are decoded; later tokens may be anything."""
        last = sides(self.scales[-1])
        latents = jnp.stack([resize(x, last) for x in maps(tokens, self.scales)])[level]
        return self.base.decode(self.restore(latents.reshape(len(latents), -1, latents.shape[-1])))

    def autoencode(self, *arguments: Any, **named: Any) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass of the base."""
        return self.base.autoencode(*arguments, **named)
