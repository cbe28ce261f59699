"""Hita's generator: `Causal` over codes of the whole image and then those of its patches, which have tables and readouts apart.

`Causal(Holistic(...), Label(...), ByLevel(), TwoTables(), emphasis="levels")`, in raster order.

Source: Hita (arXiv:2507.02358).
"""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.base import Frozen
from ar_jax.generators.inputs import Previous, some
from ar_jax.heads.categorical import Categorical
from ar_jax.nets import transformer
from ar_jax.nets.attention import Rows, join_heads, remember, split_heads
from ar_jax.nets.conditioning import Cond, fold, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.positions import NOWHERE, rotary, rotate
from ar_jax.nets.transformer import Cache, Transformer
from ar_jax.orders import Order
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Tokens, Within, typed


class TwoTables(Previous):
    """As `Previous`, but codes of each level have a table of their own.

    Attributes:
      of_next: codes are looked up in the table of the token that is predicted. That is what the published sampler does, where
        the last code of a level gets a vector that it never had in training; so it is off.
      others: see `Previous`.
    """

    of_next: bool = False

    adjustable = ("of_next",)

    def complete(self, spec: TokenSpec) -> "TwoTables":
        if len(spec.codes) != 1 or self.shared:
            raise ValueError(
                f"TwoTables has tables for tokens of one code, but codes is {spec.codes} and shared {self.shared}; use Previous"
            )
        return super().complete(spec)

    def check(self, order: Order) -> None:
        super().check(order)
        if len(order.slot) > 1 or (isinstance(order.slot, np.ndarray) and (order.slot != np.arange(self.spec.n)).any()):
            raise ValueError(
                "tokens of several levels with tables apart are drawn in the order of their slots; use orders.raster"
            )

    def setup(self):
        shape = (self.spec.codes[0], self.width)
        self.level = [
            self.param(f"level_{i}", nn.initializers.normal(0.02), shape) for i in range(len(self.spec.scales))
        ]

    @typed
    def __call__(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None, first: Index, size: int
    ) -> tuple[Float[Array, "B m d"], Int[Array, "#B m 3"]]:
        """As `Previous`."""
        coords = jnp.asarray(self.spec.coords)[order.slot]

        def before(x, fill):
            return some(jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=fill), first, size)

        ways, carried, codes = len(cond.rows) // len(tokens), before(coords, NOWHERE), before(tokens, 0)[..., 0]
        level = (some(coords, first, size) if self.of_next else carried)[..., :1]
        x = sum(jnp.where(level == i, look_up(table, codes), 0) for i, table in enumerate(self.level))
        x, begins = widen(x, ways), (first + jnp.arange(size) == 0)[:, None]
        return jnp.where(begins, cond.rows[:, -1:].astype(x.dtype), x), widen(carried, ways if len(carried) > 1 else 1)


class Block(transformer.Block):
    """As `Transformer`'s; vectors are added to turned queries and keys, [#B h q e]."""

    def attend(self, x, cache, places, seen, first):
        table, added = places
        q, k, v = split_heads(self.qkv(x), self.heads)
        q, k = (rotate(y, table) + added.astype(y.dtype) for y in (q, k))
        k, v, cache = remember(cache, k, v, first)
        return self.out(join_heads(seen(q, k, v))), cache


class Holistic(Transformer):
    """As `Transformer` on tokens of two levels: rows before the last token of level 0 is known are not turned, but have a learned
    vector added to their queries and keys, in all layers the same. The row that carries that token lies nowhere, the others in
    the grid of level 1.

    Attributes:
      places: tokens of level 0; 0 is as many as there are (`complete`).
      others: see `Transformer`.
    """

    places: Annotated[int, Within(0, 2**24)] = 0

    def complete(self, spec: TokenSpec) -> "Holistic":
        if len(spec.scales) != 2 or spec.scales[0][0] != 1:
            raise ValueError(
                f"Holistic needs tokens of the whole image on a line, then a grid, but the tokenizer has {spec.scales}"
            )
        if self.places not in (0, spec.scales[0][1]):
            raise ValueError(
                f"backbone.places is {self.places}, but the tokenizer has {spec.scales[0][1]}; give as many, or 0"
            )
        return self.clone(places=spec.scales[0][1])

    def setup(self):
        hidden = self.hidden or -(-(8 * self.width // 3) // 256) * 256
        sizes = (self.width, self.heads, hidden, self.dropout, self.eps, self.dtype)
        self.blocks = self.stack(Block, sizes, (nn.broadcast, nn.broadcast, nn.broadcast))
        self.norm = transformer.RMSNorm(self.eps)
        self.slots = self.param("slots", transformer.init, (self.places, self.width))

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Array | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        level, _, column = jnp.moveaxis(jnp.asarray(rows.coords), -1, 0)
        place = jnp.where(level == 0, column + 1, jnp.where(level == NOWHERE, 0, self.places))
        early = (place < self.places)[..., None]
        turned = rotary(jnp.where((level == 1)[..., None], rows.coords, NOWHERE), self.width // self.heads, self.base)
        still = jnp.array([1.0, 0.0])[:, None, None, None]
        added = jnp.where(early, look_up(self.slots, jnp.minimum(place, self.places - 1)), 0)
        added = added.reshape(*added.shape[:2], self.heads, -1).swapaxes(1, 2)
        return self.look(x, rows, cache, (jnp.where(early, still, turned), added))


class ByLevel(Categorical):
    """As `Categorical`, with a readout for each level of the tokens, side by side in one layer.

    It takes the rows of step i to be those of slots i, i + 1 and so on, as they are where slots are drawn one by one in order.

    Attributes:
      levels: int, of every slot; () until the tokenizer is known (`complete`).
      others: see `Categorical`.
    """

    levels: tuple[int, ...] = ()

    def complete(self, spec: TokenSpec) -> "ByLevel":
        if self.chunk:
            raise ValueError(f"head.chunk is {self.chunk}, but ByLevel computes all rows at once; give 0")
        return super().complete(spec).clone(levels=tuple(spec.coords[:, 0].tolist()))

    def setup(self):
        begin = nn.initializers.normal(self.std) if self.std else nn.initializers.zeros
        out = (max(self.levels) + 1) * self.codes
        self.readout = Linear(out, self.dtype, jnp.float32, begin, self.bias)

    @typed
    def __call__(self, h: Float[Array, "B m d"], first: Index = 0) -> Float[Array, "B m v"]:
        """Logits of slots first, first + 1 and so on, each by the readout of its level."""
        level = some(jnp.asarray(self.levels, jnp.int32), first, h.shape[1], axis=0)[:, None]
        each = jnp.split(self.readout(h), max(self.levels) + 1, axis=-1)
        return sum(jnp.where(level == i, logits, 0) for i, logits in enumerate(each))

    def filtered(self, h, images, knobs, i):
        """See `Categorical`."""
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        logits = fold(self(h, i), h.shape[0] // images, guidance)
        return knobs.filter(logits / jnp.where(temperature > 0, temperature, 1))
