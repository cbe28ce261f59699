"""Strangers' pickles, read without running anything.

A pickle is a program that calls whatever it names. Here a name is looked up in a table of harmless stand-ins,
and a name that is not in the table ends the reading. Stand-ins are strings, or objects nothing can alter. A pickle makes
nothing larger than itself.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from ar_jax.files import words

CONTENTS = 2**22  # bytes that say what a file of weights holds: a pickle, a header, the index of a zip


class Refused(ValueError):
    """A reason that is shown to the user behind the file name."""


class Bounded(io.RawIOBase):
    """A file of which no more than so many bytes are read."""

    def __init__(self, file: BinaryIO, most: int):
        self.file, self.left = file, most

    def _take(self, count):
        self.left -= count
        if self.left < 0:
            raise Refused(
                f"it is damaged or no file of weights: what it says to hold takes more than the file, or {CONTENTS} bytes"
            )

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            at = self.file.tell()
            count = self.file.seek(0, io.SEEK_END) - at
            self.file.seek(at)
        self._take(count)
        return self.file.read(count)

    def readline(self, count: int = -1) -> bytes:
        line = self.file.readline(self.left + 1)
        self._take(len(line))
        return line

    def seek(self, *place: int) -> int:
        return self.file.seek(*place)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True


class Storage(NamedTuple):
    key: str
    dtype: str
    first: int  # element of the stored block at which this storage begins


class Tensor(NamedTuple):
    storage: Storage
    offset: int  # in elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Unpickler(pickle._Unpickler):
    """Knows the names of its table and nothing else.

    Python's own, not that in C, which makes room for the largest number that a pickle gives to an object, and crashes on
    keys that are nested deeply.
    """

    dispatch: ClassVar[dict[int, Callable]] = {
        code: act
        for code, act in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.INST, pickle.OBJ)
    }

    def __init__(self, file: Bounded, table: Mapping[str, Any]):
        super().__init__(file, encoding="utf-8")
        self.table, self.bounded = table, file
        self.storages: dict[str, tuple[str, int]] = {}  # dtype and number of elements of those named
        self.most = file.left  # what calls may make together

    def load_reduce(self):
        super().load_reduce()
        if isinstance(made := self.stack[-1], str | bytes | tuple | list | dict):
            self.most -= len(made)
            if self.most < 0:
                raise Refused("its pickle makes more than it holds")

    def load_setitem(self):
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        _check_keys(self.stack[::2])
        super().load_setitems()

    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}

    def checked(self, blocks: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Blocks of bytes, which have to be the storages that were named."""
        for key, (dtype, count) in self.storages.items():
            size = count * DTYPES[dtype].itemsize
            if key not in blocks:
                raise Refused(f"its storage {words.name(key)} is missing; get it again")
            if count and blocks[key][1] != size:  # 0: not told
                raise Refused(
                    f"its storage {words.name(key)} has {blocks[key][1]} bytes, but is named with {size}; get it again"
                )
        if unused := sorted(blocks.keys() - self.storages.keys()):
            raise Refused(f"its storage {words.name(unused[0])} belongs to no tensor; get it again")
        return blocks

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.table[f"{module} {name}"]
        except KeyError:
            raise Refused(
                f"refused, because its pickle names {words.name(f'{module}.{name}')}, which no weight file needs; "
                "nothing was executed. If you trust its source, load it in torch and save the state dict as "
                ".safetensors"
            ) from None

    def persistent_load(self, identity: Any) -> Storage:
        if self.table is not TORCH:
            raise Refused("the pickle refers to storages outside itself")
        kind, dtype, key, _, count, *view = identity
        known = kind == "storage" and type(key) is str and type(dtype) is str and dtype in DTYPES
        if not known or type(count) is not int or not 0 <= count < 2**60:
            raise Refused(f"unknown storage {words.shown(identity)}")
        if self.storages.setdefault(key, (dtype, count)) != (dtype, count):
            raise Refused(f"its storage {words.name(key)} is named twice, with different contents")
        return Storage(key, dtype, view[0][1] if view and view[0] else 0)


def _check_keys(keys):
    for key in keys:
        plain = key if type(key) is tuple and len(key) <= 16 else (key,)
        if not all(x is None or type(x) in (str, int, float, bool, bytes) for x in plain):
            raise Refused(f"its pickle has the key {words.shown(key)}; text and numbers are read")


class _Call:
    """What a pickle may call. BUILD, the opcode that sets attributes, finds `__setstate__` and is refused."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise Refused("refused, because its pickle alters a function; nothing was executed")


class _Object:
    """An object of which nothing is kept."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict):
    """An OrderedDict without the attributes that torch hangs on it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """A numpy dtype, by its code such as "f4" and its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        if self.code not in _CODES or self.order not in ("<", ">", "=", "|"):
            raise Refused(f"arrays of dtype {words.shown((self.order, self.code))}; only numbers are read")
        return np.dtype(self.order + self.code)


class _Array:
    """A numpy array, as its state: version, shape, dtype, column-major?, bytes."""

    __slots__ = ("state",)

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def numpy(self) -> np.ndarray:
        _, shape, dtype, columns, data = self.state
        if not (isinstance(dtype, _Dtype) and type(data) is bytes and isinstance(shape, tuple)):
            raise Refused("an array that holds something other than numbers")
        return np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if columns else "C")


def plain(tree: Any) -> Any:
    """What a pickle of `NUMPY` gave, with numpy's arrays in it."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, _Array):
        return tree.numpy()
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise Refused(f"the pickle holds a {type(tree).__name__}; only nested dicts of arrays are read")


def _tensor(storage, offset, shape, strides, *_: Any) -> Tensor:
    return Tensor(storage, offset, shape, strides, storage.dtype)


def _typed_tensor(storage, offset, shape, strides, _grad, _hooks, dtype, *_: Any) -> Tensor:
    return Tensor(storage, offset, shape, strides, dtype)


def _latin(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])


_CODES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
DTYPES = {
    name: np.dtype(name)
    for name in (
        "float64",
        "float32",
        "float16",
        "complex64",
        "complex128",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    )
}
DTYPES |= {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
NUMPY = {
    "numpy ndarray": "ndarray",
    "numpy dtype": _Call(_Dtype),
    "_codecs encode": _Call(_latin),
    "numpy.core.multiarray _reconstruct": _Call(lambda *_: _Array()),
    "numpy._core.multiarray _reconstruct": _Call(lambda *_: _Array()),
}
TORCH = NUMPY | {
    "numpy.core.multiarray scalar": _Call(lambda *_: _Object()),
    "numpy._core.multiarray scalar": _Call(lambda *_: _Object()),
    "collections OrderedDict": _Call(lambda: _Dict()),
    "argparse Namespace": _Object,
    "torch Size": _Call(tuple),
    "torch device": _Call(lambda *_: _Object()),
    "torch._utils _rebuild_tensor": _Call(_tensor),
    "torch._utils _rebuild_tensor_v2": _Call(_tensor),
    "torch._utils _rebuild_tensor_v3": _Call(_typed_tensor),
    "torch._utils _rebuild_parameter": _Call(lambda tensor, *_: tensor),
    "torch.storage UntypedStorage": "uint8",
    **{f"torch {name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch {name}": name for name in DTYPES},
}
