"""The transformer of flow models over tokens: modulated RMS norms, rotary positions, gated perceptrons."""

import itertools
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Kept, Rows, Sight, attend, join_heads, remember, split_heads
from ar_jax.nets.dropout import Dropout
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.mlp import xavier
from ar_jax.nets.positions import rotary, rotate, stretched
from ar_jax.nets.transformer import Backbone, Cache, RMSNorm, init
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Blocks, Float, Index, Int, Layers, Share, Within, typed

EPS = 1e-6  # of all norms


@struct.dataclass
class Condition:
    """Vectors that modulate rows.

    Attributes:
      vector: [B s d].
      sizes: how many rows, one after the other, each vector modulates; () is one vector for all rows, or one for each.
    """

    vector: Array
    sizes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def spread(self, y: Float[Array, "B s f"]) -> Float[Array, "B #q f"]:
        """What was made of the vectors, for every row."""
        parts, start = [], 0
        for size, run in itertools.groupby(self.sizes):
            part = y[:, start : start + len(list(run))]
            start += part.shape[1]
            # not an index: its gradient would be a sum row by row
            part = jnp.broadcast_to(part[:, :, None], (*part.shape[:2], size, part.shape[2]))
            parts.append(part.reshape(len(y), -1, y.shape[2]))
        return jnp.concatenate(parts, axis=1) if parts else y


