"""Networks by whose features images are judged: which weights, which resizing, and what a figure may be called."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.evals.efficientnet import EfficientNetLite0, efficientnet_params, packaged
from ar_jax.evals.inception import InceptionV3, inception_params
from ar_jax.files.places import local, path_of
from ar_jax.files.weights import read_weights
from ar_jax.typing import Array, Float, Params, UInt8, typed

VARIABLE = "AR_JAX_INCEPTION"  # environment variable with the path of InceptionV3's weights
# SHA-256 of the published file begins so: its name, pt_inception-2015-12-05-6726825d.pth, says it.
FID_HASH = "6726825d"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a tool of the field does to images and features.

    Attributes:
      resize: a key of `RESIZES`, to the network's size.
      shift, divide: pixels 0..255 become (x - shift) / divide.
      splits, split_size, shuffle: of the Inception Score (see `metrics.inception_score`).
      neighbour: of precision and recall.
    """

    resize: str
    shift: float = 128.0
    divide: float = 128.0
    splits: int = 10
    split_size: int = 0
    shuffle: int | None = 2020
    neighbour: int = 3


PROTOCOLS = {
    "adm": Protocol("tf1_bilinear", splits=0, split_size=5000, shuffle=None),
    "torch-fidelity": Protocol("tf1_bilinear"),
    "clean-fid": Protocol("pil_bicubic"),
    "pytorch-fid": Protocol("bilinear", 127.5, 127.5),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network and all that comes before it.

    Attributes:
      name: in words.
      suffix: of the names of its figures: "" for the one network whose distance is called FID, else "-NAME".
      module: gives "pool", "spatial" and "logits" of resized, scaled images.
      params: its parameters.
      size: side in pixels.
      resize, shift, divide: see `Protocol`.
      sha256: of the weight file.
    """

    name: str
    suffix: str
    module: nn.Module
    params: Params
    size: int
    resize: str
    shift: float
    divide: float
    sha256: str

    def __call__(self, params: Params, images: UInt8[Array, "b h w 3"]) -> dict[str, Float[Array, "b _"]]:
        """Features of uint8 images, by these parameters."""
        x = RESIZES[self.resize](images.astype(jnp.float32), (self.size, self.size))
        return self.module.apply({"params": params}, (x - self.shift) / self.divide)

    def facts(self) -> dict[str, Any]:
        """All that makes two figures comparable, JSON-able."""
        return {
            "network": self.name, "weights_sha256": self.sha256, "input_size": self.size, "resize": self.resize,
            "pixels": f"(x - {self.shift:g}) / {self.divide:g}",
        }  # fmt: skip


def open_network(name: str, protocol: Protocol, weights: str = "") -> Network:
    """Finds the weights of a network; nothing is downloaded.

    Args:
      name: "inception" or "efficientnet-lite0".
      protocol: its resizing and scaling; efficientnet-lite0 has its own.
      weights: path of the file; else that in the environment variable AR_JAX_INCEPTION, or in the package.
    Raises:
      ValueError: no path, or a file of another network.
    """
    if name == "efficientnet-lite0":
        path = path_of(weights or packaged())
        params = _read(path, efficientnet_params, "efficientnet-lite0")
        digest = file_hash(path)
        suffix = "-EffLite0" + ("" if digest.startswith("57934424") else f"[{digest[:8]}]")
        return Network(name, suffix, EfficientNetLite0(), params, 224, "pil_bicubic", 127.0, 128.0, digest)
    if name != "inception":
        raise ValueError(f"network is {name!r}; it must be inception or efficientnet-lite0")
    path = weights or os.environ.get(VARIABLE, "")
    if not path:
        raise ValueError(
            f"InceptionV3 has no weights: give --weights FILE or set {VARIABLE} to the file that pytorch-fid or "
            "torch-fidelity downloads (pt_inception-2015-12-05-6726825d.pth, weights-inception-2015-12-05-6726825d.pth), "
            "or judge offline by --network efficientnet-lite0"
        )
    params, digest = _read(path_of(path), inception_params, "the FID's InceptionV3"), file_hash(path)
    official = digest.startswith(FID_HASH)
    name, suffix = ("inception-2015-12-05", "") if official else ("inception-other", f"-Inception[{digest[:8]}]")
    return Network(name, suffix, InceptionV3(), params, 299, protocol.resize, protocol.shift, protocol.divide, digest)


def _read(path, convert, what):
    try:
        return convert(read_weights(path))
    except ValueError as error:
        raise ValueError(f"weights {path} are not those of {what}: {error}") from error


def file_hash(path: str | os.PathLike) -> str:
    with open(local(path_of(path)), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Resizing, as matrix products ------------------------------------------------------------------------------


def _resize(matrix: Callable[[int, int], np.ndarray], x: Array, size: tuple[int, int]) -> Array:
    for axis, n in zip((2, 1), size[::-1]):  # Pillow's order
        if x.shape[axis] != n:
            moved = jnp.tensordot(matrix(n, x.shape[axis]), x, (1, axis), precision=lax.Precision.HIGHEST)
            x = jnp.moveaxis(moved, 0, axis)
    return x


@typed
def pil_bicubic(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b H W c"]:
    """Pillow's bicubic filter (a = -0.5) with antialiasing, of float images clipped to [0, 255]: clean-fid's "clean"."""
    return jnp.clip(_resize(pil_matrix, x, size), 0, 255)


@typed
def tf1_bilinear(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b H W c"]:
    """TensorFlow 1's bilinear resize: pixel i looks at i times the scale, no half-pixel centres, no antialiasing."""
    return _resize(tf1_matrix, x, size)


@typed
def bilinear(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b H W c"]:
    """PyTorch's bilinear resize: half-pixel centres, no antialiasing."""
    return _resize(bilinear_matrix, x, size)


RESIZES = {"pil_bicubic": pil_bicubic, "tf1_bilinear": tf1_bilinear, "bilinear": bilinear}


@functools.lru_cache
def tf1_matrix(n: int, m: int) -> np.ndarray:
    """float32 [n m], from m pixels to n."""
    return _linear(np.arange(n, dtype=np.float32) * np.float32(m / n), m)


@functools.lru_cache
def bilinear_matrix(n: int, m: int) -> np.ndarray:
    """float32 [n m], from m pixels to n."""
    return _linear(np.maximum((np.arange(n) + 0.5) * m / n - 0.5, 0), m)


def _linear(place, m):
    low = np.floor(place).astype(int)
    part, matrix, rows = place - low, np.zeros((len(place), m)), np.arange(len(place))
    np.add.at(matrix, (rows, low), 1 - part)
    np.add.at(matrix, (rows, np.minimum(low + 1, m - 1)), part)
    return matrix.astype(np.float32)


@functools.lru_cache
def pil_matrix(n: int, m: int) -> np.ndarray:
    """float32 [n m], from m pixels to n; the filter widens when the image shrinks."""
    scale = m / n
    stretch = max(scale, 1.0)
    centre = (np.arange(n)[:, None] + 0.5) * scale
    pixel = np.arange(m)[None]
    first = np.maximum(np.floor(centre - 2 * stretch + 0.5), 0)
    last = np.minimum(np.floor(centre + 2 * stretch + 0.5), m)
    u, a = np.abs((pixel + 0.5 - centre) / stretch), -0.5
    near = (a + 2) * u**3 - (a + 3) * u**2 + 1
    far = a * u**3 - 5 * a * u**2 + 8 * a * u - 4 * a
    weight = np.where(u < 1, near, np.where(u < 2, far, 0)) * ((pixel >= first) & (pixel < last))
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)
