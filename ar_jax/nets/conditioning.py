"""Conditions (class label, caption) as rows that come before the tokens.

Guided rows are neighbours: [cond0, uncond0, cond1, uncond1, ...].
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.data import Info
from ar_jax.nets.linear import look_up
from ar_jax.nets.transformer import init
from ar_jax.typing import Array, Batch, Bool, typed


@struct.dataclass
class Cond:
    """A condition, ready for the network.

    Attributes:
      rows: [B p d] rows before the first token; the last one predicts it.
      valid: bool [B p], rows that others may see, or None where all are.
      mod: what modulates the network, or None: from the conditioning a vector [B d], then what the network makes of it
        once for all its layers (`Backbone.modulate`).
    """

    rows: Array
    valid: Array | None = None
    mod: Any = None

    @property
    def step(self) -> np.ndarray:
        """Steps of the rows, int32 [p]: -(p-1)..0."""
        return np.arange(1 - self.rows.shape[1], 1, dtype=np.int32)


def paired(cond: Cond, uncond: Cond) -> Cond:
    """Interleaves two conditions of b images into one of 2b rows."""
    return jax.tree.map(lambda c, u: jnp.stack([c, u], axis=1).reshape(2 * len(c), *c.shape[1:]), cond, uncond)


def widen(x, ways: int):
    """Repeats a per-image array for every guided row of its image."""
    return x if ways == 1 else jnp.repeat(x, ways, axis=0)


def fold(x, ways: int, weight):
    """Combines guided rows [b*ways ...] to [b ...]: uncond + weight (cond - uncond). Weight 1 gives cond exactly."""
    if ways == 1:
        return x
    cond, uncond = jnp.moveaxis(x.reshape(-1, ways, *x.shape[1:]), 1, 0)
    return cond + (weight - 1) * (cond - uncond)


class Label(nn.Module):
    """One learned row per class, and one more for "no class".

    Attributes:
      width: of the network.
      classes: number of classes; 0 until the data is known (`complete`).
      std: of the rows at the start.
      apart: "no class" is a parameter of its own, as in MAR, instead of the table's last row.
    """

    width: int
    classes: int = 0
    std: float = 0.02
    apart: bool = False

    def complete(self, info: Info) -> "Label":
        if not info.classes:
            raise ValueError("generator.conditioning is Label but the data has no labels; give labelled data")
        return self.clone(classes=info.classes)

    def example(self) -> Batch:
        """A batch of one image's condition, for initialisation."""
        return {"label": jnp.zeros(1, jnp.int32)}

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """Looks up `batch["label"]`, int [b] in 0..classes (classes itself means none), dropped where `drop` is set."""
        std = nn.initializers.normal(self.std)
        table = self.param("embedding", std, (self.classes + (not self.apart), self.width))
        if self.apart:
            table = jnp.concatenate([table, self.param("none", std, (1, self.width))])
        row = look_up(table, jnp.where(drop, self.classes, batch["label"]))
        return Cond(row[:, None], mod=row)


class Classes(nn.Module):
    """What every class weighs, for networks that keep tables of classes themselves (`CodeTransformer`): of an image of a class
    that class alone.

    Attributes:
      none: there is one class more for "no class"; else an image without a class is of all classes alike.
      classes: number of classes; 0 until the data is known (`complete`).
    """

    none: bool = True
    classes: int = 0

    def complete(self, info: Info) -> "Classes":
        if not info.classes:
            raise ValueError("generator.conditioning is Classes but the data has no labels; give labelled data")
        return self.clone(classes=info.classes)

    def example(self) -> Batch:
        return {"label": jnp.zeros(1, jnp.int32)}

    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """`batch["label"]` as for `Label`."""
        label = jnp.where(drop, self.classes, batch["label"])
        weight = jax.nn.one_hot(label, self.classes + self.none)
        if not self.none:
            weight = jnp.where((label < self.classes)[:, None], weight, 1 / self.classes)
        return Cond(jnp.zeros((len(drop), 0, 1)), mod=weight)


