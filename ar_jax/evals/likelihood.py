"""Likelihood of images under generators of pixels, in bits a dimension."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.files.images import to_float
from ar_jax.loaded import Loaded
from ar_jax.tokenizers.pixels import VALUES, Pixels


def bits_per_dimension(
    model: Loaded, images: np.ndarray, labels: np.ndarray | None = None, *, draws: int = 1, seed: int = 0, batch: int = 50
) -> np.ndarray:
    """Minus log2 of the probability of every image, by its number of values, float64 [n].

    Exact for causal generators. For masked ones an estimate of an upper bound, the mean of random orders, which `draws` make
    more precise.

    Args:
      model: a generator of pixels.
      images: uint8 [n h w c].
      labels: int [n]; None measures the model without its condition.
      draws: of masks, for every image.
      batch: images at a time.
    Raises:
      ValueError: a generator that gives no likelihood, or tokens that are not the pixels themselves.
    """
    generator, tokenizer = model.generator, model.tokenizer
    if not (hasattr(generator, "nats") and hasattr(generator.head, "nats") and isinstance(tokenizer, Pixels)):
        raise ValueError(
            f"{type(generator).__name__} on {type(tokenizer).__name__} gives no likelihood of pixels; FractalGen's on Pixels do"
        )
    spec = generator.spec

    @jax.jit
    def nats(params, images, labels, drop, key):
        tokens = tokenizer.apply({"params": params["tokenizer"]}, to_float(images), method="encode")
        order_key, key = jax.random.split(key)
        order = model.order(spec, jax.random.split(order_key, len(images)), len(images), 0)
        run = functools.partial(generator.apply, {"params": params["generator"]}, drop=drop, key=key, method="nats")
        return run(tokens, {"label": labels}, order)

    rows = np.arange(-(-len(images) // batch) * batch) % len(images)  # the last batch is filled up
    given = np.zeros(len(images), np.int32) if labels is None else np.asarray(labels, np.int32)
    drop, total = jnp.full(batch, labels is None), np.zeros(len(images))
    for i in range(draws):
        for j, some in enumerate(rows.reshape(-1, batch)):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), j)
            found = np.asarray(nats(model.params, images[some], given[some], drop, key), np.float64)
            left = min(batch, len(images) - j * batch)
            total[some[:left]] += found[:left]
    return total / draws / math.log(2) / (spec.n * len(spec.codes))


def independent_bits(train: np.ndarray, images: np.ndarray, pseudo: float = 1 / 16) -> np.ndarray:
    """The same for a model whose pixels are independent, float64 [n]: each place has the histogram of its values in training.

    Args:
      train, images: uint8 [n ...].
      pseudo: counts that every value has beforehand.
    """
    train, images = (x.reshape(len(x), -1).astype(np.int64) for x in (train, images))
    places = np.arange(train.shape[1])
    count = np.full((train.shape[1], VALUES), pseudo)
    np.add.at(count, (np.broadcast_to(places, train.shape), train), 1)
    return -np.log2(count / count.sum(1, keepdims=True))[places, images].mean(1)
