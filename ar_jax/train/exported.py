"""A frozen network as a program of `jax.export`.

It lies apart from the other teachers because a program is somebody's code: a model folder that names one is opened only where
this module is trusted (see `files.trust`).
"""

import dataclasses
import functools

import jax
import jax.export

from ar_jax.files.places import path_of
from ar_jax.files.weights import read_weights
from ar_jax.typing import Array, Float, Params


@dataclasses.dataclass(frozen=True)
class Exported:
    """Any network (DINO, CLIP, SigLIP), as a file that `jax.export` wrote: no code but the program itself is run.

    The function takes images float32 [b h w 3] in [-1, 1], does its own resizing, and returns a map [b H W c].
    """

    path: str = ""
    """File of `jax.export.export(jax.jit(function))(...).serialize()`; give the batch a symbolic size to serve any."""
    weights: str = ""
    """File of arrays by name, which the function takes as a dict before the images; empty if it has them inside."""

    def open(self) -> Params:
        if not path_of(self.path).is_file():
            raise ValueError(f"losses.teacher.network.path is {self.path!r}, which is no file")
        return dict(read_weights(self.weights)) if self.weights else {}

    def __call__(self, params: Params, image: Array) -> Float[Array, "b h w c"]:
        return _program(self.path).call(*([params] if self.weights else []), image)


@functools.lru_cache
def _program(path):
    try:
        return jax.export.deserialize(bytearray(path_of(path).read_bytes()))
    except ImportError as error:
        raise ValueError(f"losses.teacher.network.path is {path!r}; to read it, pip install flatbuffers") from error