class Captioned(nn.Module):
    """What conditionings by captions share; they have the fields `rows` and `features`, 0 until the data is known."""

    def complete(self, info: Info) -> "Captioned":
        if not info.text_width:
            raise ValueError(
                f"generator.conditioning is {type(self).__name__} but the data gives no caption features; set data.text to "
                "'minilm' or to a file of precomputed features"
            )
        return self.clone(rows=info.text_rows, features=info.text_width)

    def example(self) -> Batch:
        shape = (1, self.rows)
        return {"text": jnp.zeros((*shape, self.features), jnp.float32), "text_mask": jnp.ones(shape, bool)}


class Features(Captioned):
    """Caption features as they are, for networks that look at them (`CodeTransformer`).

    Attributes:
      learned: there are learned features for images without a caption, whose rows are all real; else these have zeros.
      unit: rows of captions are divided by their lengths.
      rows, features: of the captions; 0 until the data is known (`complete`).
    Source: VQ-Diffusion (arXiv:2111.14822), "learned" of its improved form (arXiv:2205.16007).
    """

    learned: bool = True
    unit: bool = True
    rows: int = 0
    features: int = 0

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """`batch["text"]` and `batch["text_mask"]` as for `Caption`."""
        text = jnp.asarray(batch["text"], jnp.float32)
        if self.unit:
            text = text / jnp.maximum(jnp.linalg.norm(text, axis=-1, keepdims=True), 1e-12)
        empty = jnp.zeros(text.shape[1:])
        if self.learned:
            empty = self.param("empty", nn.initializers.normal(self.features**-0.5), (self.rows, self.features))
        valid = jnp.asarray(batch["text_mask"], bool) | drop[:, None]
        return Cond(jnp.where(drop[:, None, None], empty, text), valid)


class Start(nn.Module):
    """One learned row for all images: no condition at all.

    Attributes:
      width: of the network.
    """

    width: int

    def complete(self, info: Info) -> "Start":
        return self

    def example(self) -> Batch:
        return {}

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        row = self.param("row", init, (1, self.width))
        return Cond(jnp.broadcast_to(row, (len(drop), 1, self.width)))


class Nothing(nn.Module):
    """No condition, and no row for it either.

    Attributes:
      width: of the network.
    """

    width: int

    def complete(self, info: Info) -> "Nothing":
        return self

    def example(self) -> Batch:
        return {}

    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        return Cond(jnp.zeros((len(drop), 0, self.width)))


class Caption(Captioned):
    """Caption features through a two-layer perceptron.

    Networks that are modulated get the mean of the caption's rows (of the real ones), the others the rows only.

    Attributes:
      width: of the network.
      rows: caption rows; captions are left-padded to it. 0 until the data is known (`complete`).
      features: width of the caption features; 0 until the data is known.
    """

    width: int
    rows: int = 0
    features: int = 0

    no_decay = ("uncond",)

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """Projects `batch["text"]`, float [b p c]; `batch["text_mask"]`, bool [b p], marks the real rows.

        Where `drop` is set the features are replaced by a fixed random block which is never trained; the mask stays.
        """
        std = nn.initializers.normal(self.features**-0.5)
        none = lax.stop_gradient(self.param("uncond", std, (self.rows, self.features)))
        text = jnp.where(drop[:, None, None], none, batch["text"])
        hidden = nn.gelu(nn.Dense(self.width, use_bias=False, kernel_init=init, name="fc1")(text), approximate=True)
        rows = nn.Dense(self.width, use_bias=False, kernel_init=init, name="fc2")(hidden)
        valid = jnp.asarray(batch["text_mask"], bool)
        mean = jnp.where(valid[..., None], rows, 0).sum(1) / jnp.maximum(valid.sum(1), 1)[:, None]
        return Cond(rows, valid, mean)
