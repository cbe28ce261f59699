"""Weight files in and out: safetensors, torch checkpoints, numpy pickles; no torch needed, no code run.

A pickle is a program that calls whatever it names. Here a name is looked up in a table of harmless stand-ins,
and a name that is not in the table ends the reading. Stand-ins are strings, or objects nothing can alter.
"""

import io
import mmap
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

ENTRIES = ("model", "module", "state_dict")  # where checkpoints keep their weights, first come first served


def read_weights(path: str | os.PathLike, entry: str | None = None) -> dict[str, np.ndarray]:
    """Reads a flat state dict under its original key names.

    Arrays of torch files are read-only views of the mapped file, whose checksums are compared first, and tied weights
    stay shared. bfloat16 and float8 arrays have the dtypes of ml_dtypes.

    Args:
      path: `.safetensors`, or a file of `torch.save` (zip, or older than torch 1.6) under any other name.
      entry: which dict of a torch checkpoint, for example "ema", or "trainer.var" for a nested one; else
        the first of "model", "module", "state_dict" that is a dict of tensors, or the top level.
    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, damaged, no such entry, or a pickle that names anything beyond tensors.
    """
    path = _file(path)
    if path.suffix == ".safetensors":
        if entry is not None:
            raise ValueError(f"{path}: safetensors files have no entries; leave out entry={entry!r}")
        try:
            weights = load_file(path)
        except Exception as error:
            raise ValueError(f"{path} is no readable safetensors file ({error}); get it again") from error
        if not weights:
            raise ValueError(f"{path} holds no tensors")
        return weights
    try:
        checkpoint = _read_torch(path)
        tensors = _pick(checkpoint.tree, entry)
        return {key: checkpoint.array(key, tensor) for key, tensor in tensors.items()}
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is damaged or no torch checkpoint ({error!r}); get it again") from error


