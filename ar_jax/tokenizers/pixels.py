"""Pixels themselves as tokens: patches of values 0..255, without a network."""

import math
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.tokenizers.continuous import cells, patchify, unpatchify
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Float, Int, Metrics, Params, PRNGKey, Size, Within, typed

VALUES = 256


class Pixels(nn.Module):
    """Square patches of 8-bit pixels, a sub-code for every value; has no parameters and loses nothing.

    Attributes:
      size: height and width of the images in pixels, multiples of `patch`.
      patch: side of a patch. Values of a token: channel, row, column.
      channels: of the image; 1 keeps the mean of three and gives it back thrice.
    """

    size: Size = (64, 64)
    patch: Annotated[int, Within(1, 2**6)] = 4
    channels: Annotated[int, Within(1, 3)] = 3

    @property
    def grid(self) -> tuple[int, int]:
        return cells(self.size, (self.patch, self.patch))

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), codes=(VALUES,) * (self.channels * self.patch**2))

    @property
    def rules(self) -> Rules:
        return ()

    def init_params(self, key: PRNGKey) -> Params:
        return {}

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n k"]:
        """Tokens of images in [-1, 1]; `key` is unused."""
        image = image.mean(-1, keepdims=True) if self.channels == 1 else image
        values = jnp.clip(jnp.round((image + 1) * 127.5), 0, VALUES - 1)
        return patchify(values, self.patch).astype(jnp.int32)

    @typed
    def embed(self, tokens: Int[Array, "b n k"]) -> Float[Array, "b n k"]:
        """The values in [-1, 1]."""
        return tokens / jnp.float32(127.5) - 1

    @typed
    def decode(self, tokens: Int[Array, "b n k"], *, key: PRNGKey | None = None) -> Float[Array, "b H W c"]:
        """Images in [-1, 1]; `key` is unused."""
        image = unpatchify(self.embed(tokens), self.grid, self.patch)
        return image.repeat(3, axis=-1) if self.channels == 1 else image

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """The image itself (its grey values if `channels` is 1); there is nothing to train."""
        return self.decode(self.encode(image)), {}, {}


def patch_of(codes: tuple[int, ...]) -> tuple[int, int]:
    """Channels (1 or 3) and side of the square patch that tokens of these sub-codes are.

    Raises:
      ValueError: they are no patches of pixels.
    """
    for channels in (1, 3):  # of no number both
        side = math.isqrt(len(codes) // channels)
        if side and channels * side**2 == len(codes) and set(codes) == {VALUES}:
            return channels, side
    raise ValueError(
        f"tokens must be square patches of pixels, as of the tokenizer Pixels, but they have {len(codes)} sub-codes of sizes "
        f"{tuple(sorted(set(codes)))[:4]}"
    )
