"""Token-Shuffle: `Causal` over cells of neighbouring tokens, each of which is one row of the network.

`NextCell(Transformer(..., final=False), Label(...), inputs=Merged(2))`, in the order `orders.Cells(2)`: side x side tokens become one
row, the network says what comes in the next cell, and that row becomes side x side rows again, of which the tokens are drawn in one
step, each by itself. Rows of the condition are not merged.

No code is published. The idea, side 2 and perceptrons before and after the network are the paper's (arXiv:2504.17789); our own reading
are their number and width, tables that all places of a cell share, positions by cells, and norms.
"""

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.data import Info
from ar_jax.generators.base import Frozen, Setting, State
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Previous
from ar_jax.nets.conditioning import Cond
from ar_jax.nets.linear import Linear
from ar_jax.nets.transformer import Cache, RMSNorm, Transformer
from ar_jax.orders import Cells, Order, raster
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Blocks, Float, Index, Many, Tokens, Within, typed

even = nn.initializers.lecun_normal()  # results as large as what is multiplied


class Perceptron(nn.Module):
    """Rows and a SwiGLU of their norm."""

    hidden: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B m d"]) -> Float[Array, "B m d"]:
        def dense(features, name):
            return Linear(features, self.dtype, name=name)

        y = RMSNorm(name="norm")(x).astype(self.dtype)
        y = nn.silu(dense(self.hidden, "gate")(y)) * dense(self.hidden, "up")(y)
        return x + dense(x.shape[-1], "down")(y)


class Merged(Previous):
    """As `Previous`, but rows are of cells: the row of a cell carries all tokens of the cell before it.

    Every token's vector is made as many times narrower as a cell has tokens; side by side they are a row, which goes through
    perceptrons. Places in a cell share all tables, and are told apart by where they lie in the row.

    Attributes:
      side: tokens along a side of a cell; of 1 there is nothing to make narrower.
      blocks: perceptrons, before the network and as many after it.
      hidden: their width; 0 is twice that of the network.
      dtype: of the matrix products.
      others: see `Previous`; `spec` is of the cells.
    """

    side: Annotated[int, Within(1, 64)] = 2
    blocks: Blocks = 2
    hidden: Many = 0
    dtype: Any = jnp.float32

    def complete(self, spec: TokenSpec) -> "Merged":
        (height, width), side = spec.scales[0], self.side
        if not np.array_equal(spec.coords, grid(height, width)) or height % side or width % side:
            raise ValueError(
                f"inputs.side is {side}; tokens must lie in a grid of whole cells of {side}x{side}, but these {spec.n} lie in {spec.scales}"
            )
        if self.width % side**2:
            raise ValueError(
                f"inputs.side is {side}, but backbone.width is {self.width}; it must be a multiple of {side**2}, the tokens of a cell"
            )
        return super().complete(dataclasses.replace(spec, coords=grid(height // side, width // side)))

    def cells(self) -> Order:
        """The order of the tokens."""
        (height, width), side = self.spec.scales[0], self.side
        return Cells(side)(TokenSpec(grid(side * height, side * width)))

    def example(self) -> tuple[Order, None]:
        return self.cells(), None

    def check(self, order: Order) -> None:
        want = self.cells()
        known = isinstance(order.slot, np.ndarray)  # else an argument of a compiled program
        if order.sizes != want.sizes or len(order.slot) > 1 or (known and (order.slot != want.slot).any()):
            raise ValueError(
                f"Merged reveals a cell of {self.side}x{self.side} tokens per step, but order.sizes is {order.sizes[:8]}...; "
                f"use orders.Cells({self.side})"
            )

    def setup(self):
        super().setup()
        if self.side > 1:
            self.compress = Linear(self.width // self.side**2, self.dtype, kernel_init=even, bias=True)
        self.perceptrons = perceptrons(self)

    def embed(self, tokens: Tokens, elsewhere: Frozen | None = None) -> Float[Array, "b m d"]:
        images, cells = tokens.shape[:2]
        x = super().embed(tokens.reshape(images, cells * self.side**2, -1), elsewhere)
        x = (self.compress(x) if self.side > 1 else x).reshape(images, cells, -1)
        for perceptron in self.perceptrons:
            x = perceptron(x)
        return x


class Unmerged(nn.Module):
    """Rows of cells to rows of their tokens, the reverse of `Merged`; with the last norm of the network.

    Attributes:
      merged: what is reversed.
      eps: of the norm.
    """

    merged: Merged
    eps: float

    def setup(self):
        if self.merged.side > 1:
            self.expand = Linear(self.merged.width, self.merged.dtype, kernel_init=even, bias=True)
        self.perceptrons = perceptrons(self.merged)
        self.norm = RMSNorm(self.eps)

    @typed
    def __call__(self, h: Float[Array, "B m d"]) -> Float[Array, "B n d"]:
        for perceptron in self.perceptrons:
            h = perceptron(h)
        if self.merged.side > 1:
            h = self.expand(h.reshape(len(h), h.shape[1] * self.merged.side**2, -1))
        return self.norm(h)


def perceptrons(merged: Merged) -> list[Perceptron]:
    return [Perceptron(merged.hidden or 2 * merged.width, merged.dtype) for _ in range(merged.blocks)]


class NextCell(Causal):
    """Prediction of all tokens of a cell at once, from the cells before it, which are a row of the network each.

    Attributes: as in `Causal`; inputs are `Merged`, and the backbone has no last norm, which comes after the cells are taken apart.
    Source: Token-Shuffle (arXiv:2504.17789).
    """

    backbone: Transformer
    inputs: Merged = Merged()

    parses = False

    def complete(self, spec: TokenSpec, info: Info) -> "NextCell":
        for name, kind in (("backbone", Transformer), ("inputs", Merged)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"generator.{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        if self.backbone.final:
            raise ValueError("backbone.final is True, but the last norm comes after cells are taken apart; give False")
        return super().complete(spec, info)

    @property
    def dtype(self) -> Any:
        """Of what belongs to no part of it."""
        return self.inputs.dtype

    def setup(self):
        super().setup()
        self.unmerged = Unmerged(self.inputs, self.backbone.eps)

    def hidden(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None = None
    ) -> Float[Array, "b n d"]:
        """Hidden row of every rank, from tokens in rank order."""
        self.inputs.check(order)
        return self.unmerged(super().hidden(self.by_cell(tokens), cond, raster(self.inputs.spec), tokenizer))

    def rows(
        self, state: State, first: Index, size: int, setting: Setting
    ) -> tuple[Float[Array, "B m d"], Cache | None]:
        """Hidden rows of the ranks of whole cells."""
        area, inside = self.inputs.side**2, setting.replace(order=raster(self.inputs.spec))
        state = state.replace(tokens=self.by_cell(state.tokens))
        h, cache = super().rows(state, first // area, size // area, inside)
        return self.unmerged(h), cache

    def grow(self, state: State, ranks: int, setting: Setting) -> State:
        return super().grow(state, ranks // self.inputs.side**2, setting)

    @nn.nowrap
    def by_cell(self, tokens: Tokens) -> Tokens:
        """Tokens in rank order, those of a cell side by side."""
        return tokens.reshape(len(tokens), self.inputs.spec.n, -1)
