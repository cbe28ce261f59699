"""Parts of a tokenizer's objective that make it careful with writing: pixels, edges and a reader's features where glyphs are.

Beyond Words (arXiv:2503.20198) reports that the tokenizer is what limits legible text; its losses are not published. All here is a
proposal: which parts there are, their weights, and that strokes are found in the image itself, where its author has boxes of text.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.train.losses import Part
from ar_jax.train.teachers import EfficientNet
from ar_jax.typing import Array, Float, Params, finite, typed

SOBEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32) / 8


@typed
def slopes(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c 2"]:
    """Change of every channel from pixel to pixel, to the right and down, by Sobel's filter; the border is continued."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = x.shape[1] - 2, x.shape[2] - 2

    def filtered(kernel):  # a sum of shifted images, exact on every machine
        return -sum(
            kernel[i, j] * x[:, i : i + height, j : j + width] for i in range(3) for j in range(3) if kernel[i, j]
        )

    return jnp.stack([filtered(SOBEL), filtered(SOBEL.T)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Strokes:
    """Finds where an image has strokes: grey changes by more than `contrast` a pixel within `reach` pixels.

    Sharp edges of other things are found too. A detector of text in its place is any function images [b h w c] in [-1, 1] ->
    numbers in [0, 1] [b h w].
    """

    contrast: float = 0.2
    """Change a pixel, of 2 from black to white."""
    reach: int = 2
    """Pixels by which what is found grows."""

    def __post_init__(self):
        finite("strokes.contrast", self.contrast, 0)
        if self.reach < 0:
            raise ValueError(f"strokes.reach is {self.reach}; it must be a number of pixels, 0 or more")

    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w"]:
        change = jnp.linalg.norm(slopes(image.mean(-1, keepdims=True)), axis=-1)
        found = (change > self.contrast).astype(jnp.float32)
        side = (2 * self.reach + 1,) * 2
        return jax.lax.stop_gradient(nn.max_pool(found, side, (1, 1), "SAME")[..., 0])


@dataclasses.dataclass(frozen=True)
class GlyphPixels(Part):
    """Mean over the image of mask times absolute difference: beside `Pixels` of weight 1, pixels of glyphs count 1 + `weight`."""

    weight: float = 4.0
    mask: Any = Strokes()
    """Where glyphs are; see `Strokes`."""

    on = "image"

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        return (self.mask(image)[..., None] * jnp.abs(made - image)).mean()


@dataclasses.dataclass(frozen=True)
class GlyphEdges(Part):
    """Mean over the image of mask times absolute difference of slopes, so that strokes stay sharp."""

    weight: float = 0.5
    mask: Any = Strokes()
    """Where glyphs are; see `Strokes`."""

    on = "image"

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        return (self.mask(image)[..., None, None] * jnp.abs(slopes(made) - slopes(image))).mean()


@dataclasses.dataclass(frozen=True)
class Reader(Part):
    """Mean squared difference of what a frozen text recogniser sees in the glyphs of both images; all else is shown as it is.

    Nothing is cropped, so that all shapes are static: outside of the mask the reader sees the original twice.
    """

    weight: float = 0.1
    network: Any = EfficientNet()
    """The recogniser: `open` reads its parameters, a call with them turns images in [-1, 1] into maps (`train.teachers`)."""
    mask: Any = Strokes()
    """Where glyphs are; see `Strokes`."""

    on = "image"

    def open(self) -> Params:
        return self.network.open()

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        shown = image + self.mask(image)[..., None] * (made - image)
        told, wanted = self.network(frozen, shown), jax.lax.stop_gradient(self.network(frozen, image))
        return jnp.square(told.astype(jnp.float32) - wanted.astype(jnp.float32)).mean()
