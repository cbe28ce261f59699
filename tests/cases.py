"""Every method as one tiny line; `test_laws.py` runs all laws on each."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import Order, raster
from ar_jax.tokens import TokenSpec, grid

SPEC = TokenSpec(grid(3, 4), codes=(12,))
INFO = Info(classes=3, captions=True, text_rows=4, text_width=6)


def backwards(spec, key=None, images=1, train_step=0):
    """A fixed order other than raster."""
    return Order(np.arange(spec.n, dtype=np.int32)[None, ::-1].copy(), (1,) * spec.n)


def shuffled(spec, key=None, images=1, train_step=0):
    """An order per image."""
    random = np.random.default_rng(0)
    return Order(np.stack([random.permutation(spec.n) for _ in range(images)]).astype(np.int32), (1,) * spec.n)


@dataclasses.dataclass(frozen=True)
class Case:
    generator: Causal
    order: Callable = raster
    images: int = 4

    @functools.cached_property
    def params(self):
        """Random everywhere: zero-initialised readouts would make the laws hold trivially."""
        shapes = jax.eval_shape(self.generator.init_params, jax.random.key(0))
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return tree.unflatten([0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])

    @functools.cached_property
    def tokens(self):
        random, spec = np.random.default_rng(2), self.generator.spec
        return random.integers(spec.codes[0], size=(self.images, spec.n, len(spec.codes))).astype(np.int32)

    @functools.cached_property
    def batch(self):
        random = np.random.default_rng(3)
        mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool)[: self.images]
        text = random.normal(size=(*mask.shape, 6)).astype(np.float32) * mask[..., None]
        return {"label": np.arange(self.images, dtype=np.int32) % 3, "text": text, "text_mask": mask}


def _causal(conditioning, order=raster, head=Categorical(), **backbone):
    net = Transformer(layers=2, width=16, heads=2, hidden=24, **backbone)
    return Case(Causal(net, conditioning, head).complete(SPEC, INFO), order)


CASES = {
    "llamagen_label": _causal(Label(16)),
    "llamagen_caption": _causal(Caption(16)),
    "llamagen_remat": _causal(Label(16), remat="full"),
    "llamagen_chunk": _causal(Caption(16), head=Categorical(chunk=5), remat="dots"),
    "causal_backwards": _causal(Label(16), backwards),
    "causal_order_per_image": _causal(Caption(16), shuffled),
}
