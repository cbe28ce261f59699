"""Transformers whose rows read a text in every layer, of which each layer of a language model may say something else."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from ar_jax.data import Info
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.adaln import modulated
from ar_jax.nets.attention import Int8, Rows
from ar_jax.nets.conditioning import Captioned, Cond
from ar_jax.nets.head_rms import Attention, init
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import zeros
from ar_jax.nets.transformer import Backbone, Cache, RMSNorm
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Layers, Many, typed


@struct.dataclass
class Text:
    """What is to be read.

    Attributes:
      features: [B p r c], for each of the network's layers (p = l), or the same for all (p = 1).
      valid: bool [B r], rows that may be seen.
    """

    features: Array
    valid: Array


@struct.dataclass
class Heard:
    """A text's keys and values in every layer, computed once for all steps.

    Attributes:
      keys, values: [B l h r e].
      valid: bool [B r].
    """

    keys: Array
    values: Array
    valid: Array


@struct.dataclass
class Both:
    """What rows see: a text, and rows of their own sequence; how `Attention` attends to both in one float32 softmax.

    Neither is copied to lie beside the other.

    Attributes:
      keys, values: of the text, [B h r e].
      valid: bool [B r].
      mask: of the own rows, bool [#B q s].
    """

    keys: Array
    values: Array
    valid: Array
    mask: Array

    def __call__(self, q: Array, k: Array | Int8, v: Array | Int8) -> Array:
        k, v = (x.plain() if isinstance(x, Int8) else x for x in (k, v))
        q = q * q.shape[-1] ** -0.5

        def logits(keys, mask):
            product = jnp.einsum("bhqe,bhre->bhqr", q, keys, preferred_element_type=jnp.float32)
            return jnp.where(mask[:, None], product, -jnp.inf)

        both = jnp.concatenate([logits(self.keys, self.valid[:, None]), logits(k, self.mask)], axis=-1)
        weights = jnp.split(jax.nn.softmax(both).astype(v.dtype), [self.keys.shape[2]], axis=-1)
        return sum(jnp.einsum("bhqr,bhre->bhqe", weight, x) for weight, x in zip(weights, (self.values, v)))


class Block(nn.Module):
    """Attention to a text and to rows, which get learned places behind the norm, and a perceptron.

    Without rows it tells the text's keys and values in place of a cache.
    """

    width: int
    heads: int
    hidden: int
    rows: int
    eps: float
    dtype: Any

    no_decay = ("positions",)

    def setup(self):
        self.attention = Attention(self.width, self.heads, self.eps, self.dtype)
        self.told, self.fc1, self.fc2 = (
            Linear(features, self.dtype, None, init, bias=True)
            for features in (self.width, self.hidden, self.width)
        )
        self.positions = self.param("positions", zeros, (self.rows, self.width))
        self.begin()

    def begin(self):
        """Makes the parts of `branches`."""
        self.attention_norm, self.mlp_norm = RMSNorm(self.eps), RMSNorm(self.eps)

    def branches(self, more):
        """For attention and perceptron: rows -> rows that go in, and what comes out times what is added."""
        return (self.attention_norm, 1), (self.mlp_norm, 1)

    def __call__(self, x, cache, keys, values, valid, mask, first, *more):
        if x is None:
            return None, self.attention.keys(self.told(keys))
        x = constrain(x, BATCH)
        (norm1, gate1), (norm2, gate2) = self.branches(more)
        places = lax.dynamic_slice_in_dim(jnp.asarray(self.positions), first, x.shape[1])
        y, cache = self.attention((norm1(x) + places).astype(x.dtype), Both(keys, values, valid, mask), cache, first)
        x = (x + gate1 * y).astype(x.dtype)
        y = self.fc2(nn.gelu(self.fc1(norm2(x)), approximate=True))
        return (x + gate2 * y).astype(x.dtype), cache


class Reader(Backbone):
    """A stack of `Block`s and a last norm: rows see a text, and rows of no later step.

    What modulates it is a `Text`, or a vector, which is a text of one row that all layers read.

    Attributes:
      layers, width, heads: sizes.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      rows: places of the sequence; 0 is one for the condition and one for each token (`complete`).
      eps: of the norms.
      dtype, remat, unroll: see `Backbone`.
    Source: Instella-T2I (arXiv:2506.21022).
    """

    hidden: Many = 0
    rows: Many = 0
    eps: float = 1e-6

    kind = Block
    shared = 3  # arguments that all blocks get

    def complete(self, spec: TokenSpec) -> "Reader":
        return self if self.rows else self.clone(rows=spec.n + 1)

    def setup(self):
        sizes = (
            self.width, self.heads, self.hidden or 4 * self.width, self.rows, self.eps, self.dtype
        )  # fmt: skip
        self.blocks = self.stack(self.kind, sizes, (0, 0, *[nn.broadcast] * self.shared))
        self.begin()

    def begin(self):
        """Makes what is not of a layer."""
        self.norm = RMSNorm(self.eps)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        return (
            (r"/(query|key|value|fc1)/kernel$", outputs),
            (r"/fc1/bias$", P("tp")),
            (r"/(out|fc2)/kernel$", inputs),
        )

    def modulate(self, vector: Text | Float[Array, "B d"] | None) -> Heard:
        """Keys and values of a text.

        Raises:
          ValueError: there is none, or it has features for another number of layers.
        """
        if vector is None:
            raise ValueError("this backbone reads a text, which the conditioning does not make; use LayeredCaption or Label")
        text = vector
        if not isinstance(text, Text):
            text = Text(vector[:, None, None], jnp.ones((len(vector), 1), bool))
        features, parts = jnp.moveaxis(text.features, 1, 0), text.features.shape[1]
        if parts not in (1, self.layers):
            raise ValueError(
                f"conditioning.parts is {parts}; it must be 1, or backbone.layers, which is {self.layers}"
            )
        features = jnp.broadcast_to(features, (self.layers, *features.shape[1:])).astype(self.dtype)
        nothing = (None,) * (1 + self.shared)
        if self.unroll:
            each = [block(None, None, x, *nothing)[1] for block, x in zip(self.blocks, features)]
            keys, values = (jnp.stack(part, 1) for part in zip(*each))
        else:
            keys, values = (jnp.moveaxis(part, 0, 1) for part in self.blocks(None, None, features, *nothing)[1])
        return Heard(keys, values, text.valid)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Heard, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        x, cache = self.look(x, rows, mod, cache)
        return self.norm(x), cache

    @nn.nowrap
    def look(self, x: Array, rows: Rows, mod: Heard, cache: Cache | None, *more: Array) -> tuple[Array, Cache | None]:
        """Rows through all layers."""
        rows.fit(self.rows)
        each = tuple(jnp.moveaxis(part, 1, 0) for part in (mod.keys, mod.values))
        mask = rows.sight(masked=True).mask
        return self.run(self.blocks, x.astype(self.dtype), cache, each, (mod.valid, mask, rows.first, *more))


class TimedBlock(Block):
    """As `Block`, with norms and gates that a time's vector modulates."""

    def begin(self):
        self.modulation = Linear(6 * self.width, self.dtype, jnp.float32, zeros, bias=True)

    def branches(self, more):
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(*more)[:, None], 6, axis=-1)
        return (
            (lambda x: modulated(x, scale1, shift1, self.eps), gate1),
            (lambda x: modulated(x, scale2, shift2, self.eps), gate2),
        )


