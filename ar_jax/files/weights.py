"""Weight files in and out: safetensors, torch checkpoints, numpy pickles; no torch needed, no code run (see `pickles`).

What is read takes memory in proportion to the file: its table of contents has at most `CONTENTS` bytes, and arrays are views
of the mapped file that stand for little more than it holds.
"""

import contextlib
import io
import itertools
import json
import math
import mmap
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ar_jax.files import words
from ar_jax.files.pickles import CONTENTS, DTYPES, NUMPY, TORCH, Bounded, Refused, Storage, Tensor, Unpickler, plain
from ar_jax.files.places import local, made, path_of

WIDER = 4  # times the file's size that its tensors may stand for: rows can be repeated without being stored again
ENTRIES = ("model", "module", "state_dict")  # where checkpoints keep their weights, first come first served
SEVERAL = {*ENTRIES, "ema", "model_ema", "ema_model"}  # sets of weights in one dict, as first words of its keys
NO_WEIGHTS = re.compile("optim|scheduler|scaler", re.IGNORECASE)  # entries whose tensors are no weights of the model
DEPTH, LOOKS = 4, 2**20  # how deep in a file sets are looked for, and at how many values


def read_weights(path: str | os.PathLike, entry: str | None = None) -> dict[str, np.ndarray]:
    """Reads a flat state dict under its original key names.

    Arrays are read-only views of the mapped file; the checksums of torch files are compared first, and tied weights
    stay shared. bfloat16 and float8 arrays have the dtypes of ml_dtypes.

    Args:
      path: `.safetensors`, the `.index.json` of shards that lie beside it, or a file of `torch.save` (zip, or older than
        torch 1.6) under any other name.
      entry: which dict of a torch checkpoint, for example "ema", or "trainer.var" for a nested one; else
        the first of "model", "module", "state_dict" that holds tensors, or the top level.
    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, damaged, no such entry, or a pickle that names anything beyond tensors.
    """
    sets = open_weights(path)
    return sets.read(sets.usual() if entry is None else entry)


