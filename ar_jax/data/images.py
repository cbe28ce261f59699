"""Image files to RGB, and crops. Crops take a PIL image or uint8 [h w 3] and return uint8 [size size 3]."""

import contextlib
import functools
import io
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from ar_jax.data.base import Unreadable
from ar_jax.files.places import content, path_of

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
LONGEST = 128  # times the short side
THIN = 8  # times the short side; crops of what is longer begin with a square of the source, or much more than they give is scaled
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
ORIENTATION = 0x0112  # of EXIF: 1 to 8
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(file: str | os.PathLike | IO[bytes], name: str = "", upright: bool = True) -> Image.Image:
    """The first frame of an image file as RGB.

    What the file holds decides, not its name, and nothing but `FORMATS` is decoded: Pillow would hand PostScript to
    Ghostscript, which runs it. Transparency shows white.

    Args:
      name: for messages.
      upright: turn the image as its EXIF orientation says, as viewers show it. The pipelines of the published models
        did not.
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
        try:
            return _decoded(opened, upright)
        except ValueError:
            if (bare := _without_texts(opened)) is None:
                raise
            return _decoded(bare, upright)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        raise Unreadable(name or str(file), error) from error


def _without_texts(file: str | os.PathLike | IO[bytes]) -> IO[bytes] | None:
    """A PNG without its texts: Pillow refuses those of more than a megabyte, and nobody asks for them here."""
    with open(file, "rb") if isinstance(file, (str, os.PathLike)) else contextlib.nullcontext(file) as content:
        content.seek(0)
        if content.read(len(PNG)) != PNG:
            return None
        kept = io.BytesIO()
        kept.write(PNG)
        while len(head := content.read(8)) == 8:
            size = int.from_bytes(head[:4], "big") + 4  # with its checksum
            if head[4:] in (b"tEXt", b"zTXt", b"iTXt"):
                content.seek(size, os.SEEK_CUR)
            else:
                kept.write(head + content.read(size))
    kept.seek(0)
    return kept


def _decoded(file: str | os.PathLike | IO[bytes], upright: bool) -> Image.Image:
    with Image.open(file, formats=_formats()) as image:
        if max(image.size) > LONGEST * min(image.size):
            raise ValueError(f"{image.width}x{image.height}: one side is more than {LONGEST} times the other")
        # Pillow only warns up to twice its limit, and a warning would pass unseen in a thread.
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is more than {Image.MAX_IMAGE_PIXELS} pixels")
        image.load()
        turn = TURNS.get(_orientation(image)) if upright else None
        image = to_rgb(image)
        return image if turn is None else image.transpose(turn)


@functools.cache
def _formats():
    """Those of `FORMATS` that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    """How a viewer would turn a loaded image; 1, as it is, if what it says of itself cannot be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's readers of EXIF and XMP raise what those of images do
        return 1


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
    """ADM's centre crop: the short side becomes `size`, the middle of the long side stays.

    Memory is bounded by that of the image and of the crop (see `THIN`), here and in `random_crop`.
    """
    image = _shrink(_cut(image, lambda most: most // 2), size)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_crop(
    image: Image.Image | np.ndarray, size: int, rng: np.random.Generator, min_fraction: float, max_fraction: float = 1.0
) -> np.ndarray:
    """ADM's random crop: a window anywhere, its side between the two fractions of the short side."""
    side = int(rng.integers(math.ceil(size / max_fraction), math.ceil(size / min_fraction) + 1))
    image = _shrink(_cut(image, lambda most: rng.integers(most + 1)), side)
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


def _cut(image: Image.Image | np.ndarray, place: Callable[[int], int]) -> Image.Image:
    """The image; of a thin one a square as large as its short side.

    Args:
      place: from the last pixel at which the square can begin to that at which it does.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    side = min(image.size)
    if max(image.size) <= THIN * side:
        return image
    begin = int(place(max(image.size) - side))
    left, top = (begin, 0) if image.width > side else (0, begin)
    return image.crop((left, top, left + side, top + side))


def _shrink(image: Image.Image, side: int) -> np.ndarray:
    """Short side to `side`: halved by a box filter while possible, bicubic the rest of the way (or up)."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
