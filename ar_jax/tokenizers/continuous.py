"""What continuous tokenizers share: unit variance, patches of latent places as tokens, Gaussian posteriors."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.machine import shares
from ar_jax.machine.sharding import Rules
from ar_jax.tokens import Scale, sides
from ar_jax.typing import Array, Float, Params, PRNGKey, typed


class Measured:
    """Gives a tokenizer's numbers mean 0 and variance 1; for modules with these fields.

    Attributes:
      shift: mean of each channel, or one for all; () until it is measured (`train.measure`), which is no shift.
      scale: what centred channels are multiplied with, one each or one for all; () is 1.
    """

    MEASURED = ("shift", "scale")
    patch = 1  # of latent places in a token, of which channels are measured; else a field

    def standardise(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        shift, scale = self._shift_and_scale()
        return (x - shift) * scale

    def restore(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """The inverse of `standardise`."""
        shift, scale = self._shift_and_scale()
        return x / scale + shift

    def _shift_and_scale(self):
        if 0 in self.scale:
            raise ValueError(f"tokenizer.scale is {self.scale}; no channel can be multiplied with 0")
        return jnp.float32(self.shift or (0.0,)), jnp.float32(self.scale or (1.0,))


def cells(size: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of cells of so many pixels in an image.

    Raises:
      ValueError: they do not divide it.
    """
    (height, width), (rows, columns) = size, cell
    if height % rows or width % columns:
        needed = f"{rows} pixels" if rows == columns else f"{rows}x{columns} pixels"
        raise ValueError(f"tokenizer.size must be multiples of {needed}, got {size}")
    return height // rows, width // columns


@typed
def patchify(x: Float[Array, "b h w c"], patch: Scale) -> Float[Array, "b n c2"]:
    """Patches of places as tokens in raster order; numbers of a token: channel, row, column.

    Args:
      patch: side of a square, or (rows, columns).
    """
    b, h, w, c = x.shape
    rows, columns = sides(patch)
    x = x.reshape(b, h // rows, rows, w // columns, columns, c)
    return jnp.transpose(x, (0, 1, 3, 5, 2, 4)).reshape(b, -1, c * rows * columns)


@typed
def unpatchify(tokens: Float[Array, "b n c2"], grid: tuple[int, int], patch: Scale) -> Float[Array, "b h w c"]:
    """The inverse of `patchify`, for a grid of tokens."""
    height, width = grid
    rows, columns = sides(patch)
    x = tokens.reshape(len(tokens), height, width, -1, rows, columns)
    return jnp.transpose(x, (0, 1, 4, 2, 5, 3)).reshape(len(tokens), height * rows, width * columns, -1)


def noise(x: Array, key: PRNGKey | None) -> Array | float:
    """Unit normal numbers in the shape of x; 0 without a key."""
    return 0.0 if key is None else shares.draw(jax.random.normal, key, x.shape)


def draw(mean: Array, logvar: Array, noise: Array | float) -> Array:
    """A draw from diagonal Gaussians."""
    return mean + jnp.exp(0.5 * logvar) * noise


@typed
def kl_divergence(mean: Float[Array, "b *n"], logvar: Float[Array, "b *n"]) -> Float[Array, "b"]:
    """KL divergence of diagonal Gaussians from the unit Gaussian in nats, summed over everything but images."""
    each = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
    return each.sum(tuple(range(1, each.ndim)))


class Around:
    """A tokenizer made of another, `base`, with its images and parameters, and nothing to train of its own."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.base.size

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.base.channels

    @property
    def grid(self) -> tuple[int, int]:
        return self.base.grid

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.base.rules

    @property
    def draws(self) -> bool:
        return getattr(self.base, "draws", False)

    @property
    def generative(self) -> bool:
        return getattr(self.base, "generative", False)

    @property
    def last_layer(self) -> str:
        return getattr(self.base, "last_layer", "")

    def init_params(self, key: PRNGKey) -> Params:
        return self.base.init_params(key)

    def setup(self):
        nn.share_scope(self, self.base)
