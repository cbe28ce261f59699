"""Pixels: between uint8 files and the float images of the models, and grids of them."""

import math
import os

import jax.numpy as jnp
import numpy as np
from PIL import Image

from ar_jax.files.places import made, path_of
from ar_jax.typing import Array, Float, UInt8, typed


@typed
def to_float(image: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """uint8 to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


@typed
def to_uint8(image: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Float images to uint8 as the field's samplers do: clip(127.5 x + 128, 0, 255), truncated."""
    return jnp.clip(127.5 * image + 128, 0, 255).astype(jnp.uint8)


@typed
def tile(images: UInt8[np.ndarray, "b h w c"], columns: int = 0, gap: int = 2) -> UInt8[np.ndarray, "H W c"]:
    """One picture of all images, row by row on white; 0 columns makes it about square."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(count**0.5)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet


# by suffix, in small letters: format and how it is saved; JPEG is the only one that loses something
PICTURES = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}


def save_picture(path: str | os.PathLike, image: np.ndarray, text: dict[str, str] | None = None) -> None:
    """Writes a uint8 [h w 3] image in the format that the suffix says, all of it or nothing.

    Args:
      text: that a PNG holds.
    """
    from PIL.PngImagePlugin import PngInfo

    path = path_of(path)
    kind, how = PICTURES[path.suffix.lower()]
    if text:
        how = how | {"pnginfo": PngInfo()}
        for name, value in text.items():
            how["pnginfo"].add_text(name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with made(path) as part, open(part, "wb") as file:
        Image.fromarray(image).save(file, format=kind, **how)
