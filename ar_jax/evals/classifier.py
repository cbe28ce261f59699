"""A small classifier trained on the data set itself: an offline judge of class-conditional samples."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ar_jax.data import Data
from ar_jax.evals.images import DataImages, labels_in
from ar_jax.evals.networks import pil_bicubic
from ar_jax.typing import Array, UInt8

LARGEST = 64  # side in pixels; larger images are reduced


class SmallNet(nn.Module):
    """Three stages of convolutions, two dense layers."""

    classes: int

    @nn.compact
    def __call__(self, x):
        for width in (16, 32, 64):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(x)


class Classifier(NamedTuple):
    """What was trained.

    Attributes:
      predict: uint8 images [n h w 3] -> labels int [n].
      accuracy: on held-out real images, which it was not trained on.
      facts: JSON-able: sizes, counts, accuracy.
      names: of the classes that it numbers; may be empty.
      params: of `SmallNet`.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    accuracy: float
    facts: dict[str, float | int | str]
    names: Sequence[str] = ()
    params: Mapping[str, Any] = {}


def train_classifier(data: Data, most: int = 20000, epochs: int = 8, batch: int = 100, seed: int = 0) -> Classifier:
    """Trains on at most so many images of a data set, and measures itself on the held-out split.

    Without such a split every tenth image is held out.

    Raises:
      ValueError: the data set has no classes.
    """
    try:
        held, real = (DataImages(dataclasses.replace(data, split=split), most) for split in ("test", "train"))
        train, test = np.arange(len(real)), np.arange(len(held))
    except ValueError:
        held = real = DataImages(dataclasses.replace(data, split="all"), most)
        test, train = np.arange(0, len(real), 10), np.flatnonzero(np.arange(len(real)) % 10)
    if real.labels is None:
        raise ValueError(f"data.name is {data.name}, which has no classes; label agreement needs some")
    images, labels = _small(real.read(range(len(real))))[train], real.labels[train]
    net, batch = SmallNet(real.classes), min(batch, len(train))
    steps = epochs * (len(train) // batch)
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt, image, label):
        def loss(params):
            logits = net.apply(params, image.astype(jnp.float32) / 127.5 - 1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        grads = jax.grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    @jax.jit
    def classify(params, image: UInt8[Array, "b h w 3"]):
        return net.apply(params, image.astype(jnp.float32) / 127.5 - 1).argmax(-1)

    params = net.init(jax.random.key(seed), jnp.zeros((1, *images.shape[1:])))
    opt, rng = tx.init(params), np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for first in range(0, len(order) - batch + 1, batch):
            rows = order[first : first + batch]
            dy, dx = rng.integers(-2, 3, 2)  # small shifts
            params, opt = update(params, opt, np.roll(images[rows], (dy, dx), (1, 2)), labels[rows])

    def predict(x):
        small, found = _small(x), []
        for first in range(0, len(small), 256):
            part = small[first : first + 256]
            padded = np.resize(part, (256, *part.shape[1:]))
            found.append(np.asarray(classify(params, padded))[: len(part)])
        return np.concatenate(found)

    accuracy = float(
        (predict(held.read(range(len(held))))[test] == labels_in(held, real.names, real.where)[test]).mean()
    )
    facts = {
        "classifier": f"three stages of convolutions, AdamW, {epochs} epochs", "images": len(train), "seed": seed,
        "data": data.name, "held_out_images": len(test), "held_out_accuracy": accuracy,
    }  # fmt: skip
    return Classifier(predict, accuracy, facts, real.names, params["params"])


def _small(images):
    side = min(max(images.shape[1:3]), LARGEST)
    if images.shape[1:3] == (side, side):
        return images
    parts = [
        np.asarray(pil_bicubic(images[i : i + 256].astype(np.float32), (side, side)))
        for i in range(0, len(images), 256)
    ]
    return np.rint(np.concatenate(parts)).astype(np.uint8)