class TimedReader(Reader):
    """As `Reader`, but every row sees every row, and a time modulates all norms.

    Attributes: see `Reader`; `rows` 0 is one for each token.
    Source: Instella-T2I (arXiv:2506.21022).
    """

    kind = TimedBlock
    shared = 4

    def complete(self, spec: TokenSpec) -> "TimedReader":
        return self if self.rows else self.clone(rows=spec.n)

    def begin(self):
        self.time1, self.time2 = (Linear(self.width, self.dtype, None, init, bias=True) for _ in range(2))
        self.modulation = Linear(2 * self.width, self.dtype, jnp.float32, zeros, bias=True)

    @typed
    def __call__(self, x: Float[Array, "B q d"], t: Float[Array, "B"], *, mod: Heard) -> Float[Array, "B q d"]:
        """Runs all layers at times in [0, 1]."""
        time = nn.silu(self.time2(nn.silu(self.time1(t[:, None]))))
        x, _ = self.look(x, Rows(np.zeros(x.shape[1], np.int32)), mod, None, time)
        scale, shift = jnp.split(self.modulation(time)[:, None], 2, axis=-1)
        return modulated(x, scale, shift, self.eps)


class LayeredCaption(Captioned):
    """Caption features as they are, for a `Reader`; nobody sees those of a caption that is dropped.

    Attributes:
      width: of the network.
      parts: of a row of features, side by side: one for each layer of the network; 1 gives all layers the whole row.
      start: whether there is a learned row before the tokens.
      rows: caption rows; captions are left-padded to it. 0 until the data is known (`complete`).
      features: width of the caption features; 0 until the data is known.
    Source: Instella-T2I (arXiv:2506.21022).
    """

    width: int
    parts: Layers = 1
    start: bool = True
    rows: int = 0
    features: int = 0

    no_decay = ("start_row",)

    def complete(self, info: Info) -> "LayeredCaption":
        found = super().complete(info)
        if info.text_width % self.parts:
            raise ValueError(
                f"conditioning.parts is {self.parts}, into which features of width {info.text_width} cannot be divided"
            )
        return found

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """Of `batch["text"]`, float [b r p*c]; `batch["text_mask"]`, bool [b r], marks the real rows."""
        text = jnp.asarray(batch["text"])
        features = jnp.moveaxis(text.reshape(*text.shape[:2], self.parts, -1), 2, 1)
        row = self.param("start_row", nn.initializers.normal(0.02), (1, self.width)) if self.start else jnp.zeros((1, self.width))
        rows = jnp.broadcast_to(row, (len(text), 1, self.width))
        return Cond(rows, mod=Text(features, jnp.asarray(batch["text_mask"], bool) & ~drop[:, None]))
