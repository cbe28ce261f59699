"""Image files to RGB, and crops. Crops take a PIL image or uint8 [h w 3] and return uint8 [size size 3]."""

import functools
import io
import math
import os
import stat
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from ar_jax.data.base import Unreadable
from ar_jax.files.places import content, path_of

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
LONGEST = 128  # times the short side; crops begin by scaling the short side up


def read_image(file: str | os.PathLike | IO[bytes], name: str = "") -> Image.Image:
    """The first frame of an image file as RGB.

    What the file holds decides, not its name, and nothing but `FORMATS` is decoded: Pillow would hand PostScript to
    Ghostscript, which runs it. Transparency shows white. EXIF orientation is ignored, as in the pipelines of the
    published models.

    Raises:
      Unreadable: missing, no plain file, damaged, of another format, larger than Pillow's limit, longer than `LONGEST`
        times its short side, or samples without an agreed range.
    """
    try:
        opened = path_of(file) if isinstance(file, (str, os.PathLike)) else file
        if isinstance(opened, Path):
            if not stat.S_ISREG(os.stat(opened).st_mode):
                raise ValueError("it is no plain file")  # a pipe would be waited for
        elif isinstance(opened, os.PathLike):
            opened = io.BytesIO(content(opened))
        with Image.open(opened, formats=_formats()) as image:
            if max(image.size) > LONGEST * min(image.size):
                raise ValueError(f"{image.width}x{image.height}: one side is more than {LONGEST} times the other")
            # Pillow only warns up to twice its limit, and a warning would pass unseen in a thread.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than {Image.MAX_IMAGE_PIXELS} pixels")
            image.load()
            return to_rgb(image)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        raise Unreadable(name or str(file), error) from error


@functools.cache
def _formats():
    """Those of `FORMATS` that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit grey is scaled (Pillow would clip it), transparency is laid on white."""
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is what 16-bit PGM files open as
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit samples have no agreed range; convert the image to 8 or 16 bits")
        image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float samples have no agreed range; convert the image to 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_crop(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """ADM's centre crop: the short side becomes `size`, the middle of the long side stays."""
    image = _shrink(image, size)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_crop(
    image: Image.Image | np.ndarray, size: int, rng: np.random.Generator, min_fraction: float, max_fraction: float = 1.0
) -> np.ndarray:
    """ADM's random crop: a window anywhere, its side between the two fractions of the short side."""
    side = int(rng.integers(math.ceil(size / max_fraction), math.ceil(size / min_fraction) + 1))
    image = _shrink(image, side)
    top, left = (int(rng.integers(length - size + 1)) for length in image.shape[:2])
    return image[top : top + size, left : left + size]


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrors [... h w 3] left to right."""
    return image[..., ::-1, :]


def ten_crop(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Four corners (top left, top right, bottom left, bottom right) and centre, then their mirror images.

    Returns uint8 [10 size size 3]. LlamaGen gives it images centre-cropped to `int(1.1 * size)`.
    """
    image = np.asarray(image)
    bottom, right = image.shape[0] - size, image.shape[1] - size
    if min(bottom, right) < 0:
        raise ValueError(f"ten_crop to {size} pixels needs a larger image than {image.shape[1]}x{image.shape[0]}")
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    crops = np.stack([image[top : top + size, left : left + size] for top, left in corners])
    return np.concatenate([crops, flip(crops)])


def _shrink(image: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """Short side to `side`: halved by a box filter while possible, bicubic the rest of the way (or up)."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
