"""The transformer of VQ-Diffusion: all rows see all rows, and norms are told the time and the class."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Rows, attend, join_heads, split_heads
from ar_jax.nets.conditioning import Cond
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.transformer import Backbone, init
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Int, Many, Steps, typed


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class ToldNorm(nn.Module):
    """A norm whose scale and shift are made of a row of a table of its own."""

    width: int
    rows: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B q d"], row: Array) -> Float[Array, "B q d"]:
        """`row` is its number [B], or what every row weighs, float [B rows]."""
        table = self.param("table", init, (self.rows, self.width))
        told = look_up(table, row) if row.ndim == 1 else row @ table
        both = Linear(2 * self.width, self.dtype, jnp.float32, init, bias=True, name="linear")(nn.silu(told))
        scale, shift = jnp.split(both[:, None], 2, axis=-1)
        y = nn.LayerNorm(1e-5, use_bias=False, use_scale=False, use_fast_variance=False)(x)  # float32
        return (y * (1 + scale) + shift).astype(self.dtype)


class Block(nn.Module):
    """Attention, attention to the caption if there is one, and a perceptron or two convolutions, each after a norm."""

    width: int
    heads: int
    hidden: int
    dtype: Any
    times: int
    grid: tuple[int, int]
    conv: bool
    cross: bool

    @nn.compact
    def __call__(self, x, cache, t, classes, text, valid, seen):
        def dense(features, name):
            return Linear(features, self.dtype, None, init, bias=True, name=name)

        def heads(name, y):
            return split_heads(dense(self.width, name)(y), self.heads, 1)[0]

        x = constrain(x, BATCH)
        y = ToldNorm(self.width, self.times, self.dtype, name="attention_norm")(x, t)
        y = seen(*(heads(name, y) for name in ("query", "key", "value")))
        x = x + dense(self.width, "out")(join_heads(y))
        if self.cross:
            y = ToldNorm(self.width, self.times, self.dtype, name="text_norm")(x, t)
            sees = jnp.ones((1, 1, text.shape[1]), bool) if valid is None else valid[:, None]
            mask = jnp.broadcast_to(sees, (len(sees), x.shape[1], text.shape[1]))
            y = attend(heads("text_query", y), *(heads(name, text) for name in ("text_key", "text_value")), mask)
            x = x + dense(self.width, "text_out")(join_heads(y))
        if classes is not None:
            y = ToldNorm(self.width, classes.shape[-1], self.dtype, name="mlp_norm")(x, classes)
        else:
            y = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name="mlp_norm")(x)
        if not self.conv:
            return x + dense(self.width, "fc2")(quick_gelu(dense(self.hidden, "fc1")(y))), cache
        y = y.reshape(len(y), *self.grid, -1)
        for i, features in ((1, self.hidden), (2, self.width)):
            y = nn.Conv(features, (3, 3), padding=1, dtype=self.dtype, name=f"conv{i}")(y if i == 1 else quick_gelu(y))
        return x + y.reshape(x.shape), cache


class CodeTransformer(Backbone):
    """Predicts clean codes from spoilt ones.

    Attributes:
      layers, width, heads: sizes.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      mlp: two layers for each row ("rows"), or two convolutions of the grid ("grid").
      cross: rows look at those of the caption.
      places: rows and columns that there are learned vectors for; 0 are those of the grid. Of a table that is larger than the
        grid, slots take places one after the other, as in the released models of 256 tokens.
      times, states, grid: filled in by the generator.
      dtype, remat: see `Backbone`.
    Source: VQ-Diffusion (arXiv:2111.14822).
    """

    hidden: Many = 0
    mlp: Literal["rows", "grid"] = "rows"
    cross: bool = False
    places: tuple[Many, Many] = (0, 0)
    times: Steps = 1
    states: Many = 0
    codes: Many = 0
    grid: tuple[Many, Many] = (0, 0)

    no_decay = ()

    def complete(self, spec: TokenSpec) -> "CodeTransformer":
        grid = spec.scales[0]
        places = self.places if all(self.places) else grid
        if places[0] * places[1] < spec.n:
            raise ValueError(f"backbone.places is {places}, but there are {spec.n} tokens; give as many places")
        return self.clone(codes=spec.codes[0], grid=grid, places=places)

    def setup(self):
        self.embedding = self.param("embedding", init, (self.states, self.width))
        self.rows = self.param("rows", init, (self.places[0], self.width))
        self.columns = self.param("columns", init, (self.places[1], self.width))
        sizes = (
            self.width, self.heads, self.hidden or 4 * self.width, self.dtype, self.times, self.grid, self.mlp == "grid",
            self.cross,
        )  # fmt: skip
        self.blocks = self.stack(Block, sizes, (nn.broadcast,) * 5)
        self.norm = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False)
        self.readout = Linear(self.codes, self.dtype, jnp.float32, init, bias=True)

    @typed
    def predict(self, noisy: Int[Array, "B n"], t: Int[Array, "B"], cond: Cond) -> Float[Array, "B n v"]:
        """Logits of the clean codes, float32."""
        slots = np.arange(noisy.shape[1])
        row, column = np.divmod(slots, self.places[1])
        x = look_up(self.embedding, noisy) + self.rows[row] + self.columns[column]
        text = cond.rows.astype(self.dtype) if self.cross else None
        seen = Rows(np.zeros(len(slots), np.int32)).sight()
        given = (t, cond.mod, text, cond.valid if self.cross else None, seen)
        return self.readout(self.norm(self.run(self.blocks, x.astype(self.dtype), None, (), given)[0]))

    def modulate(self, vector: Array | None) -> Array | None:
        return vector

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        where, wide = r"/blocks/", r"((text_)?(query|key|value)|fc1)"
        return (
            (where + wide + r"/kernel$", outputs),
            (where + wide + r"/bias$", P("tp")),
            (where + r"((text_)?out|fc2)/kernel$", inputs),
        )