def read_pickled_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a pickle of nested dicts of numpy arrays; plain scalars are kept.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, or the pickle names anything beyond numpy arrays.
    """
    path = _file(path)
    try:
        with path.open("rb") as file:
            tree = _Unpickler(file, _NUMPY).load()
        if not isinstance(tree, dict):
            raise _Refused(f"the pickle is a {type(tree).__name__}, a dict of arrays was expected")
        return _arrays(tree)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise ValueError(f"{path} is damaged or no pickle of arrays ({error!r}); get it again") from error


def write_safetensors(path: str | os.PathLike, weights: Mapping[str, Any]) -> None:
    """Writes arrays (numpy or JAX) by name; the file appears under its name only when it is complete."""
    path = Path(path)
    for key, value in weights.items():
        if not isinstance(key, str) or isinstance(value, Mapping):
            raise ValueError(
                f"{path}: safetensors files are flat, but {key!r} holds a {type(value).__name__}; "
                "give a dict from names to arrays"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # with the usual permissions, which the library alone would not give
        mode = temporary.stat().st_mode
        save_file({key: np.asarray(value, order="C") for key, value in weights.items()}, temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the weight file in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; download it again")
    return path


# Torch checkpoints -----------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    key: str
    dtype: str
    first: int  # element of the stored block at which this storage begins


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class _Checkpoint(NamedTuple):
    tree: Any  # what was pickled, with `_Tensor` in place of tensors
    data: np.ndarray  # uint8, the whole file, mapped
    blocks: dict[str, tuple[int, int]]  # storage key -> first byte and number of bytes
    byteorder: str

    def array(self, key: str, tensor: _Tensor) -> np.ndarray:
        storage, offset, shape, strides, dtype = tensor
        if not (isinstance(storage, _Storage) and storage.key in self.blocks and dtype in _DTYPES):
            raise _Refused(f"tensor {key!r} has no storage or an unknown dtype ({storage}, {dtype})")
        if not (
            isinstance(shape, tuple)
            and isinstance(strides, tuple)
            and len(shape) == len(strides)
            and all(type(i) is int and i >= 0 for i in (offset, storage.first, *shape, *strides))
        ):
            raise _Refused(f"tensor {key!r} has an impossible layout ({tensor})")
        dtype = _DTYPES[dtype]
        if 0 in shape:
            return np.zeros(shape, dtype)
        first, size = self.blocks[storage.key]
        offset += storage.first
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > size:
            raise _Refused(f"tensor {key!r} reaches element {last} of a storage of {size // dtype.itemsize}")
        block, width = self.data[first : first + size], dtype.itemsize
        array = np.ndarray(shape, dtype, block, offset * width, [stride * width for stride in strides])
        return np.require(array, requirements="A") if self.byteorder == sys.byteorder else array.byteswap()


def _read_torch(path: Path) -> _Checkpoint:
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            return _read_zip(file, data)
        if start[:1] == b"\x80":
            return _read_legacy(file, data)
    raise _Refused("not a weight file: expected .safetensors or a file written by torch.save")


def _read_zip(file: BinaryIO, data: np.ndarray) -> _Checkpoint:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise _Refused(f"the file is cut short or damaged ({error}); get it again") from error
    with archive:
        records = {record.filename: record for record in archive.infolist()}
        if len(records) < len(archive.infolist()):
            raise _Refused("two of its records have one name; get it again")
        roots = [
            name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise _Refused(f"a zip file without the data.pkl of torch.save; it holds {sorted(records)[:5]}")
        root = roots[0]
        spans, checked = {}, any(record.CRC for record in records.values())  # torch can be told to write none
        for name, record in records.items():
            if record.compress_type != zipfile.ZIP_STORED:
                raise _Refused(f"its record {name} is compressed, which torch never does; save it anew")
            first, size = spans[name] = _record_span(record, data)
            if checked and zlib.crc32(data[first : first + size]) != record.CRC:
                raise _Refused(f"its record {name} has other content than when it was saved; get it again")

    def content(name):
        first, size = spans[root + name]
        return data[first : first + size].tobytes()

    order = content("byteorder").decode() if root + "byteorder" in spans else "little"
    if order not in ("little", "big"):
        raise _Refused(f"unknown byte order {order!r}")
    stored = root + "data/"
    blocks = {name.removeprefix(stored): span for name, span in spans.items() if name.startswith(stored)}
    return _Checkpoint(_Unpickler(io.BytesIO(content("data.pkl")), _TORCH).load(), data, blocks, order)


def _record_span(record: zipfile.ZipInfo, data: np.ndarray) -> tuple[int, int]:
    """First byte and length of an uncompressed record, past its local header."""
    header = data[record.header_offset :][:30].tobytes()
    if header[:4] != b"PK\x03\x04":
        raise _Refused(f"its record {record.filename} is not where the index says; download it again")
    first = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if first + record.file_size > data.size:
        raise _Refused(f"its record {record.filename} is cut short; download it again")
    return first, record.file_size


def _read_legacy(file: BinaryIO, data: np.ndarray) -> _Checkpoint:
    """The format before torch 1.6: five pickles, then every storage as its length and its elements."""
    if _Unpickler(file, _TORCH).load() != 0x1950A86A20F9469CFC6C:
        raise _Refused("a pickle, but not one written by torch.save; save the state dict as .safetensors")
    if (version := _Unpickler(file, _TORCH).load()) != 1001:
        raise _Refused(f"unknown version {version} of the torch format; load it in torch and save it again")
    order = "little" if _Unpickler(file, _TORCH).load()["little_endian"] else "big"
    unpickler = _Unpickler(file, _TORCH)
    tree = unpickler.load()
    keys = _Unpickler(file, _TORCH).load()
    blocks, first = {}, file.tell()
    for key in keys:
        (count,) = struct.unpack("<q" if order == "little" else ">q", data[first : first + 8].tobytes())
        if key not in unpickler.dtypes:
            raise _Refused(f"its storage {key!r} is of no known type")
        size = count * _DTYPES[unpickler.dtypes[key]].itemsize
        if not 0 <= size <= data.size - first - 8:
            raise _Refused("the file is cut short; download it again")
        blocks[key] = first + 8, size
        first += 8 + size
    return _Checkpoint(tree, data, blocks, order)


def _pick(tree: Any, entry: str | None) -> dict[str, _Tensor]:
    found = tree
    if entry is not None:
        for part in entry.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if _holds_tensors(found):
            return found
        raise _Refused(f"entry {entry!r} is not a dict of tensors; {_entries(tree)}")
    if isinstance(tree, dict):
        for found in (*map(tree.get, ENTRIES), tree):
            if _holds_tensors(found):
                return found
    names = ", ".join(ENTRIES)
    raise _Refused(f"no weights under {names} or at the top; choose with entry=; {_entries(tree)}")


def _holds_tensors(tree: Any) -> bool:
    return (
        isinstance(tree, dict)
        and bool(tree)
        and all(isinstance(key, str) and isinstance(value, _Tensor) for key, value in tree.items())
    )


def _entries(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"the file holds a {_kind(tree)}"
    return "entries: " + ", ".join(f"{key} ({_kind(value)})" for key, value in list(tree.items())[:20])


def _kind(value: Any) -> str:
    return type(value).__name__.strip("_").lower() + (f" of {len(value)}" if isinstance(value, dict) else "")


# The restricted machine ------------------------------------------------------------------------------------


class _Refused(ValueError):
    """A reason that is shown to the user behind the file name."""


class _Unpickler(pickle.Unpickler):
    """Knows the names of its table and nothing else."""

    def __init__(self, file: BinaryIO, table: Mapping[str, Any]):
        super().__init__(file, encoding="utf-8")
        self.table = table
        self.dtypes: dict[str, str] = {}  # of the storages seen

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.table[f"{module} {name}"]
        except KeyError:
            raise _Refused(
                f"refused, because its pickle names {module}.{name}, which no weight file needs; "
                "nothing was executed. If you trust its source, load it in torch and save the state dict as "
                ".safetensors"
            ) from None

    def persistent_load(self, identity: Any) -> _Storage:
        if self.table is not _TORCH:
            raise _Refused("the pickle refers to storages outside itself")
        kind, dtype, key, _, _, *view = identity
        if kind != "storage" or type(key) is not str or type(dtype) is not str or dtype not in _DTYPES:
            raise _Refused(f"unknown storage {identity!r}")
        self.dtypes[key] = dtype
        return _Storage(key, dtype, view[0][1] if view and view[0] else 0)


class _Call:
    """What a pickle may call. BUILD, the opcode that sets attributes, finds `__setstate__` and is refused."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("refused, because its pickle alters a function; nothing was executed")


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
            raise _Refused(f"arrays of dtype {self.order!r}{self.code!r}; only numbers are read")
        return np.dtype(self.order + self.code)


