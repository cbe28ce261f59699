"""Long work over numbered images, in chunks that are files: shared by processes, resumed, read back one by one."""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ar_jax.bench import matmul_peak
from ar_jax.evals.images import Images
from ar_jax.evals.networks import Network
from ar_jax.files.models import write_json
from ar_jax.files.places import made, seekable
from ar_jax.machine import distributed
from ar_jax.machine.flops import model_flops
from ar_jax.machine.sharding import make_mesh, put, put_batch, replicated

CHUNK = 256  # images in a file: what is done again after an interruption; part of no result


def in_chunks(
    folder: Path, identity: dict[str, Any], count: int, compute: Callable[[range], dict[str, np.ndarray]], name: str
) -> list[Path]:
    """Computes arrays for `count` numbered images and writes them to one .npz per chunk.

    Chunk i is done by process i modulo their number; chunks that are there already are kept.

    Args:
      folder: shared by all processes, of this work only.
      identity: JSON-able; what the arrays depend on.
      count: number of images.
      compute: rows -> arrays whose first axis runs over them, but for those named in the singular `_x`.
      name: for the progress bar.
    Returns:
      The files, in order; they are all there on every process.
    Raises:
      ValueError: the folder was begun with another identity.
    """
    identity = json.loads(json.dumps(identity | {"count": count, "chunk": CHUNK}))
    distributed.check_shared(folder.parent)
    if jax.process_index() == 0:
        _begin(folder, identity)
    distributed.barrier(f"{folder} is begun")
    files = [folder / f"{i:06d}.npz" for i in range(-(-count // CHUNK))]
    mine = [i for i in range(jax.process_index(), len(files), jax.process_count())]
    with tqdm(total=count, unit="image", desc=name, disable=jax.process_index() != 0) as bar:
        for i in mine:
            rows = range(i * CHUNK, min((i + 1) * CHUNK, count))
            if not files[i].exists():
                _write(files[i], compute(rows))
            bar.update(min(len(rows) * jax.process_count(), count - bar.n))
    distributed.barrier(f"{folder} is complete")
    distributed.seen(files)
    return files


def _begin(folder, identity):
    note = folder / "identity.json"
    if note.exists():
        if json.loads(note.read_text()) != identity:
            raise ValueError(f"{folder} holds an unfinished evaluation of another kind (see {note}); remove it")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and was not begun by an evaluation; remove it or give another --out")
    else:
        write_json(note, identity)


def _write(file, arrays):
    with made(file, file.with_name(f".{file.name}.{os.getpid()}.tmp")) as part, open(part, "wb") as out:
        np.savez(out, **arrays)


def read_chunks(files: list[Path]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of the chunks, one after the other.

    Raises:
      ValueError: a file is damaged; removing it mends that.
    """
    for file in files:
        try:
            with np.load(seekable(file), allow_pickle=False) as arrays:
                found = dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is damaged ({error}); remove it and run the same command again") from error
        yield found


def pixels_hash(images: np.ndarray) -> np.ndarray:
    """SHA-256 of uint8 images and their shape, as uint8 [32]."""
    images = np.ascontiguousarray(images)
    return np.frombuffer(hashlib.sha256(str(images.shape).encode() + images.tobytes()).digest(), np.uint8)


def joined_hash(parts: list[np.ndarray]) -> str:
    """One hash of the hashes of all chunks."""
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


class Ahead:
    """Reads the chunk that this process needs next while the one before is worked on."""

    def __init__(self, images: Images, count: int):
        self._images, self._count = images, count
        self._pool, self._waiting = futures.ThreadPoolExecutor(1), {}

    def read(self, rows: range) -> np.ndarray:
        reading = self._waiting.pop(rows.start, None) or self._pool.submit(self._images.read, rows)
        start = rows.start + CHUNK * jax.process_count()
        if start < self._count:
            following = range(start, min(start + CHUNK, self._count))
            self._waiting = {start: self._pool.submit(self._images.read, following)}
        return reading.result()


class Extractor:
    """A network on this process's devices; counts what it does.

    Args:
      network: judged by.
      batch: images at a time, over the devices.
    Raises:
      ValueError: the batch does not divide over the devices.
    """

    def __init__(self, network: Network, batch: int):
        self.mesh = make_mesh(devices=jax.local_devices())
        if batch < 1 or batch % self.mesh.size:
            raise ValueError(
                f"--batch is {batch}; it must be a positive multiple of the {self.mesh.size} local devices"
            )
        self.network, self.batch = network, batch
        self.images, self.seconds, self._shape = 0, 0.0, None
        self._params = put(network.params, replicated(self.mesh))
        self._program = jax.jit(network.__call__)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features float32 [n d] by name, of uint8 images [n h w 3].

        Raises:
          ValueError: features that are not finite.
        """
        if self._shape != images.shape[1:]:  # compile outside the count
            self._shape = images.shape[1:]
            jax.block_until_ready(self._run(np.zeros((self.batch, *self._shape), np.uint8)))
        start, found = time.perf_counter(), []
        for first in range(0, len(images), self.batch):
            part = images[first : first + self.batch]
            padded = np.resize(part, (self.batch, *part.shape[1:]))
            found.append(self._run(padded))  # not waited for: the next batch is prepared meanwhile
        found = jax.device_get(found)
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        features = {name: np.concatenate([part[name] for part in found])[: len(images)] for name in found[0]}
        for name, x in features.items():
            if not np.isfinite(x).all():
                raise ValueError(f"feature {name} of {self.network.name} is NaN or infinite; are the weights damaged?")
        return features

    def _run(self, images):
        with jax.set_mesh(self.mesh):  # a training may have set another one
            return self._program(self._params, put_batch({"image": images}, self.mesh)["image"])

    def speed(self) -> dict[str, float]:
        """Images per second of the network on this process, and its share of the measured peak of matrix products."""
        if not self.images:
            return {}
        rate = self.images / self.seconds
        one = jax.ShapeDtypeStruct((1, *self._shape), np.uint8)
        chips = 1 if jax.default_backend() == "cpu" else self.mesh.size  # virtual CPU devices share the cores
        share = rate * model_flops(self.network.__call__, self._params, one) / (matmul_peak(np.float32) * chips)
        return {"images_per_second": rate, "share_of_matmul_peak": share}
