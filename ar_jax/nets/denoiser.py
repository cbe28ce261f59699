"""A diffusion transformer over a grid of latents that is told codes by attention whose result is multiplied by zero at the start."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.adaln import modulated
from ar_jax.nets.attention import sight
from ar_jax.nets.head_rms import Attention
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import TimeEmbedding, xavier, zeros
from ar_jax.nets.positions import sine_quarters
from ar_jax.nets.transformer import Backbone
from ar_jax.typing import Array, Float, Many, typed


class Block(nn.Module):
    """Attention and a perceptron, whose norms and results a time modulates; in between, attention to codes behind a gate."""

    width: int
    heads: int
    hidden: int
    eps: float
    dtype: Any

    no_decay = ("gate",)

    def setup(self):
        def dense(features, init=xavier, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, init, bias=True)

        self.attention, self.across = (
            Attention(self.width, self.heads, self.eps, self.dtype) for _ in range(2)
        )
        self.modulation = dense(6 * self.width, zeros, jnp.float32)
        self.fc1, self.fc2 = dense(self.hidden), dense(self.width)
        self.gate = self.param("gate", zeros, (self.width,))

    def __call__(self, x, cache, time, told, seen, told_seen):
        x = constrain(x, BATCH)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(time)[:, None], 6, axis=-1)
        y, _ = self.attention(modulated(x, scale1, shift1, self.eps), seen)
        x = (x + gate1 * y).astype(x.dtype)
        y, _ = self.across(modulated(x, 0, 0, self.eps), told_seen, others=told)
        x = (x + self.gate * y).astype(x.dtype)
        y = self.fc2(nn.gelu(self.fc1(modulated(x, scale2, shift2, self.eps)), approximate=True))
        return (x + gate2 * y).astype(x.dtype), cache


class Denoiser(Backbone):
    """A stack of `Block`s between projections; it gives zeros at the start, and codes change nothing there.

    Attributes:
      layers, width, heads: sizes; the width is a multiple of 4.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      eps: of the norms.
      dtype, remat, unroll: see `Backbone`.
    Source: DiT (arXiv:2212.09748), with the zeros of ControlNet (arXiv:2302.05543).
    """

    hidden: Many = 0
    eps: float = 1e-6

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        return (
            (r"/(query|key|value|fc1)/kernel$", outputs),
            (r"/fc1/bias$", P("tp")),
            (r"/(out|fc2)/kernel$", inputs),
        )

    def setup(self):
        sizes = (self.width, self.heads, self.hidden or 4 * self.width, self.eps, self.dtype)
        self.blocks = self.stack(Block, sizes, (nn.broadcast,) * 4)

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b m c"], t: Float[Array, "b"], codes: Float[Array, "b n f"], grid: tuple[int, int]
    ) -> Float[Array, "b m c"]:
        """The noise in latents, float32.

        Args:
          x: noisy latents of a grid in raster order.
          t: times in [0, 1000].
          codes: what the latents are drawn from.
          grid: rows and columns.
        """

        def dense(features, name, init=xavier, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, init, bias=True, name=name)

        places = self.param("places", nn.initializers.normal(0.02), (codes.shape[1], self.width))
        told = dense(self.width, "told")(codes)
        told = told + places.astype(told.dtype)
        y = dense(self.width, "noisy")(x)
        y = y + sine_quarters(*grid, self.width).astype(y.dtype)
        time = nn.silu(TimeEmbedding(self.width, self.dtype, name="time")(t))
        rows, others = np.zeros(y.shape[1], np.int32), np.zeros(told.shape[1], np.int32)
        y, _ = self.run(self.blocks, y, None, (), (time, told, sight(rows), sight(rows, others)))
        shift, scale = jnp.split(dense(2 * self.width, "modulation", zeros, jnp.float32)(time)[:, None], 2, axis=-1)
        return dense(x.shape[-1], "out", zeros, jnp.float32)(modulated(y, scale, shift, self.eps))
