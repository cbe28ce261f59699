"""Pixels: between uint8 files and the float images of the models, and grids of them."""

import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from ar_jax.typing import Array, Float, UInt8, typed

OTHERS = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffixes of images that are no PNG files


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


def save_png(path: str | os.PathLike, image: np.ndarray, text: dict[str, str] | None = None) -> None:
    """Writes a uint8 [h w 3] image under a temporary name, then renames it: a PNG, or what its suffix says (`OTHERS`).

    Args:
      text: that a PNG holds.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_text(name, value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            kind = OTHERS.get(path.suffix.lower(), "PNG")
            Image.fromarray(image).save(file, format=kind, **({"pnginfo": info} if kind == "PNG" else {"quality": 95}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
