"""Long lists of strings in arrays: 100 million file names as objects would take 20 GB in every process."""

import os
from array import array
from collections.abc import Sequence


class Strings(Sequence[str]):
    """Strings as UTF-8, one after the other, and where each ends; grows at its end."""

    def __init__(self):
        self._text, self._ends = bytearray(), array("q")

    def append(self, text: str) -> None:
        self._text += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        end = self._ends[index]
        first = index % len(self)
        return self._text[self._ends[first - 1] if first else 0 : end].decode("utf-8", "surrogateescape")


class Paths(Sequence[str]):
    """Paths of files, of which many lie in one folder: its name is kept once."""

    def __init__(self):
        self._folders: dict[str, int] = {}
        self._heads: list[str] = []
        self._folder, self._names = array("i"), Strings()

    def append(self, path: str) -> None:
        head, name = os.path.split(path)
        if head not in self._folders:
            self._folders[head] = len(self._heads)
            self._heads.append(head)
        self._folder.append(self._folders[head])
        self._names.append(name)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> str:
        return os.path.join(self._heads[self._folder[index]], self._names[index])
