"""Continuous tokens without a network: patches of pixels."""

import math

import flax.linen as nn

from ar_jax.machine.sharding import Rules
from ar_jax.tokenizers.continuous import Measured, cells, patchify, unpatchify
from ar_jax.tokens import Scale, TokenSpec, grid, sides
from ar_jax.typing import Array, Float, Metrics, Params, PRNGKey, Size, typed


class Patches(Measured, nn.Module):
    """Patches of pixels as tokens; has no parameters and needs no training.

    Attributes:
      size: height and width of the images in pixels, multiples of those of `patch`.
      patch: side of a square, or (rows, columns).
      shift, scale: see `Measured`; of image channels.
      channels: of the image; 1 keeps the mean of three and gives it back thrice.
    """

    size: Size = (32, 32)
    patch: Scale = 4
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    channels: int = 3

    @property
    def grid(self) -> tuple[int, int]:
        return cells(self.size, sides(self.patch))

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), channels=self.channels * math.prod(sides(self.patch)))

    @property
    def rules(self) -> Rules:
        return ()

    def init_params(self, key: PRNGKey) -> Params:
        return {}

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Float[Array, "b n c2"]:
        """Tokens of images in [-1, 1]; `key` is unused."""
        image = image.mean(-1, keepdims=True) if self.channels == 1 else image
        return patchify(self.standardise(image), self.patch)

    @typed
    def embed(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The tokens themselves."""
        return tokens

    @typed
    def decode(self, tokens: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b H W c"]:
        """Images, about [-1, 1] but not clipped; `key` is unused."""
        image = self.restore(unpatchify(tokens, self.grid, self.patch))
        return image.repeat(3, axis=-1) if self.channels == 1 else image

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """The image itself (its grey values if `channels` is 1); there is nothing to train."""
        return self.decode(self.encode(image)), {}, {}
