"""A small evaluation for the training loop: how far images of the model lie from real ones."""

import jax
import numpy as np

from ar_jax.config import Stage
from ar_jax.data import Data, Source, Spread, batches
from ar_jax.evals.extract import Extractor
from ar_jax.evals.metrics import Gaussian, Moments, frechet
from ar_jax.evals.networks import PROTOCOLS, Network, open_network
from ar_jax.machine import distributed
from ar_jax.machine.sharding import batch_sharding, padded, put, replicated
from ar_jax.train.recipes import Recipe
from ar_jax.typing import Params


class Evaluation:
    """Parameters -> {"fd": FD-EffLite0} of images that the recipe's preview makes, against as many real ones.

    Conditions and keys are the same every time, so that only the parameters make a difference. Every process measures the
    same images on its own devices.

    Args:
      recipe: whose preview draws (generators) or reconstructs (tokenizers).
      stage: `evaluate_images`, `preview_images` at a time.
      kind: "generator" or "tokenizer".
      source, data: conditions, and images for tokenizers; tokens may stand in for images. A multiple of
        `preview_images` records.
      real_source, real: the images compared with.
      mesh: of the training.
      network: another judge than EfficientNet-Lite0.
    Raises:
      ValueError: no real images, fewer than two, or no weights.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        kind: str,
        source: Source,
        data: Data,
        real_source: Source,
        real: Data,
        mesh: jax.sharding.Mesh,
        network: Network | None = None,
    ):
        if real.name == "tokens":
            raise ValueError(
                "evaluate_every needs images, but data.name is tokens; name the images in data and give --tokens"
            )
        if stage.evaluate_images < 2:
            raise ValueError(f"evaluate_images is {stage.evaluate_images}; it must be at least 2")
        network = network or open_network("efficientnet-lite0", PROTOCOLS["clean-fid"])
        devices = len(jax.local_devices())
        self._extract = Extractor(network, -(-32 // devices) * devices)
        count = int(distributed.agreed(min(stage.evaluate_images, len(real_source))))
        self._real, self._count = (Spread(real_source, count), real), stage.evaluate_images
        self._batches = source, data, stage.preview_images
        self._frozen, self._mesh = put(recipe.frozen, replicated(mesh)), mesh
        # the preview of a tokenizer shows pairs of an image and its reconstruction
        pick = slice(1, None, 2) if kind == "tokenizer" else slice(None)
        self._draw = jax.jit(lambda *arguments: recipe.preview(*arguments)[0][pick], out_shardings=replicated(mesh))
        self._reference: Gaussian | None = None

    def __call__(self, params: Params) -> dict[str, float]:
        if self._reference is None:
            parts = batches(*self._real, batch=256, seed=0, train=False)
            self._reference = self._gaussian(batch["image"] for batch in parts)
        return {"fd": frechet(self._gaussian(self._images(params)), self._reference)}

    def _images(self, params):
        source, data, size = self._batches
        stream, left, i = batches(source, data, batch=size, seed=0, train=False), self._count, 0
        while left > 0:
            batch = put(padded(next(stream), self._mesh), batch_sharding(self._mesh))
            key = put(jax.random.fold_in(jax.random.key(0), i), replicated(self._mesh))
            images = np.asarray(self._draw(params, self._frozen, batch, key))[: min(size, left)]
            yield np.broadcast_to(images, (*images.shape[:3], 3))
            left, i = left - len(images), i + 1

    def _gaussian(self, parts):
        total = None
        for images in parts:
            new = Moments.of(self._extract(images)["pool"])
            total = new if total is None else total + new
        return total.gaussian()
