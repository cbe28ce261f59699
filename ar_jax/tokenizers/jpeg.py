"""JPEG files as tokens: the bytes of a canonical encoder, one token each (JPEG-LM, arXiv:2408.08459)."""

import functools
import io
import re
from concurrent import futures
from typing import Annotated, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ar_jax.machine.distributed import cores
from ar_jax.nets.resize import touched
from ar_jax.tokenizers.host import OnHost
from ar_jax.tokens import Grammar, TokenSpec, grid
from ar_jax.typing import Array, Bool, Int, Size, Within

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
UNITS = {"4:4:4": (8, 8), "4:2:2": (8, 16), "4:2:0": (16, 16)}  # height and width of what is coded together
START, END = b"\xff\xd8", b"\xff\xd9"
FIRST_BYTE = 3  # codes: 0 padding, 1 beginning (the condition's row stands for it), 2 end, then the bytes
PADDING, BEGINNING, ENDED = range(FIRST_BYTE)
CODES = FIRST_BYTE + 256


def stream(image: np.ndarray, quality: int = 25, subsampling: Subsampling = "4:2:0", restart: int = 1) -> bytes:
    """The abbreviated JPEG file of an image, uint8 [h w 3]: baseline, standard Huffman tables, but without any table.

    Args:
      restart: a marker FF D0 to FF D7, in turn, follows every so many units of `UNITS`, but for the last. DC prediction begins
        anew there, so that each part decodes on its own.
    """
    return _saved(image, quality=quality, subsampling=subsampling, restart_marker_blocks=restart, streamtype=2)


@functools.lru_cache
def tables(quality: int = 25, subsampling: Subsampling = "4:2:0") -> bytes:
    """The file of the tables alone, the same for all images."""
    return _saved(np.zeros((8, 8, 3), np.uint8), quality=quality, subsampling=subsampling, streamtype=1)


def _saved(image, **how):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", **how)
    return file.getvalue()


def assembled(stream: bytes, tables: bytes) -> bytes:
    """A file that every viewer opens."""
    return stream[:2] + tables[2:-2] + stream[2:]


