"""Where things lie: on disks of this machine or mounted ones."""

import dataclasses
import os
import re
from typing import Any

_REMOTE = re.compile(r"(?:--[\w.-]+=)?([a-z][a-z0-9+]+):/+")  # `Path` takes one of two slashes


def on_disk(value: Any, where: str = "") -> Any:
    """The value, if none of its texts and paths names a place that only a network client reaches.

    Args:
      value: options, their fields, a list of arguments.
      where: their names, for the message.
    Raises:
      ValueError: one does.
    """
    if isinstance(value, (str, os.PathLike)):
        if found := _REMOTE.match(os.fspath(value)):
            raise ValueError(
                f"{f'{where} is ' * bool(where)}{os.fspath(value)!r}, but files are read and written on disks only; mount "
                f"the {found[1]} storage (with gcsfuse or s3fs, for example) and give the path"
            )
    elif isinstance(value, (list, tuple)):
        for one in value:
            on_disk(one, where)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            on_disk(getattr(value, field.name, None), f"{where}.{field.name}".lstrip("."))
    return value