class _Array:
    """A numpy array, as its state: version, shape, dtype, column-major?, bytes."""

    __slots__ = ("state",)

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def numpy(self) -> np.ndarray:
        _, shape, dtype, columns, data = self.state
        if not (isinstance(dtype, _Dtype) and type(data) is bytes and isinstance(shape, tuple)):
            raise _Refused("an array that holds something other than numbers")
        return np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if columns else "C")


def _arrays(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _arrays(value) for key, value in tree.items()}
    if isinstance(tree, _Array):
        return tree.numpy()
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise _Refused(f"the pickle holds a {type(tree).__name__}; only nested dicts of arrays are read")


def _tensor(storage, offset, shape, strides, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides, storage.dtype)


def _typed_tensor(storage, offset, shape, strides, _grad, _hooks, dtype, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides, dtype)


def _latin(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])


_CODES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
_DTYPES = {
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
_DTYPES |= {
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
_NUMPY = {
    "numpy ndarray": "ndarray",
    "numpy dtype": _Call(_Dtype),
    "_codecs encode": _Call(_latin),
    "numpy.core.multiarray _reconstruct": _Call(lambda *_: _Array()),
    "numpy._core.multiarray _reconstruct": _Call(lambda *_: _Array()),
}
_TORCH = _NUMPY | {
    "numpy.core.multiarray scalar": _Call(lambda *_: _Object()),
    "numpy._core.multiarray scalar": _Call(lambda *_: _Object()),
    "collections OrderedDict": _Call(_Dict),
    "argparse Namespace": _Object,
    "torch Size": _Call(tuple),
    "torch device": _Call(lambda *_: _Object()),
    "torch._utils _rebuild_tensor": _Call(_tensor),
    "torch._utils _rebuild_tensor_v2": _Call(_tensor),
    "torch._utils _rebuild_tensor_v3": _Call(_typed_tensor),
    "torch._utils _rebuild_parameter": _Call(lambda tensor, *_: tensor),
    "torch.storage UntypedStorage": "uint8",
    **{f"torch {name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch {name}": name for name in _DTYPES},
}
