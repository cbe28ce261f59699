"""Transformers whose rows ask other rows: attention among the queries, then to a memory, layer by layer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import join_heads, sight, split_heads
from ar_jax.nets.linear import Linear
from ar_jax.nets.transformer import Backbone
from ar_jax.typing import Array, Blocks, Float, typed


def init(std: float) -> Any:
    """How kernels begin."""
    return nn.initializers.truncated_normal(std)


def norm(eps: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    # use_fast_variance loses digits where the mean is large against the spread
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Rows that ask, those that answer, and what they say come separately."""

    width: int
    heads: int
    std: float
    dtype: Any

    @nn.compact
    def __call__(self, asking, answering, said):
        def heads(x, name):
            return split_heads(Linear(self.width, self.dtype, None, init(self.std), bias=True, name=name)(x), self.heads, 1)[0]

        q, k, v = heads(asking, "query"), heads(answering, "key"), heads(said, "value")
        seen = sight(np.zeros(q.shape[2], np.int32), np.zeros(k.shape[2], np.int32))
        return Linear(self.width, self.dtype, None, init(self.std), bias=True, name="out")(join_heads(seen(q, k, v)))


class Block(nn.Module):
    """Attention among the queries, attention to the memory, a two-layer perceptron; each after a norm."""

    width: int
    heads: int
    hidden: int
    eps: float
    std: float
    dtype: Any

    def setup(self):
        self.own_norm, self.cross_norm, self.mlp_norm = (norm(self.eps, self.dtype) for _ in range(3))
        self.own, self.cross = (Attention(self.width, self.heads, self.std, self.dtype) for _ in range(2))
        self.fc1, self.fc2 = (
            Linear(features, self.dtype, None, init(self.std), bias=True) for features in (self.hidden, self.width)
        )

    def __call__(self, rows, cache, tapped, places, memory, keys):
        x, tap = rows
        x = constrain(x, BATCH)
        y = self.own_norm(x)
        x = x + self.own(y + places, y + places, y)
        x = x + self.cross(self.cross_norm(x) + places, keys, memory)
        x = x + self.fc2(nn.gelu(self.fc1(self.mlp_norm(x)), approximate=False))
        return (x, tap and (jnp.where(tapped, x, tap[0]),)), cache


class QFormer(Backbone):
    """Queries with places, which are added anew in every layer, read a memory; with a last norm.

    Attributes:
      layers, width, heads: sizes.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      tap: the layer, counted from 1, whose rows are given beside the last; 0 is none.
      eps: of the norms.
      std: of the kernels at the start; larger ones suit networks much narrower than the published.
      dtype, remat, unroll: see `Backbone`.
    Source: the decoder of DETR (arXiv:2005.12872), as in GigaTok (arXiv:2504.08736).
    """

    hidden: int = 0
    tap: Blocks = 0
    eps: float = 1e-5
    std: float = 0.02

    def setup(self):
        if self.tap > self.layers:
            raise ValueError(f"QFormer: tap is {self.tap}, but there are {self.layers} layers; give one of them, or 0")
        sizes = (self.width, self.heads, self.hidden or 4 * self.width, self.eps, self.std, self.dtype)
        self.blocks = self.stack(Block, sizes, (0, nn.broadcast, nn.broadcast, nn.broadcast))
        self.norm = norm(self.eps, self.dtype)

    @typed
    def __call__(
        self, x: Float[Array, "b q d"], places: Float[Array, "q d"], memory: Float[Array, "b r d"],
        keys: Float[Array, "r d"],
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b q d"] | None]:  # fmt: skip
        """Runs all layers.

        Args:
          x: queries.
          places: of the queries.
          memory: what they read, taken as it is.
          keys: places of the memory.

        Returns:
          The queries in the end, and those after layer `tap`, or None.
        """
        x, memory = x.astype(self.dtype), memory.astype(self.dtype)
        places, keys = places.astype(self.dtype), memory + keys.astype(self.dtype)
        # what is tapped travels along, so that the layers in between need not be kept
        taps = np.arange(1, self.layers + 1) == self.tap
        tap = (jnp.zeros_like(x),) if self.tap else ()
        (x, tap), _ = self.run(self.blocks, (x, tap), None, (taps,), (places, memory, keys))
        return self.norm(x), tap[0] if tap else None

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        where = r"/blocks/(own/|cross/)?"
        return (
            (where + r"(query|key|value|fc1)/kernel$", outputs),
            (where + r"(query|key|value|fc1)/bias$", P("tp")),
            (where + r"(out|fc2)/kernel$", inputs),
        )
