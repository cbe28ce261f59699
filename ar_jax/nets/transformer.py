"""The Llama-like transformer of next-token image models, for training (all rows at once) and decoding (cached)."""

from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import ATTENTION, Int8, Kept, Rows, join_heads, remember, split_heads
from ar_jax.nets.dropout import Dropout
from ar_jax.nets.linear import PRODUCT, Linear
from ar_jax.nets.positions import rotary, rotary_line, rotate
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Layers, Share, Unstored, Within, typed

init = nn.initializers.normal(0.02)


REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION),
    "full": None,
}


@struct.dataclass
class Cache:
    """Keys and values of the rows seen so far.

    Attributes:
      k, v: [l B h r e], or one [B h r e] per layer if the network is unrolled; arrays or `Int8`.
    """

    k: Any
    v: Any

    @property
    def rows(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[-2]

    def grow(self, rows: int) -> "Cache":
        """The same cache with room for `rows` rows in all."""
        more = rows - self.rows

        def longer(x):
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])
            return constrain(x, *[None] * (x.ndim - 4), BATCH, "tp")

        return jax.tree.map(longer, self)


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32, times a learned scale."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class Backbone(nn.Module):
    """What stacks of blocks have in common: layout of the layers, cache, and what the backward pass keeps.

    Attributes:
      layers, width, heads: sizes.
      dtype: of the matrix products; parameters stay float32.
      remat: what the backward pass computes again to save memory: "none", "dots" (all but matrix products and
        attention) or "full" (everything inside a block).
      unroll: the layout for decoding, one tree of kernels per layer instead of stacked ones (see `slices`).
    """

    layers: Layers
    width: int
    heads: int
    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"
    unroll: Unstored = False

    turned = False  # whether its heads have two-dimensional rotary positions

    @property
    def divided(self) -> tuple[P, P]:
        """How kernels are divided whose outputs, and whose inputs, tensor parallelism divides.

        Outputs of a joint product for queries, keys and values lie head by head, so that whole heads are divided.
        """
        return P(None, "tp"), P("tp", None)

    def complete(self, spec: TokenSpec) -> "Backbone":
        """Fills in what only the tokenizer knows; nothing."""
        return self

    @nn.nowrap
    def stack(self, block: type[nn.Module], sizes: tuple, axes: tuple, layers: int = 0) -> Any:
        """The blocks, for `setup`.

        Args:
          block: called with rows, the layer's keys and values (or None) and the arguments of `run`.
          sizes: its fields.
          axes: of those arguments, 0 (one slice per layer) or `nn.broadcast`.
          layers: how many; 0 is all.
        Raises:
          ValueError: the width has no such heads, or there is no such `remat`.
        """
        if self.width % self.heads or (self.turned and self.width // self.heads % 4):
            need = "a multiple of 4 (2 axes x 2 channels of a rotary pair)" if self.turned else "a whole number"
            raise ValueError(f"{type(self).__name__}: width / heads is {self.width} / {self.heads}; it must be {need}")
        if self.remat not in ("none", *REMAT):
            raise ValueError(f"backbone.remat is {self.remat!r}; it must be one of none, {', '.join(REMAT)}")
        if self.remat != "none":
            block = nn.remat(block, prevent_cse=self.unroll, policy=REMAT[self.remat])
        if self.unroll:
            return [block(*sizes) for _ in range(layers or self.layers)]
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *axes),
            length=layers or self.layers,
        )(*sizes)

    @nn.nowrap
    def run(self, blocks: Any, x: Array, cache: Cache | None, each: tuple, shared: tuple) -> tuple[Array, Cache | None]:
        """Rows through all layers; `each` holds arrays with a slice per layer, `shared` what all layers get."""
        layers = cache and (cache.k, cache.v)
        if not self.unroll:
            x, layers = blocks(x, layers, *each, *shared)
            return x, cache and Cache(*layers)
        done = []
        for i, block in enumerate(blocks):
            x, pair = block(x, layers and (layers[0][i], layers[1][i]), *(part[i] for part in each), *shared)
            done.append(pair)
        return x, cache and Cache(*(list(side) for side in zip(*done)))

    def empty_cache(self, batch: int, kept: Kept = "own", layers: int = 0) -> Cache | None:
        """A cache without rows, of so many layers, 0 is all; `Cache.grow` makes room."""
        shape, layers = (batch, self.heads, 0, self.width // self.heads), layers or self.layers

        def rows(*layers):
            x = jnp.zeros((*layers, *shape), self.dtype)
            return Int8(x.astype(jnp.int8), x[..., :1]) if kept == "int8" else x

        k, v = ([rows() for _ in range(layers)] if self.unroll else rows(layers) for _ in "kv")
        return Cache(k, v)

    def by_layer(self) -> "Backbone":
        """The same network laid out for decoding (see `slices`)."""
        return self.clone(unroll=True)

    @nn.nowrap
    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        return slices(path, leaf)

    def modulate(self, vector: Float[Array, "B d"] | None) -> Any:
        """What the condition's vector does to this network, of all its layers at once; nothing."""
        return None


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    width: int
    heads: int
    hidden: int
    dropout: Share
    eps: float
    dtype: Any

    def setup(self):
        def dense(features):
            return Linear(features, self.dtype)

        self.attention_norm, self.mlp_norm = RMSNorm(self.eps), RMSNorm(self.eps)
        self.qkv, self.out = dense(3 * self.width), dense(self.width)
        self.gate, self.up, self.down = dense(self.hidden), dense(self.hidden), dense(self.width)
        self.drop = Dropout(self.dropout)

    def __call__(self, x, cache, table, seen, first):
        det = not self.has_rng("dropout")
        x = constrain(x, BATCH)
        out, cache = self.attend(self.attention_norm(x), cache, table, seen, first)
        x = x + self.drop(out, deterministic=det)
        y = self.mlp_norm(x)
        return x + self.drop(self.down(nn.silu(self.gate(y)) * self.up(y)), deterministic=det), cache

    def attend(self, x, cache, table, seen, first):
        q, k, v = split_heads(self.qkv(x), self.heads)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        k, v, cache = remember(cache, k, v, first)
        return self.out(join_heads(seen(q, k, v))), cache


class Transformer(Backbone):
    """A stack of `Block`s with rotary positions and a final norm.

    Attributes:
      layers, width, heads: sizes; width/heads is a multiple of 4.
      hidden: width of the SwiGLU; 0 takes Llama's rule, 8/3 width rounded up to a multiple of 256.
      dropout: rate after attention and MLP; active only when a "dropout" key is given to `apply`.
      base: wave length base of the rotary positions.
      final: whether there is a last norm.
      line: tokens lie on a line, and all pairs turn with their column, as in Llama; else half of them turn with each axis.
      dtype, remat, unroll: see `Backbone`.
    """

    hidden: int = 0
    dropout: Share = 0.0
    base: Annotated[float, Within(1, 2**24)] = 10000.0
    eps: float = 1e-5
    final: bool = True
    line: bool = False

    turned = True

    def setup(self):
        hidden = self.hidden or -(-(8 * self.width // 3) // 256) * 256
        sizes = (self.width, self.heads, hidden, self.dropout, self.eps, self.dtype)
        self.blocks = self.stack(Block, sizes, (nn.broadcast, nn.broadcast, nn.broadcast))
        if self.final:
            self.norm = RMSNorm(self.eps)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        return (r"/(qkv|gate|up)/kernel$", outputs), (r"/(out|down)/kernel$", inputs)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; with a cache, earlier rows are read from it and these added.

        Args:
          x: input rows.
          rows: which they are.
          mod: nothing modulates this network.
          cache: with room for all rows of `rows.keys`.
        """
        if self.line:
            table = rotary_line(rows.coords[..., 2], self.width // self.heads, self.base)
        else:
            table = rotary(rows.coords, self.width // self.heads, self.base)
        return self.look(x, rows, cache, table)

    @nn.nowrap
    def look(self, x: Array, rows: Rows, cache: Cache | None, table: Array | None) -> tuple[Array, Cache | None]:
        """Rows through all layers, turned by the table of rotary positions."""
        x, cache = self.run(self.blocks, x.astype(self.dtype), cache, (), (table, rows.sight(), rows.first))
        return self.norm(x) if self.final else x, cache


class Positioned(Transformer):
    """As `Transformer`, but learned positions of the sequence are added to the rows, and none is turned.

    Attributes:
      rows: of the longest sequence; 0 is one for the condition and one for each token (`complete`).
      others: see `Transformer`.
    Source: GigaTok (arXiv:2504.08736).
    """

    rows: Annotated[int, Within(0, 2**24)] = 0

    turned = False

    def complete(self, spec: TokenSpec) -> "Positioned":
        return self if self.rows else self.clone(rows=spec.n + 1)

    def setup(self):
        super().setup()
        self.positions = self.param("positions", nn.initializers.normal(self.width**-0.5), (self.rows, self.width))

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        return self.look(x + rows.of(self.positions), rows, cache, None)


def slices(path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
    """What becomes of a parameter of a `Backbone`, path (its name, "blocks", ...), with `unroll=True`: its layers one by one.

    Inside a loop over tokens, XLA on CPU copies every layer's slice of stacked weights anew for every token.
    """
    if path[1] != "blocks":
        return {path: leaf}
    return {(path[0], f"blocks_{i}", *path[2:]): leaf[i] for i in range(len(leaf))}
