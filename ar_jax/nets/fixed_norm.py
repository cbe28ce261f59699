"""Pre-norm transformers whose norms have no parameters, with normalised queries and keys, as FlexTok has them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.adaln import Modulation, Projections, modulated
from ar_jax.nets.attention import Rows, join_heads, split_heads
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.transformer import Backbone
from ar_jax.typing import Array, Blocks, Float, Int, typed

SHARP = 8.0  # products of normalised queries and keys are multiplied by this over the channels of a head


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm, which a vector may shift and scale and whose result it then multiplies."""

    width: int
    heads: int
    hidden: int
    eps: float
    dtype: Any

    def setup(self):
        def dense(features):
            return Linear(features, self.dtype, None, xavier)

        self.query, self.key, self.value, self.out = (dense(self.width) for _ in range(4))
        self.gate, self.up, self.down = dense(self.hidden), dense(self.hidden), dense(self.width)

    def __call__(self, x, cache, mod, part, seen):
        x = constrain(x, BATCH)
        gate1, gate2, shift1, scale1, shift2, scale2 = (1, 1, 0, 0, 0, 0) if mod is None else _by_row(mod, part)
        x = (x + gate1 * self.attend(modulated(x, scale1, shift1, self.eps), seen)).astype(x.dtype)
        y = modulated(x, scale2, shift2, self.eps)
        return (x + gate2 * self.down(nn.silu(self.gate(y)) * self.up(y))).astype(x.dtype), cache

    def attend(self, y, seen):
        q, k, v = (split_heads(net(y), self.heads, 1)[0] for net in (self.query, self.key, self.value))
        q, k = (modulated(x, 0, 0, self.eps) for x in (q, k))
        return self.out(join_heads(seen(q, k, v, SHARP / q.shape[-1])))


class FixedNorm(Backbone):
    """A stack of `Block`s and a last norm; rows come with their positions added.

    Attributes:
      layers, width, heads: sizes.
      hidden: width of the SwiGLU; 0 is 8/3 of `width`, rounded down.
      kinds: of rows, each of which a vector (the time) modulates in its own way; 0 does without a vector.
      eps: of the norms.
      dtype, remat, unroll: see `Backbone`.
    Source: FlexTok (arXiv:2502.13967).
    """

    hidden: int = 0
    kinds: Blocks = 0
    eps: float = 1e-5

    def setup(self):
        hidden = self.hidden or 2 * (4 * self.width) // 3
        sizes = (self.width, self.heads, hidden, self.eps, self.dtype)
        self.blocks = self.stack(Block, sizes, (0, nn.broadcast, nn.broadcast))
        if self.kinds:
            self.ada = Projections(self.layers, (0.0,) * (6 * self.kinds), 0.0, self.dtype)
            self.ada_final = Projections(1, (0.0, 0.0), 0.0, self.dtype)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        where = r"/blocks(_\d+)?/"
        return (
            (where + r"(query|key|value|gate|up)/kernel$", outputs),
            (where + r"(out|down)/kernel$", inputs),
        )

    def modulate(self, vector: Float[Array, "B d"]) -> Modulation:
        """What a vector does to all layers, [B l kinds*6 d], and to the last norm: shift and scale, [B 2 d]."""
        vector = nn.silu(vector.astype(jnp.float32))
        return Modulation(self.ada(vector), self.ada_final(vector)[:, 0])

    @typed
    def __call__(
        self,
        x: Float[Array, "B q d"],
        step: Int[np.ndarray, "q"],
        *,
        mod: Modulation | None = None,
        kind: Int[np.ndarray, "q"] | None = None,
    ) -> Float[Array, "B q d"]:
        """Runs all layers; rows see those of no later step. Of a modulated one, the last norm takes rows of kind 0.

        Args:
          x: rows.
          step: see `Rows`.
          mod: from `modulate`.
          kind: of each row, 0..kinds-1.
        """
        blocks = [None] * self.layers if self.unroll else None
        if mod is not None:
            blocks = jnp.moveaxis(mod.blocks, 1, 0)
            blocks = blocks.reshape(*blocks.shape[:2], self.kinds, 6, -1)
        shared = (None if kind is None else jnp.asarray(kind), Rows(step).sight())
        x, _ = self.run(self.blocks, x.astype(self.dtype), None, (blocks,), shared)
        if mod is None:
            return modulated(x, 0, 0, self.eps)
        shift, scale = jnp.moveaxis(mod.final[:, :, None], 1, 0)
        return modulated(x, scale, shift, self.eps)


def _by_row(mod: Float[Array, "B p 6 d"], kind: Int[Array, "q"]) -> Array:
    """What is done to every row, [6 B q d]; a choice, not a look-up, so that it is computed where it is needed."""
    rows = mod[:, :1]
    for i in range(1, mod.shape[1]):
        rows = jnp.where((kind == i)[:, None, None], mod[:, i, None], rows)
    return jnp.moveaxis(rows, 2, 0)
