"""The transformer whose norms a condition's vector modulates (adaptive layer norm), as next-scale models have it."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Kept, Rows, join_heads, remember, split_heads
from ar_jax.nets.linear import Linear, product
from ar_jax.nets.transformer import Backbone, Cache
from ar_jax.tokenizers.quantize import normalise
from ar_jax.typing import Array, Float, Share, typed


@struct.dataclass
class Modulation:
    """What a condition does to an `AdaLN`, of all its layers.

    Attributes:
      blocks: float32 [B l 6 d]: gates, scales and shifts, each of attention and MLP.
      final: float32 [B 2 d], scale and shift of the last norm, or None without it.
    """

    blocks: Array
    final: Array | None


def modulated(x: Float[Array, "B q d"], scale: Array, shift: Array, eps: float) -> Float[Array, "B q d"]:
    """LN(x) (1 + scale) + shift, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * (1 + scale) + shift).astype(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each between a modulated norm and a gate."""

    width: int
    heads: int
    hidden: int
    l2_norm: bool
    eps: float
    std: float
    out_std: float
    dtype: Any

    no_decay = ("q_bias", "v_bias", "log_scale")

    def setup(self):
        def dense(features, std, bias=True):
            return Linear(features, self.dtype, None, nn.initializers.normal(std), bias)

        self.qkv, self.out = dense(3 * self.width, self.std, bias=False), dense(self.width, self.out_std)
        self.up, self.down = dense(self.hidden, self.std), dense(self.width, self.out_std)
        self.q_bias, self.v_bias = (self.param(f"{name}_bias", nn.initializers.zeros, (self.width,)) for name in "qv")
        if self.l2_norm:
            self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(4)), (self.heads,))

    def __call__(self, x, cache, mod, drop, seen, first):
        x = constrain(x, BATCH)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.moveaxis(mod[:, :, None], 1, 0)
        y, cache = self.attend(modulated(x, scale1, shift1, self.eps), cache, seen, first)
        x = self.add(x, gate1 * y, drop)
        y = self.down(nn.gelu(self.up(modulated(x, scale2, shift2, self.eps)), approximate=True))
        return self.add(x, gate2 * y, drop), cache

    def attend(self, x, cache, seen, first):
        q, k, v = split_heads(self.qkv(x), self.heads)
        q, v = (
            (y + bias.reshape(self.heads, 1, -1)).astype(y.dtype) for y, bias in ((q, self.q_bias), (v, self.v_bias))
        )
        if self.l2_norm:
            sharp = jnp.exp(jnp.minimum(self.log_scale.astype(jnp.float32), math.log(100)))[:, None, None]
            q = (normalise(q.astype(jnp.float32)) * sharp).astype(x.dtype)
            k = normalise(k.astype(jnp.float32)).astype(x.dtype)
        k, v, cache = remember(cache, k, v, first)
        out = seen(q, k, v, 1.0 if self.l2_norm else 0.25 * q.shape[-1] ** -0.5)
        return self.out(join_heads(out)), cache

    def add(self, x, y, drop):
        """x + y, where y is left out for a part `drop` of the images in training, and larger for the others."""
        if drop is not None and self.has_rng("dropout"):
            kept = shares.draw(jax.random.uniform, self.make_rng("dropout"), (len(x), 1, 1)) < 1 - drop
            y = jnp.where(kept, y / (1 - drop), 0)
        return (x + y).astype(x.dtype)


class AdaLN(Backbone):
    """A stack of `Block`s and a last modulated norm.

    Positions are the input's affair.

    Attributes:
      layers, width, heads: sizes.
      hidden: width of the MLP; 0 is 4 width.
      shared: one projection of the condition for all layers, to which each adds a learned table; else one per layer.
      l2_norm: queries and keys are normalised, and a learned number per head (at most 100) sharpens the softmax.
      path_drop: part of the images for which a branch is left out in training, of the first and of the last layer and
        linear in between; active only when a "dropout" key is given to `apply`.
      gate: initial size of the gates, relative to that of other projections.
      sees: rows of all steps that are not later ("past"), or of their own step only ("step"), which needs no cache.
      final: whether there is a last norm.
      depth: of the whole network this is a part of, for the initial size of the branches; 0 is `layers`.
      dtype, remat, unroll: see `Backbone`.
    Source: VAR (arXiv:2404.02905); DiT (arXiv:2212.09748).
    """

    hidden: int = 0
    shared: bool = False
    l2_norm: bool = True
    path_drop: tuple[Share, Share] = (0.0, 0.0)
    gate: float = 1e-3
    sees: Literal["past", "step"] = "past"
    final: bool = True
    depth: int = 0
    eps: float = 1e-6

    no_decay = ("table",)

    def setup(self):
        if self.sees not in ("past", "step"):
            raise ValueError(f"backbone.sees is {self.sees!r}; it must be past or step")
        std = (3 * self.width) ** -0.5
        out_std = std / math.sqrt(2 * (self.depth or self.layers))
        hidden = self.hidden or 4 * self.width
        sizes = (self.width, self.heads, hidden, self.l2_norm, self.eps, std, out_std, self.dtype)
        self.blocks = self.stack(Block, sizes, (0, 0, nn.broadcast, nn.broadcast))
        parts = (self.gate, self.gate, 0.5, 0.5, 0.5, 0.5)
        self.ada = Projections(1 if self.shared else self.layers, parts, std, self.dtype)
        if self.shared:
            small = _parts_init(parts, self.width**-0.5)
            self.table = self.param("table", small, (self.layers, 6, self.width))
        if self.final:
            self.ada_final = Projections(1, (0.5, 0.5), std, self.dtype)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        return (r"/(qkv|up)/kernel$", outputs), (r"/(out|down)/kernel$", inputs)

    def empty_cache(self, batch: int, kept: Kept = "own") -> Cache | None:
        return None if self.sees == "step" else super().empty_cache(batch, kept)

    def modulate(self, vector: Float[Array, "B d"]) -> Modulation:
        """What the condition's vector does to this network, computed once for all layers and steps."""
        vector = nn.silu(vector.astype(jnp.float32))
        blocks = self.ada(vector)
        if self.shared:
            blocks = blocks + self.table.astype(jnp.float32)
        return Modulation(blocks, self.ada_final(vector)[:, 0] if self.final else None)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Modulation, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        x, seen = x.astype(self.dtype), rows.sight(own=self.sees == "step")
        drop = np.linspace(*self.path_drop, self.layers, dtype=np.float32) if any(self.path_drop) else None
        if drop is None:
            drop = [None] * self.layers if self.unroll else None
        each = (jnp.moveaxis(mod.blocks, 1, 0), drop)
        x, cache = self.run(self.blocks, x, cache, each, (seen, rows.first))
        if self.final:
            x = modulated(x, *jnp.moveaxis(mod.final[:, :, None], 1, 0), self.eps)
        return x, cache


class Projections(nn.Module):
    """Several projections of one vector, float32 [B count parts d], each part with its own initial size."""

    count: int
    parts: tuple[float, ...]
    std: float
    dtype: Any

    @nn.compact
    def __call__(self, vector: Float[Array, "B d"]) -> Float[Array, "B count parts d"]:
        d, parts = vector.shape[-1], len(self.parts)

        def init(key, shape):
            return _parts_init(self.parts, self.std)(key, (self.count * d, parts, d)).reshape(shape)

        kernel = self.param("kernel", init, (self.count, d, parts * d))
        bias = self.param("bias", nn.initializers.zeros, (self.count, parts * d))

        def one(weights):  # layer by layer, so that a mesh gathers one kernel at a time
            kernel, bias = weights
            return product(vector.astype(self.dtype), kernel, jnp.float32) + bias

        y = lax.map(one, (kernel, bias))
        return jnp.moveaxis(y, 0, 1).reshape(len(vector), self.count, parts, d)


def _parts_init(sizes, std):
    """Normal, with the standard deviation `std` times the size of its part along the last axis but one."""

    def init(key, shape):
        return jax.random.normal(key, shape) * (std * np.array(sizes, np.float32)[:, None])

    return init
