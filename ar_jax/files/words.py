"""Strangers' values in messages: short, on one line, without control characters."""

import reprlib
from typing import Any

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100
_short.maxlevel = 4


def shown(value: Any) -> str:
    """Any value, cut."""
    try:
        text = _short.repr(value)
    except ValueError:  # of more digits than Python converts
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."


def name(text: str) -> str:
    """A key or file name as it is, if it is plain and short."""
    return text if text.isprintable() and text.isascii() and len(text) <= 100 else shown(text)


def reason(error: BaseException) -> str:
    """What an error says, on one line; its kind too, unless it was raised to be read."""
    what = "".join(c if c.isprintable() else " " for c in str(error).strip().partition("\n")[0][:400])
    return what if type(error) is ValueError and what else f"{type(error).__name__}: {what}"