class WeightSets:
    """The sets of weights that a file holds.

    Attributes:
      sets: {dotted name: {key: array, or what one is made of; both have a `shape`}}; "" is the top level.
      others: {dotted name: keys beside the tensors of a set that hold no tensors}.
    """

    def __init__(self, path: Path, tree: Any, arrays: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]):
        self.path, self._tree, self._arrays = path, tree, arrays
        self.sets: dict[str, dict[str, Any]] = {}
        self.others: dict[str, list[str]] = {}
        self._left = LOOKS
        self._find(tree, ())

    def usual(self) -> str:
        """The one that is meant unless something else is said."""
        for name in (*ENTRIES, ""):
            if name in self.sets:
                return name
        names = ", ".join(ENTRIES)
        raise ValueError(
            f"{self.path}: no weights under {names} or at the top; choose with --entry NAME (entry= in Python); "
            f"{self._listed()}"
        )

    def read(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a set."""
        if name not in self.sets:
            if list(self.sets) == [""]:
                raise ValueError(f"{self.path}: its weights have no entries; leave out --entry {words.name(name)}")
            raise ValueError(f"{self.path}: entry {words.shown(name)} is not a dict of tensors; {self._listed()}")
        with _named(self.path):
            return self._arrays(self.sets[name])

    def _listed(self):
        """What the file holds, and the sets that lie deeper."""
        if not isinstance(self._tree, dict):
            return f"the file holds a {_kind(self._tree)}"
        top = {str(key): _kind(value) for key, value in itertools.islice(self._tree.items(), 20)}
        deep = {name: f"dict of {len(tensors)}" for name, tensors in itertools.islice(self.sets.items(), 20) if name}
        return "entries: " + ", ".join(f"{words.name(name)} ({kind})" for name, kind in (top | deep).items())

    def _find(self, tree, place):
        """Notes the sets in a tree; returns whether there are any. Dicts can be named often, or in circles: each look costs."""
        if not isinstance(tree, dict) or len(place) > DEPTH or len(tree) > self._left:
            return False
        self._left -= len(tree)
        inside = [
            self._find(value, (*place, key))
            for key, value in tree.items()
            if type(key) is str and not NO_WEIGHTS.search(key)
        ]
        tensors = {key: value for key, value in tree.items() if isinstance(value, (Tensor, np.ndarray))}
        if tensors and not any(inside) and all(type(key) is str for key in tensors):
            self._note(".".join(place), tensors, [str(key) for key in tree if key not in tensors])
            return True
        return any(inside)

    def _note(self, name, tensors, others):
        """Sets that lie in one dict, told apart by the first word of their keys, are sets of their own."""
        heads = {key.partition(".")[0] for key in tensors}
        if len(heads) == 1 or not heads <= SEVERAL:
            self.sets[name], self.others[name] = tensors, others
            return
        for head in heads:
            inner = f"{name}.{head}" if name else head
            self.sets[inner] = {
                k.partition(".")[2]: value for k, value in tensors.items() if k.partition(".")[0] == head
            }
            self.others[inner] = others


def open_weights(path: str | os.PathLike) -> WeightSets:
    """The sets of weights in a file; see `read_weights`."""
    path = _file(path)
    if path.suffix == ".json":
        return WeightSets(path, _read_index(path), dict)
    if path.suffix == ".safetensors":
        try:
            weights = _read_safetensors(path)
        except Exception as error:
            raise ValueError(f"{path} is no readable safetensors file ({words.reason(error)}); get it again") from error
        if not weights:
            raise ValueError(f"{path} holds no tensors")
        return WeightSets(path, weights, dict)
    with _named(path):
        checkpoint = _read_torch(path)
        return WeightSets(path, checkpoint.tree, checkpoint.arrays)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong is said of the file."""
    try:
        yield
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is damaged or no torch checkpoint ({words.reason(error)}); get it again") from error


def _read_index(path: Path) -> dict[str, np.ndarray]:
    """The weights of the shards that an index names, all of which lie beside it."""
    if path.stat().st_size > CONTENTS:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; of an index {CONTENTS} are read at most")
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        named = {str(key): name for key, name in places.items()}
    except Exception as error:
        raise ValueError(f"{path} is no index of shards ({words.reason(error)}); it needs a weight_map") from error
    weights = {}
    for name in sorted(set(map(str, named.values()))):
        if not name or Path(name).name != name or name.startswith(".") or "\\" in name or name.endswith(".json"):
            raise ValueError(f"{path}: its shard {words.shown(name)} must be the name of a file beside it")
        if not (path.parent / name).exists():
            raise FileNotFoundError(f"{path}: its shard {words.name(name)} is missing; get it too")
        shard = read_weights(path.parent / name)
        for key in (key for key, of in named.items() if of == name):
            if key not in shard:
                raise ValueError(f"{path}: {words.name(key)} is not in {words.name(name)}; get both again")
            weights[key] = shard[key]
    if not weights:
        raise ValueError(f"{path} names no tensors")
    return weights


def read_pickled_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a pickle of nested dicts of numpy arrays; plain scalars are kept.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, or the pickle names anything beyond numpy arrays.
    """
    path = _file(path)
    try:
        with path.open("rb") as file:
            tree = Unpickler(Bounded(file, path.stat().st_size), NUMPY).load()
        if not isinstance(tree, dict):
            raise Refused(f"the pickle is a {type(tree).__name__}, a dict of arrays was expected")
        return plain(tree)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise ValueError(f"{path} is damaged or no pickle of arrays ({words.reason(error)}); get it again") from error


def write_safetensors(path: str | os.PathLike, weights: Mapping[str, Any]) -> None:
    """Writes arrays (numpy or JAX) by name; the file appears under its name only when it is complete."""
    path = path_of(path)
    for key, value in weights.items():
        if not isinstance(key, str) or isinstance(value, Mapping):
            raise ValueError(
                f"{path}: safetensors files are flat, but {key!r} holds a {type(value).__name__}; "
                "give a dict from names to arrays"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with made(path, path.with_name(f".{path.name}.{os.getpid()}.tmp")) as part:
        part.touch()  # with the usual permissions, which the library alone would not give
        mode = part.stat().st_mode
        save_file({key: np.asarray(value, order="C") for key, value in weights.items()}, part)
        part.chmod(mode)


def _file(path: str | os.PathLike) -> Path:
    path = local(path_of(path))
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the weight file in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; name a file of weights")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; download it again")
    return path


def _mapped(file: BinaryIO) -> np.ndarray:
    """The whole file, uint8, read where it is looked at."""
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        data = _mapped(file)
    size = int.from_bytes(data[:8].tobytes(), "little")
    if size > min(CONTENTS, data.size - 8):
        raise ValueError(f"its header has {size} bytes, of {CONTENTS} at most and {data.size} in the file")
    with safe_open(path, "numpy"):  # which checks the header and that its tensors fill the file
        pass
    weights = {}
    for key, found in json.loads(data[8 : 8 + size].tobytes(), object_pairs_hook=_once).items():
        if key == "__metadata__":
            continue
        if found["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{words.name(key)} holds {words.shown(found['dtype'])}, which is not read")
        first, last = (8 + size + at for at in found["data_offsets"])
        array = np.require(data[first:last], requirements="A").view(_SAFETENSORS[found["dtype"]])
        weights[key] = array.reshape(found["shape"])
    return weights


_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
_SAFETENSORS = {name: DTYPES[dtype] for name, dtype in _SAFETENSORS.items()}


def _once(pairs):
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


# Torch checkpoints -----------------------------------------------------------------------------------------


class _Checkpoint(NamedTuple):
    tree: Any  # what was pickled, with `Tensor` in place of tensors
    data: np.ndarray  # uint8, the whole file, mapped
    blocks: dict[str, tuple[int, int]]  # storage key -> first byte and number of bytes
    byteorder: str

    def arrays(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        arrays, left = {}, WIDER * self.data.size + 2**20
        for key, tensor in tensors.items():
            arrays[key] = self._array(words.name(key), tensor, left)
            left -= arrays[key].nbytes
        return arrays

    def _array(self, key, tensor, most):
        storage, offset, shape, strides, dtype = tensor
        if not (isinstance(storage, Storage) and storage.key in self.blocks and dtype in DTYPES):
            raise Refused(f"tensor {key} has no storage or an unknown dtype ({words.shown((storage, dtype))})")
        if not (
            isinstance(shape, tuple)
            and isinstance(strides, tuple)
            and len(shape) == len(strides) <= 32
            and all(type(i) is int and 0 <= i < 2**60 for i in (offset, storage.first, *shape, *strides))
            and math.prod(shape) < 2**60
        ):
            raise Refused(f"tensor {key} has an impossible layout ({words.shown(tuple(tensor))})")
        dtype = DTYPES[dtype]
        if 0 in shape:
            return np.zeros(shape, dtype)
        if math.prod(shape) * dtype.itemsize > most:
            raise Refused(f"with tensor {key} it stands for many times its own size; save contiguous tensors")
        first, size = self.blocks[storage.key]
        offset += storage.first
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > size:
            raise Refused(f"tensor {key} reaches element {last} of a storage of {size // dtype.itemsize}")
        block, width = self.data[first : first + size], dtype.itemsize
        array = np.ndarray(shape, dtype, block, offset * width, [stride * width for stride in strides])
        return np.require(array, requirements="A") if self.byteorder == sys.byteorder else array.byteswap()


def _read_torch(path: Path) -> _Checkpoint:
    with path.open("rb") as file:
        data = _mapped(file)
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            return _read_zip(file, data)
        if start[:1] == b"\x80":
            return _read_legacy(file, data)
    raise Refused("not a weight file: expected .safetensors or a file written by torch.save")


def _read_zip(file: BinaryIO, data: np.ndarray) -> _Checkpoint:
    try:
        archive = zipfile.ZipFile(Bounded(file, CONTENTS))  # which reads nothing but the index
    except zipfile.BadZipFile as error:
        raise Refused(f"the file is cut short or damaged ({error}); get it again") from error
    with archive:
        records = {record.filename: record for record in archive.infolist()}
        if len(records) < len(archive.infolist()):
            raise Refused("two of its records have one name; get it again")
        roots = [
            name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise Refused(f"a zip file without the data.pkl of torch.save; it holds {words.shown(sorted(records))}")
        root = roots[0]
        spans, checked = {}, any(record.CRC for record in records.values())  # torch can be told to write none
        for name, record in records.items():
            if record.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"its record {words.name(name)} is compressed, which torch never does; save it anew")
            spans[name] = _record_span(record, data)
        end = 0
        for name, (first, size) in sorted(spans.items(), key=lambda item: item[1]):
            if (start := records[name].header_offset) < end:
                raise Refused(f"its record {words.name(name)} begins at byte {start}, within another one; get it again")
            end = first + size
            if checked and zlib.crc32(data[first:end]) != records[name].CRC:
                raise Refused(f"its record {words.name(name)} has other content than when it was saved; get it again")

    def content(name):
        first, size = spans[root + name]
        if size > CONTENTS:
            raise Refused(f"its {name} has {size} bytes; no more than {CONTENTS} are read")
        return data[first : first + size].tobytes()

    order = content("byteorder").decode() if root + "byteorder" in spans else "little"
    if order not in ("little", "big"):
        raise Refused(f"unknown byte order {words.shown(order)}")
    stored = root + "data/"
    blocks = {name.removeprefix(stored): span for name, span in spans.items() if name.startswith(stored)}
    pickled = content("data.pkl")
    unpickler = Unpickler(Bounded(io.BytesIO(pickled), len(pickled)), TORCH)
    return _Checkpoint(unpickler.load(), data, unpickler.checked(blocks), order)


def _record_span(record: zipfile.ZipInfo, data: np.ndarray) -> tuple[int, int]:
    """First byte and length of an uncompressed record, past its local header."""
    header, name = data[record.header_offset :][:30].tobytes(), words.name(record.filename)
    names, extra = struct.unpack("<HH", header[26:]) if len(header) == 30 else (0, 0)
    first = record.header_offset + 30 + names
    if header[:4] != b"PK\x03\x04" or data[first - names : first].tobytes() != record.orig_filename.encode(
        "utf-8" if record.flag_bits & 0x800 else "cp437"
    ):
        raise Refused(f"its record {name} is not where the index says; download it again")
    if first + extra + record.file_size > data.size:
        raise Refused(f"its record {name} is cut short; download it again")
    return first + extra, record.file_size


def _read_legacy(file: BinaryIO, data: np.ndarray) -> _Checkpoint:
    """The format before torch 1.6: five pickles, then every storage as its length and its elements."""
    bounded = Bounded(file, min(CONTENTS, data.size))
    if Unpickler(bounded, TORCH).load() != 0x1950A86A20F9469CFC6C:
        raise Refused("a pickle, but not one written by torch.save; save the state dict as .safetensors")
    if (version := Unpickler(bounded, TORCH).load()) != 1001:
        raise Refused(f"unknown version {words.shown(version)} of the torch format; load it in torch and save it again")
    order = "little" if Unpickler(bounded, TORCH).load()["little_endian"] else "big"
    unpickler = Unpickler(bounded, TORCH)
    tree = unpickler.load()
    keys = Unpickler(bounded, TORCH).load()
    blocks, first = {}, file.tell()
    for key in keys:
        (count,) = struct.unpack("<q" if order == "little" else ">q", data[first : first + 8].tobytes())
        if key not in unpickler.storages or key in blocks:
            raise Refused(f"its storage {words.shown(key)} is of no known type, or there twice")
        size = count * DTYPES[unpickler.storages[key][0]].itemsize
        if not 0 <= size <= data.size - first - 8:
            raise Refused("the file is cut short; download it again")
        blocks[key] = first + 8, size
        first += 8 + size
    return _Checkpoint(tree, data, unpickler.checked(blocks), order)


def _kind(value: Any) -> str:
    return type(value).__name__.strip("_").lower() + (f" of {len(value)}" if isinstance(value, dict) else "")
