"""LightGen: masked autoregression whose rows ask a text, between the decoder and the head."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.masked import Masked
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.attention import attend, join_heads, sight, split_heads
from ar_jax.nets.conditioning import Captioned, Cond
from ar_jax.nets.dropout import Dropout
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.queries import norm
from ar_jax.nets.resize import resized
from ar_jax.nets.transformer import init
from ar_jax.nets.vit import Plain, ViT
from ar_jax.orders import Order
from ar_jax.typing import Array, Batch, Bool, Float, Index, Many, Share, typed


class Aligned(Captioned):
    """Caption features through a two-layer perceptron and a transformer; rows without a word are seen as the others are.

    Attributes:
      net: the transformer; rows are as wide as it.
      rows: caption rows; 0 until the data is known (`complete`).
      features: width of the caption features; 0 until the data is known.
    """

    net: ViT
    rows: int = 0
    features: int = 0

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """Of `batch["text"]`, float [b p c]; where `drop` is set all rows become one learned row."""
        net = self.net
        fc1, fc2 = (Linear(net.width, net.dtype, None, xavier, bias=True, name=name) for name in ("fc1", "fc2"))
        rows = net(fc2(nn.gelu(fc1(batch["text"].astype(net.dtype)), approximate=True)))
        none = self.param("none", init, (1, net.width))
        return Cond(jnp.where(drop[:, None, None], none.astype(rows.dtype), rows))


class CrossBlock(nn.Module):
    """Attention to a memory, which is added to the normed rows, and a two-layer perceptron."""

    width: int
    heads: int
    hidden: int
    dropout: Share
    attention_dropout: Share
    eps: float
    dtype: Any

    def setup(self):
        def dense(features):
            return Linear(features, self.dtype, None, xavier, bias=True)

        self.query_norm, self.memory_norm, self.mlp_norm = (norm(self.eps, self.dtype) for _ in range(3))
        self.query, self.memory, self.out = (dense(n) for n in (self.width, 2 * self.width, self.width))
        self.fc1, self.fc2 = dense(self.hidden), dense(self.width)
        self.drop, self.attention_drop = Dropout(self.dropout), Dropout(self.attention_dropout)

    def __call__(self, x, cache, memory, seen):
        det = not self.has_rng("dropout")
        x = self.query_norm(constrain(x, BATCH))
        (q,) = split_heads(self.query(x), self.heads, 1)
        k, v = split_heads(self.memory(self.memory_norm(memory)), self.heads, 2)
        if det or not self.attention_dropout:
            out = seen(q, k, v)
        else:
            out = attend(q, k, v, seen.mask, drop=functools.partial(self.attention_drop, deterministic=False))
        x = x + self.drop(self.out(join_heads(out)), deterministic=det)  # the published residual: of the normed rows
        y = self.drop(nn.gelu(self.fc1(self.mlp_norm(x)), approximate=False), deterministic=det)
        return x + self.drop(self.fc2(y), deterministic=det), cache


class Crossed(Plain):
    """Rows that ask a memory layer by layer and never look at one another; with a last norm. Attributes: see `Plain`."""

    def setup(self):
        sizes = (
            self.width, self.heads, self.hidden or 4 * self.width, self.dropout, self.attention_dropout, self.eps,
            self.dtype,
        )  # fmt: skip
        self.blocks, self.norm = self.stack(CrossBlock, sizes, (nn.broadcast,) * 2), norm(self.eps, self.dtype)

    @typed
    def __call__(self, x: Float[Array, "B q d"], memory: Float[Array, "B p c"]) -> Float[Array, "B q d"]:
        dropped = self.attention_dropout > 0 and self.has_rng("dropout")  # kernels do not drop weights
        rows, keys = np.zeros(x.shape[1], np.int32), np.zeros(memory.shape[1], np.int32)
        seen = sight(jnp.asarray(rows) if dropped else rows, keys)
        return self.norm(self.run(self.blocks, x.astype(self.dtype), None, (), (memory.astype(self.dtype), seen))[0])


class LightGen(Masked):
    """`Masked` whose encoder and decoder know of no text; what the head is given asks for it after them.

    Attributes:
      cross: what asks, as wide as decoder and text.
      places: side of the square grid that learned positions are of, resized to the grid of the tokens; 0 is that grid.
      others: see `Masked`; `buffer` is 0.
    Source: LightGen (arXiv:2503.08619).
    """

    cross: Crossed = Crossed(16, 1024, 16)
    places: Many = 0
    buffer: int = 0

    def setup(self):
        if self.buffer:
            raise ValueError(f"generator.buffer is {self.buffer}, but LightGen's text is asked by the head's rows only; give 0")
        super().setup()
        self.cross_input = Linear(self.cross.width, self.cross.dtype, None, xavier, bias=True)

    def table(self, name: str, rows: int, width: int) -> Float[Array, "p d"]:
        if not self.places:
            return super().table(name, rows, width)
        learned = self.param(name, init, (self.places**2, width)).reshape(self.places, self.places, width)
        size = tuple((self.spec.coords.max(0) + 1)[1:].tolist())
        return learned.reshape(-1, width) if size == learned.shape[:2] else resized(learned, size)

    def encode(self, tokens: Array, known: Index, cond: Cond, order: Order) -> Float[Array, "B p d"]:
        return super().encode(tokens, known, cond.replace(rows=cond.rows[:, :0]), order)

    def told(self, h: Float[Array, "B n d"], positions: Float[Array, "#B n d"], cond: Cond) -> Float[Array, "B n d"]:
        return self.cross((self.cross_input(h) + positions).astype(h.dtype), cond.rows)
