"""MaskGIT in the order of a Halton sequence: a network that the class modulates, whose readout is its table of codes."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ar_jax.generators.base import Setting, Step
from ar_jax.generators.maskgit import MaskGIT, State, mask_ratio
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Rows, attend, join_heads, visible
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.dropout import Dropout
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.transformer import REMAT, RMSNorm, init
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Index, Int, Layers, Many, Share, typed


class Block(nn.Module):
    """Attention and SwiGLU, each between a norm that a vector modulates and a gate; nothing has a bias.

    Queries and keys are normalised over all heads together.
    """

    width: int
    heads: int
    hidden: int
    dropout: Share
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, vector, seen):
        def dense(features, name):
            return Linear(features, self.dtype, None, xavier, name=name)

        def dropped(y):
            return Dropout(self.dropout)(y, deterministic=det)

        def shifted(y, shift, scale):
            return (y.astype(jnp.float32) * (1 + scale) + shift).astype(self.dtype)

        det, inner = not self.has_rng("dropout"), self.width // self.heads * self.heads
        x = constrain(x, BATCH)
        told = Linear(6 * self.width, self.dtype, jnp.float32, nn.initializers.zeros, bias=True, name="modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(told(vector)[:, None], 6, axis=-1)
        y = shifted(RMSNorm(self.eps, name="attention_norm")(x), shift1, scale1)
        q, k, v = (dense(inner, name)(y) for name in ("query", "key", "value"))
        q, k, v = (self.divided(y) for y in (self.whitened(q), self.whitened(k), v))
        if det or not self.dropout:
            y = seen(q, k, v)
        else:
            y = attend(q, k, v, visible(*(np.zeros(x.shape[1], np.int32),) * 2), drop=dropped)
        x = (x + gate1 * dropped(dense(self.width, "out")(join_heads(y)))).astype(x.dtype)
        y = shifted(RMSNorm(self.eps, name="mlp_norm")(x), shift2, scale2)
        y = dropped(nn.silu(dense(self.hidden, "gate")(y)) * dense(self.hidden, "up")(y))
        return (x + gate2 * dense(self.width, "down")(y)).astype(x.dtype), None

    def whitened(self, y):
        y = y.astype(jnp.float32)
        return (y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)).astype(self.dtype)

    def divided(self, y):
        return jnp.moveaxis(y.reshape(*y.shape[:2], self.heads, -1), 2, 1)


class Registered(nn.Module):
    """Rows with learned places and a few rows that stand for nothing, through a stack of `Block`s; every row sees every row.

    Attributes:
      layers, width, heads: sizes; a head has the whole part of width / heads.
      hidden: width of the SwiGLU; 0 is two thirds of four times `width`, rounded up to a multiple of 256.
      registers: rows that stand for nothing, after the others.
      dropout: rate of the attention's weights and results, and in the SwiGLU; active only when a "dropout" key is given.
      dtype, remat: see `Backbone`.
    Source: Halton-MaskGIT (ICLR 2025).
    """

    layers: Layers
    width: int
    heads: int
    hidden: Many = 0
    registers: Many = 1
    dropout: Share = 0.0
    eps: float = 1e-5
    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"

    no_decay = ()

    def modulate(self, vector: Float[Array, "B d"] | None) -> Float[Array, "B d"]:
        """The condition's vector, which every layer looks at itself.

        Raises:
          ValueError: the conditioning makes none.
        """
        if vector is None:
            raise ValueError("this backbone is modulated by a vector, which the conditioning does not make; use Label")
        return nn.silu(vector.astype(jnp.float32))

    @nn.compact
    @typed
    def rows(self, x: Float[Array, "B n d"], vector: Float[Array, "B d"]) -> Float[Array, "B n d"]:
        """Hidden rows of all tokens."""
        n = x.shape[1]
        rest = self.param("registers", init, (self.registers, self.width))
        x = x + self.param("places", init, (n, self.width))
        x = jnp.concatenate([x, jnp.broadcast_to(rest, (len(x), *rest.shape))], axis=1).astype(self.dtype)
        hidden = self.hidden or -(-(8 * self.width // 3) // 256) * 256
        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.layers,
        )(self.width, self.heads, hidden, self.dropout, self.eps, self.dtype, name="blocks")
        x, _ = blocks(x, vector, Rows(np.zeros(x.shape[1], np.int32)).sight())
        told = Linear(2 * self.width, self.dtype, jnp.float32, xavier, bias=True, name="modulation")(vector)
        shift, scale = jnp.split(told[:, None], 2, axis=-1)
        y = RMSNorm(self.eps, name="norm")(x[:, :n]).astype(jnp.float32)
        y = y + self.param("bias", nn.initializers.zeros, (self.width,))
        return (y * (1 + scale) + shift).astype(self.dtype)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        where = r"/blocks/"
        return (
            (where + r"(gate|up)/kernel$", P(None, "tp")),
            (where + r"down/kernel$", P("tp", None)),
        )


class Ready(Categorical):
    """Of rows that are logits already, also one of the hidden code, which training asks for of no one.

    Attributes:
      all: sampling may draw the hidden code, as published; then it is a known one, and the last code in the end.
      others: see `Categorical`.
    """

    all: bool = False

    def complete(self, spec: TokenSpec) -> "Ready":
        return self.clone(codes=super().complete(spec).codes + 1)

    def setup(self):
        pass

    def __call__(self, h: Float[Array, "B m v"]) -> Float[Array, "B m v"]:
        return h

    def filtered(self, h: Float[Array, "B m v"], images: int, knobs, i: Index) -> Float[Array, "b m v"]:
        return super().filtered(h if self.all else h.at[..., -1].set(-1e9), images, knobs, i)

    @property
    def rules(self) -> Rules:
        return ()


class HaltonMaskGIT(MaskGIT):
    """A `MaskGIT` that keeps to its order (`orders.Halton`), hides every slot by itself in training and counts all of them.

    Fields of `MaskGIT` that speak of schedules and of noise have no effect.

    Attributes:
      backbone: `Registered`.
      conditioning: its vector modulates the network (`Label`).
      head: `Ready`.
    Source: Halton-MaskGIT (ICLR 2025).
    """

    head: Ready = Ready()
    kept: Literal["surest", "ordered"] = "ordered"
    known_weight: Share = 1.0

    adjustable = ()

    def setup(self):
        super().setup()
        self.bias = self.param("bias", nn.initializers.zeros, (self.spec.codes[0] + 1,))

    def drawn_mask(self, progress: Float[Array, "b 1"], scores: Float[Array, "b n"]) -> Bool[Array, "b n"]:
        return scores < mask_ratio(progress, "arccos")

    @typed
    def hidden(self, tokens: Int[Array, "b n k"], hidden: Bool[Array, "b n"], cond: Cond) -> Float[Array, "B n v"]:
        """Logits of every slot, float32; see `MaskGIT`."""
        x = widen(self.embed(tokens, hidden), len(cond.rows) // len(tokens))
        h = self.backbone.rows(constrain(x, BATCH), cond.mod)
        table = jnp.asarray(self.embedding).astype(h.dtype)
        return jnp.einsum("bnd,vd->bnv", h, table, preferred_element_type=jnp.float32) + self.bias

    def step(self, state: State, now: Step, setting: Setting) -> State:
        state = super().step(state, now, setting)
        last = jnp.asarray(now.i) == len(setting.order.sizes) - 1
        codes = jnp.minimum(state.tokens, self.spec.codes[0] - 1)
        return state.replace(tokens=jnp.where(last, codes, state.tokens))
