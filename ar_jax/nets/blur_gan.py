"""The discriminator of TiTok."""

import functools
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.typing import Array, Float, Params, Within, typed

BLUR = (1.0, 3.0, 3.0, 1.0)


class BlurGan(nn.Module):
    """Judges the places of an image on a grid: convolutions, each followed by a blur of every second place and a group norm.

    It takes the place of a `patchgan.PatchGan`, but has no running statistics. Whatever the size of the image, the largest values of
    neighbours are taken so that a grid of one size is left; cells of it overlap where the image has no multiple of it.

    Attributes:
      base_channels: of the first convolution and the first stage; doubled by every later one.
      stages: that halve the image.
      grid: side of the grid of logits.
      groups: of the group norms.
      dtype: of the convolutions; norms and logits are float32.
    Source: TiTok (arXiv:2406.07550), its released training.
    """

    base_channels: int = 128
    stages: Annotated[int, Within(1, 12)] = 3
    grid: Annotated[int, Within(1, 256)] = 16
    groups: int = 32
    leaky_slope: float = 0.1
    dtype: Any = jnp.float32

    rules = ()  # it stays whole

    def init_stats(self) -> Params:
        """None."""
        return {}

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b h w 3"], stats: Params, train: bool
    ) -> tuple[Float[Array, "b H W 1"], Params]:
        """Logits of places, high for real ones, of images in [-1, 1]; `stats` come back as they are."""

        def conv(x, features, side, name):
            return nn.Conv(
                features, (side, side), dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=name
            )(x)

        def bent(x):
            return nn.leaky_relu(x, self.leaky_slope)

        x = bent(conv((x + 1) / 2, self.base_channels, 5, "first"))
        for i in range(self.stages):
            x = blurred(conv(x, self.base_channels * 2**i, 3, f"conv{i}"))
            x = bent(nn.GroupNorm(self.groups, epsilon=1e-5, use_fast_variance=False, name=f"norm{i}")(x))
        x = largest(x, self.grid)
        x = conv(bent(conv(x, x.shape[-1], 1, "hidden")), 1, 5, "logits")
        return x.astype(jnp.float32), stats


@typed
def blurred(x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
    """Every second place of a map, after a blur of 4x4 places; what is missing around an odd side is added after it."""
    for axis in (1, 2):
        length = x.shape[axis]
        half = -(-length // 2)
        pad = [(0, 0)] * 4
        pad[axis] = (1, 2 * half + 1 - length)
        parts = jnp.pad(x, pad)
        parts = [jax.lax.slice_in_dim(parts, i, i + 2 * half - 1, 2, axis) * part for i, part in enumerate(BLUR)]
        x = sum(parts) / sum(BLUR)
    return x


@typed
def largest(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """The largest values in the cells of a grid, which overlap where they do not divide the map."""
    for axis in (1, 2):
        number, length = np.arange(side), x.shape[axis]
        first, end = number * length // side, -(-(number + 1) * length // side)
        some = [jnp.take(x, np.minimum(first + i, end - 1), axis) for i in range((end - first).max())]
        # the gradient of a maximum divides by how many values equal it, which are none where XLA computes them again
        x = functools.reduce(lambda a, b: jnp.where(a >= b, a, b), some)
    return x
