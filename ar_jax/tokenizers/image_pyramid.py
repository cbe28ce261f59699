"""An image at several resolutions, each encoded by itself."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ar_jax.nets.resize import resize
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokens import sides
from ar_jax.typing import Array, Float, PRNGKey, typed


class ImagePyramid(LatentPyramid):
    """As `LatentPyramid`, but coarse grids are those of a smaller image.

    Attributes: as in `LatentPyramid`; an image has as many pixels for a token at every scale.
    Source: Hi-MAR (arXiv:2505.20288).
    """

    def at(self, scale: int) -> tuple[tuple[int, int], Callable[..., Any]]:
        """Size of the image at a scale, and the base's methods for it."""
        size = tuple(
            pixels * side // most
            for pixels, side, most in zip(self.base.size, sides(self.scales[scale]), self.base.grid)
        )
        base, variables = self.base.unbind()
        return size, lambda *args, **kwargs: base.clone(size=size).apply(variables, *args, **kwargs)

    def each(self, make: Callable[[int], Array]) -> Float[Array, "b n c"]:
        return jnp.concatenate([make(scale) for scale in range(len(self.scales))], axis=1)

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Float[Array, "b n c2"]:
        """Tokens of images in [-1, 1], of all scales; `key` as in the base."""

        def one(scale):
            size, base = self.at(scale)
            return base(resize(image, size), key=key, method="encode")

        return self.standardise(self.each(one))

    def moments(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c2"]:
        """Of the base, of all scales."""

        def one(scale):
            size, base = self.at(scale)
            return base(resize(image, size), method="moments")

        return self.each(one)

    def drawn(self, moments: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b n c"]:
        """Tokens of `moments`: those that `encode` draws with this key."""
        ends = [0]
        for scale in self.scales:
            ends.append(ends[-1] + math.prod(sides(scale)))

        def one(scale):
            return self.at(scale)[1](moments[:, ends[scale] : ends[scale + 1]], key=key, method="drawn")

        return self.standardise(self.each(one))
