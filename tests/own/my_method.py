"""A toy method in a file of one's own: a tokenizer, an order, a head and a generator, each a small change of one that is
there. README shows two of them; `tests/test_own_method.py` trains it and draws from it without an edit in ar_jax."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.orders import Order
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec


def backwards(spec: TokenSpec, keys=None, images=1, train_step=0) -> Order:
    """From the last slot to the first."""
    return Order(slot=np.arange(spec.n, dtype=np.int32)[None, ::-1], sizes=(1,) * spec.n)


class Smoothed(Categorical):
    """Cross entropy with smoothed labels."""

    share: float = 0.1

    def loss(self, h, target, *, key=None):
        return (1 - self.share) * super().loss(h, target) - self.share * nn.log_softmax(self(h)).mean(-1)


class Bounded(VQGAN):
    """Pixels never leave [-1, 1]."""

    def pixels(self, codes):
        return jnp.tanh(super().pixels(codes))


class FrontLoaded(Causal):
    """The first tokens of an image count twice as much as the last."""

    @nn.nowrap
    def weight(self, batch, order, images):
        return super().weight(batch, order, images) * jnp.linspace(2, 1, order.n)
