"""A toy method in a file of one's own: a tokenizer, an order, a head, a generator, a guidance rule and a decoder, each a
small change of one that is there. README shows two of them; `tests/test_own_method.py` trains it and draws from it without an edit in ar_jax."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.decode.sequential import Account, Sequential, Task
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.orders import Order
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Tokens


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


@dataclasses.dataclass(frozen=True)
class Late:
    """Guidance of the second half of the steps only."""

    weight: float = 2.0

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        steps = np.arange(len(order.sizes))
        return np.where(2 * steps < len(steps), 1, self.weight).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Twice(Sequential):
    """Draws everything anew with other noise and keeps that."""

    def __call__(self, task: Task) -> tuple[Tokens, Account]:
        _, first = super().__call__(task)
        other = jax.vmap(lambda key: jax.random.fold_in(key, 2**31))(task.keys)
        tokens, second = super().__call__(dataclasses.replace(task, keys=other))
        return tokens, second.replace(calls=jax.tree.map(jnp.add, first.calls, second.calls))
