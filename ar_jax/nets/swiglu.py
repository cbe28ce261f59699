"""Pre-norm transformers with layer norms and gated perceptrons, without positions of their own."""

from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Rows, join_heads, split_heads
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.transformer import Backbone
from ar_jax.typing import Array, Float, Int, Many, typed


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm.

    Attributes:
      features: of a head.
      bias: of queries, keys and values; all other layers have one.
    """

    width: int
    heads: int
    features: int
    hidden: int
    bias: bool
    eps: float
    dtype: Any

    def setup(self):
        def dense(features, bias=True):
            return Linear(features, self.dtype, None, xavier, bias=bias)

        def norm():
            # use_fast_variance loses digits where the mean is large against the spread
            return nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, use_fast_variance=False)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.query, self.key, self.value = (dense(self.heads * self.features, self.bias) for _ in range(3))
        self.out, self.gate, self.up, self.down = map(dense, (self.width, self.hidden, self.hidden, self.width))

    def __call__(self, x, cache, seen):
        x = constrain(x, BATCH)
        y = self.attention_norm(x)
        q, k, v = (split_heads(net(y), self.heads, 1)[0] for net in (self.query, self.key, self.value))
        x = x + self.out(join_heads(seen(q, k, v)))
        y = self.mlp_norm(x)
        return x + self.down(nn.silu(self.gate(y)) * self.up(y)), cache


class SwiGLU(Backbone):
    """A stack of `Block`s without a last norm; rows come with their positions added.

    Attributes:
      layers, width, heads: sizes.
      features: of a head; 0 is width / heads.
      hidden: width of the perceptrons; 0 is two thirds of 4 times `width`, rounded up to a multiple of 8.
      bias: of queries, keys and values.
      eps: of the norms.
      dtype, remat, unroll: see `Backbone`.
    Source: as in Hita (arXiv:2507.02358).
    """

    features: Many = 0
    hidden: Many = 0
    bias: bool = True
    eps: float = 1e-5

    def setup(self):
        hidden = self.hidden or -(-(8 * self.width // 3) // 8) * 8
        features = self.features or self.width // self.heads
        sizes = (self.width, self.heads, features, hidden, self.bias, self.eps, self.dtype)
        self.blocks = self.stack(Block, sizes, (nn.broadcast,))

    @typed
    def __call__(self, x: Float[Array, "b q d"], step: Int[np.ndarray, "q"]) -> Float[Array, "b q d"]:
        """Runs all layers; a row sees those of no later step."""
        return self.run(self.blocks, x.astype(self.dtype), None, (), (Rows(step).sight(),))[0]

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        return (
            (r"/blocks/(query|key|value|gate|up)/kernel$", outputs),
            (r"/blocks/(query|key|value|gate|up)/bias$", P("tp")),
            (r"/blocks/(out|down)/kernel$", inputs),
        )