def pixels(file: bytes) -> np.ndarray:
    """The image of a file, uint8 [h w 3]."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def restart_markers(stream: bytes) -> np.ndarray:
    """Where restart markers lie and which they are, int32 [m 2]: offset of FF, number 0 to 7."""
    begins = header_length(stream)
    found = [(begins + m.start(), m[0][1] - 0xD0) for m in re.finditer(rb"\xff[\xd0-\xd7]", stream[begins:])]
    return np.array(found, np.int32).reshape(-1, 2)


def prefix(stream: bytes, rows: int) -> bytes:
    """The stream up to and including so many markers FF D7, each of which ends eight units; nothing if rows is 0."""
    ends = [offset + 2 for offset, number in restart_markers(stream) if number == 7]
    return stream[: ends[rows - 1]] if 0 < rows <= len(ends) else stream if rows else b""


def cleaned(text: bytes) -> bytes:
    """A stream from what a language model wrote: up to the first end marker, and with both markers put where they lack."""
    if text.startswith(START) and END in text:
        return text[: text.index(END) + 2]
    text = text if text.endswith(END) else text + END
    return text if text.startswith(START) else START + text


def header_length(stream: bytes) -> int:
    """Bytes before the coded image; its markers say how long they are."""
    at = 2
    while True:
        kind, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        at += 2 + length
        if kind == 0xDA:
            return at


@functools.lru_cache
def header(size: tuple[int, int], quality: int = 25, subsampling: Subsampling = "4:2:0", restart: int = 1) -> bytes:
    """What the streams of all images of a size begin with."""
    whole = stream(np.zeros((*size, 3), np.uint8), quality, subsampling, restart)
    return whole[: header_length(whole)]


@functools.lru_cache
def grammar(parts: int) -> Grammar:
    """Which byte may follow, so that a file has its markers: what every decoder needs to read it to its end.

    In each of the `parts` any byte may come; after FF only 00 or the part's restart marker, which begins the next part; after
    the last part the end marker, then the code for the end, then padding.
    """
    kinds = ["padding", "beginning", "ended", "00", "FF", *(f"D{i}" for i in range(8)), "D9", "other"]
    kind = np.full(CODES, kinds.index("other"), np.int32)
    kind[:FIRST_BYTE] = range(FIRST_BYTE)
    special = [int(name, 16) for name in kinds[FIRST_BYTE:-1]]
    kind[FIRST_BYTE + np.array(special)] = range(FIRST_BYTE, len(kinds) - 1)

    after = np.full((2 * parts + 2, len(kinds)), -1, np.int32)  # two states a part, then "end marker seen" and the end
    for part in range(parts):
        inside, marked, marker = 2 * part, 2 * part + 1, "D9" if part == parts - 1 else f"D{part % 8}"
        after[inside, FIRST_BYTE:] = inside
        after[inside, kinds.index("FF")] = marked
        after[marked, kinds.index("00")] = inside
        after[marked, kinds.index(marker)] = inside + 2
    after[-2, kinds.index("ended")] = after[-1, kinds.index("padding")] = 2 * parts + 1
    return Grammar(kind, after)


class JpegBytes(OnHost, nn.Module):
    """An image as the bytes of its JPEG file, without the header, which all files of a size share.

    Codes are 0 for padding, 1 for the beginning (unused: the condition's row stands for it), 2 for the end and 3 + byte; a file
    ends with its end marker and the code for the end. The paper merges bytes to a vocabulary of 320, which is not published;
    single bytes, and a header that is left out, are a proposal. Bytes depend on Pillow's JPEG library: cache tokens with the
    version that decodes them.

    Attributes:
      size: height and width of the images in pixels.
      length: slots of an image; what a shorter file leaves is padding.
      quality: of the encoder, 1 to 100.
      subsampling: of the colours; with 4:2:0 units of 16x16 pixels are coded together.
      restart: units between restart markers.
      longer: a file of more than `length` tokens is refused, or cut, as the paper cuts its sequences.
    """

    size: Size = (256, 256)
    length: Annotated[int, Within(2, 2**16)] = 12288
    quality: Annotated[int, Within(1, 100)] = 25
    subsampling: Subsampling = "4:2:0"
    restart: Annotated[int, Within(1, 2**16 - 1)] = 1
    longer: Literal["refuse", "cut"] = "refuse"

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of units; those at the border may reach beyond the image."""
        return tuple(-(-side // unit) for side, unit in zip(self.size, UNITS[self.subsampling]))

    @property
    def spec(self) -> TokenSpec:
        rows, columns = self.units
        rules = grammar(-(-rows * columns // self.restart))
        if rules.left[0] > self.length:
            raise ValueError(
                f"tokenizer.length is {self.length}; with its markers the shortest file has {rules.left[0]} tokens"
            )
        return TokenSpec(grid(1, self.length), codes=(CODES,), grammar=rules)

    def host_encode(self, images: np.ndarray) -> np.ndarray:
        """Tokens, int32 [b n 1], of images, uint8 [b h w c]; of one channel as of three alike.

        Raises:
          ValueError: images of another size, or a file that is too long.
        """
        if images.shape[1:3] != tuple(self.size):
            raise ValueError(
                f"images have {images.shape[1]}x{images.shape[2]} pixels, but the tokenizer takes {self.size}"
            )
        images = np.broadcast_to(images, (*images.shape[:3], 3))
        return np.stack(_each(self._tokens, images))[..., None]

    def host_decode(self, tokens: np.ndarray) -> np.ndarray:
        """Images, uint8 [b h w 3], of tokens [b n 1]. A file that is cut short is grey where its units lack.

        Raises:
          ValueError: bytes that are no JPEG file; of tokens that follow the grammar none are.
        """
        return np.stack(_each(self._image, np.asarray(tokens)[..., 0]))

    def file(self, tokens: np.ndarray) -> bytes:
        """The JPEG file, whole, that tokens [n] stand for."""
        ends = np.flatnonzero(tokens < FIRST_BYTE)
        body = (tokens[: ends[0] if len(ends) else None] - FIRST_BYTE).astype(np.uint8).tobytes()
        first = header(tuple(self.size), self.quality, self.subsampling, self.restart)
        return assembled(cleaned(first + body), tables(self.quality, self.subsampling))

    def known(self, tokens: Int[Array, "b n 1"], free: Bool[Array, "b H W"]) -> Bool[Array, "b n"]:
        """Tokens before the first part of the file that holds a free pixel: a file is completed, not mended within."""
        rows, columns = self.units
        low, right = (count * unit for count, unit in zip(self.units, UNITS[self.subsampling]))
        free = jnp.pad(free, ((0, 0), (0, low - self.size[0]), (0, right - self.size[1])))
        first = touched(free, (rows, columns)).reshape(len(free), -1).argmax(1) // self.restart
        byte = tokens[..., 0] - FIRST_BYTE
        after_mark = jnp.pad(byte[:, :-1] == 0xFF, ((0, 0), (1, 0)))
        marker = after_mark & (byte >= 0xD0) & (byte <= 0xD7)
        part = jnp.cumsum(marker, axis=1) - marker  # a marker ends the part before it
        return part < first[:, None]

    def _tokens(self, image):
        first = len(header(tuple(self.size), self.quality, self.subsampling, self.restart))
        body = np.frombuffer(stream(image, self.quality, self.subsampling, self.restart), np.uint8)[first:]
        tokens = np.append(body.astype(np.int32) + FIRST_BYTE, np.int32(ENDED))
        if len(tokens) > self.length and self.longer == "refuse":
            raise ValueError(
                f"tokenizer.length is {self.length}, but a JPEG file of quality {self.quality} has {len(tokens)} tokens; give "
                "more, a lower tokenizer.quality, or --tokenizer.longer cut"
            )
        tokens = tokens[: self.length]
        return np.pad(tokens, (0, self.length - len(tokens)), constant_values=PADDING)

    def _image(self, tokens):
        try:
            image = pixels(self.file(tokens))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"tokens are no JPEG file ({error}); draw them with the tokenizer's grammar") from error
        if image.shape[:2] != tuple(self.size):
            raise ValueError(f"tokens hold a JPEG file of {image.shape[:2]} pixels, not {tuple(self.size)}")
        return image


def _each(function, items):
    """A function of every item; of many by threads, as the codec lets others run meanwhile."""
    if len(items) < 8:
        return [function(item) for item in items]
    return list(_threads().map(function, items))


@functools.cache
def _threads():
    return futures.ThreadPoolExecutor(cores(), "jpeg")
