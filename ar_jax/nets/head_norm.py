"""Transformers whose heads normalise queries and keys with learned scales, as D-AR has them: plain ones, and one that paints."""

from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.adaln import modulated
from ar_jax.nets.attention import Rows, Sight, join_heads, split_heads
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import TimeEmbedding, xavier, zeros
from ar_jax.nets.positions import rotary, rotate
from ar_jax.nets.transformer import Backbone
from ar_jax.typing import Array, Float, Int, Within, typed


def _norm(eps, dtype):
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False)


class Attention(nn.Module):
    """Rows look at themselves, or at others; queries and keys are normalised by head, then turned by a table each, if any."""

    width: int
    heads: int
    eps: float
    dtype: Any

    def setup(self):
        self.query, self.key, self.value, self.out = (
            Linear(self.width, self.dtype, None, xavier, bias=True) for _ in range(4)
        )
        self.query_norm, self.key_norm = _norm(self.eps, self.dtype), _norm(self.eps, self.dtype)

    def __call__(self, y, seen, table=None, others=None):
        others, own = (y, table) if others is None else (others, None)
        q, k, v = (
            split_heads(net(x), self.heads, 1)[0]
            for net, x in ((self.query, y), (self.key, others), (self.value, others))
        )
        q, k = self.query_norm(q), self.key_norm(k)
        q, k = (x if turn is None else rotate(x, turn) for x, turn in ((q, table), (k, own)))
        return self.out(join_heads(seen(q, k, v)))


class Block(nn.Module):
    """Attention and a perceptron, each after a norm, and multiplied by a learned vector, which begins as `gate`."""

    width: int
    heads: int
    hidden: int
    eps: float
    gate: float
    dtype: Any

    no_decay = ("gate1", "gate2")

    def setup(self):
        self.attention = Attention(self.width, self.heads, self.eps, self.dtype)
        self.attention_norm, self.mlp_norm = _norm(self.eps, self.dtype), _norm(self.eps, self.dtype)
        self.fc1, self.fc2 = (
            Linear(features, self.dtype, None, xavier, bias=True)
            for features in (self.hidden, self.width)
        )
        begin = nn.initializers.constant(self.gate)
        self.gate1, self.gate2 = (self.param(f"gate{i}", begin, (self.width,)) for i in (1, 2))

    def __call__(self, x, cache, table, seen):
        x = constrain(x, BATCH)
        x = (x + self.gate1 * self.attention(self.attention_norm(x), seen, table)).astype(x.dtype)
        return (x + self.gate2 * self.fc2(nn.silu(self.fc1(self.mlp_norm(x))))).astype(x.dtype), cache


class HeadNorm(Backbone):
    """A stack of `Block`s and a last norm without parameters.

    Attributes:
      layers, width, heads: sizes; width/heads is a multiple of 4 where rows are turned.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      base: wave length base of the rotary positions.
      eps: of the norms.
      gate: what the learned gates of all layers begin as; published is 0.
      dtype, remat, unroll: see `Backbone`.
    Source: D-AR (arXiv:2505.23660).
    """

    hidden: int = 0
    base: Annotated[float, Within(1, 2**24)] = 10000.0
    eps: float = 1e-6
    gate: float = 0.0

    def setup(self):
        sizes = (self.width, self.heads, self.hidden or 4 * self.width, self.eps, self.gate, self.dtype)
        self.blocks = self.stack(Block, sizes, (nn.broadcast, nn.broadcast))

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        return (r"/(query|key|value|fc1)/kernel$", outputs), (r"/(out|fc2)/kernel$", inputs)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], step: Int[np.ndarray, "q"], coords: Int[np.ndarray, "q 3"] | None = None
    ) -> Float[Array, "B q d"]:
        """Runs all layers; rows see those of no later step.

        Args:
          x: rows.
          step: see `Rows`.
          coords: level, row and column by which queries and keys are turned; those of (0, 0) stay as they are. None turns none.
        """
        table = None if coords is None else _table(self, coords)
        x, _ = self.run(self.blocks, x.astype(self.dtype), None, (), (table, Rows(step).sight()))
        return modulated(x, 0, 0, self.eps)


class PaintBlock(nn.Module):
    """Attention and a perceptron, whose norms and results are modulated row by row by a time and what a row sees of others."""

    width: int
    heads: int
    hidden: int
    eps: float
    dtype: Any

    def setup(self):
        def dense(features, init=xavier):
            return Linear(features, self.dtype, None, init, bias=True)

        self.attention, self.across = (
            Attention(self.width, self.heads, self.eps, self.dtype) for _ in range(2)
        )
        self.time = TimeEmbedding(self.width, self.dtype, features=self.width)
        self.told1, self.told2 = dense(self.width), dense(self.width)
        self.modulation = dense(6 * self.width, zeros)
        self.fc1, self.fc2 = dense(self.hidden), dense(self.width)

    def __call__(self, x, cache, t, told, table, seen, all_seen):
        x, before = constrain(x, BATCH), x
        told = modulated(self.told2(nn.silu(self.told1(told))), 0, 0, self.eps)
        look = self.across(modulated(x, 0, 0, self.eps), all_seen, table, told)
        mod = self.modulation(nn.silu(self.time(t)[:, None] + look)).astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(mod, 6, axis=-1)
        y = self.attention(modulated(x, scale1, shift1, self.eps), seen, table)
        x = (x + gate1 * y).astype(x.dtype)
        y = self.fc2(nn.silu(self.fc1(modulated(x, scale2, shift2, self.eps))))
        return (x + gate2 * y).astype(x.dtype), before


class Painter(HeadNorm):
    """A stack of `PaintBlock`s and a last norm without parameters: rows of a picture, told a time and other rows.

    Attributes: see `HeadNorm`; `gate` does nothing here, where the time and other rows make the gates.
    Source: D-AR (arXiv:2505.23660).
    """

    def setup(self):
        sizes = (self.width, self.heads, self.hidden or 4 * self.width, self.eps, self.dtype)
        self.told = Linear(self.width, self.dtype, None, xavier, bias=True)
        self.blocks = self.stack(PaintBlock, sizes, (nn.broadcast,) * 5)

    @typed
    def __call__(
        self,
        x: Float[Array, "B q d"],
        t: Float[Array, "B"],
        told: Float[Array, "B m e"],
        coords: Int[np.ndarray, "q 3"],
    ) -> tuple[Float[Array, "B q d"], Float[Array, "l B q d"]]:
        """Runs all layers; every row sees every row.

        Args:
          x: rows.
          t: the time, in [0, 1000].
          told: what the rows are painted from.
          coords: of the rows.

        Returns:
          Rows after the last norm, and those that come into each layer.
        """
        told = modulated(self.told(told), 0, 0, self.eps)
        seen = Rows(np.zeros(x.shape[1], np.int32)).sight()
        all_seen = Sight(jnp.ones((1, x.shape[1], told.shape[1]), bool))
        x, before = self.blocks(x.astype(self.dtype), None, t, told, _table(self, coords), seen, all_seen)
        return modulated(x, 0, 0, self.eps), before


def _table(net, coords):
    features = net.width // net.heads
    if features % 4:
        raise ValueError(
            f"{type(net).__name__}: width / heads is {net.width} / {net.heads}; it must be a multiple of 4 (2 axes x 2 channels "
            "of a rotary pair)"
        )
    return rotary(coords[None], features, net.base)