def rms(x: Float[Array, "B q d"]) -> Float[Array, "B q d"]:
    """x / rms(x), float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)


def modulated(x: Float[Array, "B q d"], scale: Array, shift: Array) -> Float[Array, "B q d"]:
    """x / rms(x) (1 + scale) + shift, computed in float32."""
    return (rms(x) * (1 + scale) + shift).astype(x.dtype)


def gated_rules() -> Rules:
    """What tensor parallelism divides of the modules here (see `sharding.shard`)."""
    # Outputs of qkv and kv lie head by head, so that whole heads are divided.
    outputs, inputs = P(None, "tp"), P("tp", None)
    return (r"/(qkv|kv|q|gate|up)/kernel$", outputs), (r"/(out|down)/kernel$", inputs)


class Attention(nn.Module):
    """Attention of rows among themselves with rotary positions, or to rows that are given.

    Attributes:
      width, heads: sizes.
      bias: of queries, keys and values; the last projection has one always.
      cross: keys and values come from other rows.
      dropout: rate of the attention's weights and of the result; active only when a "dropout" key is given to `apply`.
      dtype: of the matrix products.
    """

    width: int
    heads: int
    bias: bool = True
    cross: bool = False
    attention_dropout: Share = 0.0
    dropout: Share = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B q d"],
        table: Float[Array, "2 #B q e"],
        seen: Sight,
        cache: tuple[Array, Array] | None = None,
        first: Index = 0,
        others: Float[Array, "B q z"] | None = None,
    ) -> tuple[Float[Array, "B q d"], tuple[Array, Array] | None]:
        """Rows of the result, and the cache with these rows' keys and values at `first`.

        Args:
          table: turns queries and keys (see `rotary`); the given rows lie where the querying ones do.
          others: with `cross`, what keys and values are made of.
        """

        def heads(rows, parts, name):
            y = Linear(parts * self.width, self.dtype, None, xavier, self.bias, name=name)(rows)
            return split_heads(y, self.heads, parts)

        if self.cross:
            (q,), (k, v) = heads(x, 1, "q"), heads(others, 2, "kv")
        else:
            q, k, v = heads(x, 3, "qkv")
        q = rotate(q, table)
        k, v, cache = remember(cache, rotate(k, table), v, first)
        det = not self.has_rng("dropout")
        if det or not self.attention_dropout:
            y = seen(q, k, v)
        else:
            y = attend(q, k, v, seen.mask, drop=Dropout(self.attention_dropout, deterministic=False))
        y = Linear(self.width, self.dtype, None, xavier, bias=True, name="out")(join_heads(y))
        return Dropout(self.dropout, deterministic=det)(y), cache


class GatedMLP(nn.Module):
    """W3 (GELU(W1 x) * W2 x), with biases and the exact GELU.

    Attributes:
      width: of the result.
      hidden: 0 is 8/3 `width`, rounded down.
      dropout, dtype: as in `Attention`.
    """

    width: int
    hidden: int = 0
    dropout: Share = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B q d"]) -> Float[Array, "B q d"]:
        def dense(features, name):
            return Linear(features, self.dtype, None, xavier, bias=True, name=name)

        def drop(y):
            return Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)

        hidden = self.hidden or 8 * self.width // 3
        y = nn.gelu(dense(hidden, "gate")(x), approximate=False) * dense(hidden, "up")(x)
        return drop(dense(self.width, "down")(drop(y)))


class Block(nn.Module):
    """Attention and perceptron, each between a modulated norm and a gate."""

    width: int
    heads: int
    hidden: int
    dropout: Share
    attention_dropout: Share
    dtype: Any

    @nn.compact
    def __call__(self, x, cache, cond, table, seen, first):
        net = {"dropout": self.dropout, "dtype": self.dtype}
        x = constrain(x, BATCH)
        ada = Linear(6 * self.width, self.dtype, jnp.float32, xavier, bias=True, name="ada")
        mod = cond.spread(ada(nn.silu(cond.vector.astype(jnp.float32))))
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(mod, 6, axis=-1)
        attention = Attention(self.width, self.heads, attention_dropout=self.attention_dropout, name="attention", **net)
        y, cache = attention(modulated(x, scale1, shift1), table, seen, cache, first)
        x = (x + gate1 * y).astype(x.dtype)
        y = GatedMLP(self.width, self.hidden, name="mlp", **net)(modulated(x, scale2, shift2))
        return (x + gate2 * y).astype(x.dtype), cache


class Gated(Backbone):
    """A stack of `Block`s with two-dimensional rotary positions and a last norm.

    Attributes:
      layers, width, heads: sizes; width/heads is a multiple of 4.
      hidden: width of the gated perceptrons; 0 is 8/3 `width`, rounded down.
      dropout: rate after attention and in the perceptron; active only when a "dropout" key is given to `apply`.
      attention_dropout: rate of the attention's weights, active with the other; kernels cannot do it.
      base: wave length base of the rotary positions.
      dtype, remat, unroll: see `Backbone`.
    Source: FlowAR (arXiv:2412.15205), xAR (arXiv:2502.20388).
    """

    hidden: int = 0
    dropout: Share = 0.0
    attention_dropout: Share = 0.0
    base: Annotated[float, Within(1, 2**24)] = 10000.0

    turned = True

    def setup(self):
        sizes = (
            self.width, self.heads, self.hidden, self.dropout, self.attention_dropout, self.dtype
        )  # fmt: skip
        self.blocks = self.stack(Block, sizes, (nn.broadcast,) * 4)
        self.norm = RMSNorm(EPS)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return gated_rules()

    def modulate(self, vector: Float[Array, "B d"] | None) -> Condition:
        """The condition's vector, for all rows.

        Raises:
          ValueError: the conditioning makes none.
        """
        if vector is None:
            raise ValueError("this backbone is modulated by a vector, which the conditioning does not make; use Label")
        return Condition(vector[:, None])

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Condition, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`. `mod` modulates them."""
        seen = rows.sight(masked=self.attention_dropout > 0 and self.has_rng("dropout"))  # kernels do not drop weights
        table = rotary(rows.coords, self.width // self.heads, self.base)
        x, cache = self.run(self.blocks, x.astype(self.dtype), cache, (), (mod, table, seen, rows.first))
        return self.norm(x), cache


class EncoderDecoder(nn.Module):
    """Two stacks one after the other, each with learned vectors of all slots; a backbone as `Causal` needs one.

    Attributes:
      layers, width, heads: sizes of the first stack.
      decoder_layers, decoder_heads: of the second; 0 is as many. Its width is the same.
      hidden, dropout, attention_dropout: see `Gated`.
      span: rotary positions of every level of the tokens are stretched to 0..span, so that places of small and large scales
        agree; 0 takes rows and columns as they are.
      last_positions: vectors of the slots are added to the result, too.
      dtype, remat: see `Backbone`.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: FlowAR (arXiv:2412.15205), xAR (arXiv:2502.20388).
    """

    layers: Layers
    width: int
    heads: int
    decoder_layers: Blocks = 0
    decoder_heads: int = 0
    hidden: int = 0
    dropout: Share = 0.0
    attention_dropout: Share = 0.0
    span: int = 0
    last_positions: bool = False
    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"
    spec: TokenSpec | None = None

    def complete(self, spec: TokenSpec) -> "EncoderDecoder":
        return self.clone(spec=spec)

    def setup(self):
        net = {
            "hidden": self.hidden, "dropout": self.dropout, "attention_dropout": self.attention_dropout,
            "dtype": self.dtype, "remat": self.remat,
        }  # fmt: skip
        self.encoder = Gated(self.layers, self.width, self.heads, **net)
        self.decoder = Gated(
            self.decoder_layers or self.layers, self.width, self.decoder_heads or self.heads, **net
        )  # fmt: skip
        self.input_norm = RMSNorm(EPS)
        self.between = Linear(self.width, self.dtype, kernel_init=xavier, bias=True)
        names = ("encoder_positions", "decoder_positions", *["head_positions"] * self.last_positions)
        self.tables = [self.param(name, init, (self.spec.n, self.width)) for name in names]

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return gated_rules()

    def empty_cache(self, batch: int, kept: Kept = "own") -> Cache:
        """A cache without rows; `Cache.grow` makes room."""
        caches = [stack.empty_cache(batch, kept) for stack in (self.encoder, self.decoder)]
        return Cache(tuple(cache.k for cache in caches), tuple(cache.v for cache in caches))

    def modulate(self, vector: Float[Array, "B d"] | None) -> Condition:
        """The condition's vector, for all rows of both stacks."""
        return self.encoder.modulate(vector)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Condition, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Gated`. Their `coords` are those of slots."""
        slot = slots(rows.coords, self.spec)
        rows = rows.replace(coords=stretched(rows.coords, self.spec.scales, self.span))
        table = [look_up(table, slot) for table in self.tables]
        caches = [None, None] if cache is None else [Cache(k, v) for k, v in zip(cache.k, cache.v)]
        x = self.input_norm((x + table[0]).astype(self.dtype))
        x, caches[0] = self.encoder(x, rows, mod=mod, cache=caches[0])
        x = (self.between(x) + table[1]).astype(self.dtype)
        x, caches[1] = self.decoder(x, rows, mod=mod, cache=caches[1])
        if self.last_positions:
            x = (x + table[2]).astype(x.dtype)
        return x, cache and Cache(tuple(part.k for part in caches), tuple(part.v for part in caches))


def slots(coords: Int[Array, "#B q 3"], spec: TokenSpec) -> Int[Array, "#B q"]:
    """Slots of coordinates, if every level is a full grid in raster order."""
    sizes = [height * width for height, width in spec.scales]
    first, widths = np.cumsum(sizes) - sizes, np.array([width for _, width in spec.scales])
    level, row, column = jnp.moveaxis(jnp.asarray(coords), -1, 0)
    return jnp.asarray(first, jnp.int32)[level] + row * jnp.asarray(widths, jnp.int32)[level] + column
