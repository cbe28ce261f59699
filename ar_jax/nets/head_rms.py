"""Transformers whose heads normalise queries and keys by their root mean square: of a line beside a map that changes its size."""

from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Rows, join_heads, remember, split_heads
from ar_jax.nets.linear import Linear
from ar_jax.nets.positions import rotary_axes, rotate, rotate_halves
from ar_jax.nets.transformer import Backbone, RMSNorm
from ar_jax.typing import Array, Float, Index, Layers, Many, Within, typed

init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # +-1/sqrt(fan_in)


class Attention(nn.Module):
    """Queries and keys are normalised by head, with learned scales, then turned by a table, if there is one.

    Attributes:
      halves: pairs that turn together lie half a head apart (`rotate_halves`), else beside each other.
    """

    width: int
    heads: int
    eps: float
    dtype: Any
    halves: bool = False

    def setup(self):
        self.query, self.key, self.value, self.out = (
            Linear(self.width, self.dtype, None, init) for _ in range(4)
        )
        self.query_norm, self.key_norm = RMSNorm(self.eps), RMSNorm(self.eps)

    def split(self, y: Float[Array, "B q d"]) -> Float[Array, "B h q e"]:
        return split_heads(y, self.heads, 1)[0]

    def keys(self, y: Float[Array, "B q d"], table: Array | None = None) -> tuple[Array, Array]:
        """Keys and values [B h q e] of rows."""
        return self.turned(self.key_norm(self.split(self.key(y))), table), self.split(self.value(y))

    def turned(self, x, table):
        if table is None:
            return x
        return rotate_halves(x, table) if self.halves else rotate(x, table)

    def __call__(
        self, y: Float[Array, "B q d"], seen: Callable, cache: Any = None, first: Index = 0, table: Array | None = None,
        others: Float[Array, "B r f"] | None = None,
    ) -> tuple[Float[Array, "B q d"], Any]:  # fmt: skip
        """Rows of the result, and the cache with these rows' keys and values at `first`.

        Args:
          seen: as of `Rows.sight`.
          others: rows to look at; None is the same.
        """
        q = self.turned(self.query_norm(self.split(self.query(y))), table)
        k, v, cache = remember(cache, *self.keys(y if others is None else others, table), first)
        return self.out(join_heads(seen(q, k, v))), cache


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm."""

    width: int
    heads: int
    hidden: int
    halves: bool
    eps: float
    dtype: Any

    def setup(self):
        def dense(features):
            return Linear(features, self.dtype, None, init)

        self.attention = Attention(self.width, self.heads, self.eps, self.dtype, self.halves)
        self.attention_norm, self.mlp_norm = RMSNorm(self.eps), RMSNorm(self.eps)
        self.gate, self.up, self.down = dense(self.hidden), dense(self.hidden), dense(self.width)

    def __call__(self, x, cache, table, seen):
        x = constrain(x, BATCH)
        x = x + self.attention(self.attention_norm(x), seen, table=table)[0]
        y = self.mlp_norm(x)
        return x + self.down(nn.silu(self.gate(y)) * self.up(y)), cache


class Resizing(Backbone):
    """A line of rows and a map of rows that see each other; after some layers the map changes its size by a convolution.

    Rows have rotary positions of three axes: place on the line, row, column. There is no last norm.

    Attributes:
      layers, width, heads: sizes.
      before: layers before the change, at least 1 and fewer than all.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      axes: channels of a head that turn with each axis, even numbers; () is an eighth with the line, the rest with row and column
        (`axes_of`).
      halves: see `Attention`: the released networks have it, though the table's angles are for neighbours.
      base: wave length base of the rotary positions.
      eps: of the norms.
      dtype, remat, unroll: see `Backbone`.
    Source: Instella-T2I (arXiv:2506.21022).
    """

    before: Layers = 8
    hidden: Many = 0
    axes: tuple[int, ...] = ()
    halves: bool = True
    base: Annotated[float, Within(1, 2**24)] = 10000.0
    eps: float = 1e-6

    def setup(self):
        if not 0 < self.before < self.layers:
            raise ValueError(
                f"{type(self).__name__}: before is {self.before}, but there are {self.layers} layers; leave at least one after"
            )
        sizes = (
            self.width, self.heads, self.hidden or 4 * self.width, self.halves, self.eps, self.dtype
        )  # fmt: skip
        self.blocks_before, self.blocks_after = (
            self.stack(Block, sizes, (nn.broadcast, nn.broadcast), layers)
            for layers in (self.before, self.layers - self.before)
        )
        self.conv = self.convolution()

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        return (r"/(query|key|value|gate|up)/kernel$", outputs), (r"/(out|down)/kernel$", inputs)

    @typed
    def __call__(
        self, line: Float[Array, "b m d"], image: Float[Array, "b h w d"], span: int
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b y x d"]]:
        """Runs all layers.

        Args:
          line, image: rows.
          span: rows and columns of the map are stretched to lie in 0..span-1; 0 takes them as they are.
        """
        line, image = self.look(self.blocks_before, line.astype(self.dtype), image.astype(self.dtype), span)
        return self.look(self.blocks_after, line, self.resized(image), self.resized_span(span))

    def look(self, blocks, line, image, span):
        (b, m, d), (_, height, width, _) = line.shape, image.shape
        features = self.width // self.heads
        axes = self.axes or axes_of(features)
        if len(axes) != 3 or sum(axes) != features or any(size < 1 or size % 2 for size in axes):
            raise ValueError(
                f"{type(self).__name__}: axes is {axes}; it must be three even numbers with the sum width / heads = {features}"
            )
        table = rotary_axes(places(m, height, width, span), axes, self.base)
        x = jnp.concatenate([line, image.reshape(b, -1, d)], axis=1)
        seen = Rows(np.zeros(x.shape[1], np.int32)).sight()
        x, _ = self.run(blocks, x, None, (), (table, seen))
        return x[:, :m], x[:, m:].reshape(image.shape)


class Halving(Resizing):
    """A `Resizing` to half the rows and columns. Attributes: see there."""

    def convolution(self) -> nn.Conv:
        return nn.Conv(self.width, (3, 3), strides=2, padding=1, kernel_init=init, dtype=self.dtype)

    def resized(self, x):
        b, height, width, d = x.shape
        mean = x.astype(jnp.float32).reshape(b, height // 2, 2, width // 2, 2, d).mean((2, 4))
        return self.conv(x) + mean.astype(x.dtype)

    def resized_span(self, span):
        return span // 2


class Doubling(Resizing):
    """A `Resizing` to twice the rows and columns. Attributes: see there."""

    def convolution(self) -> nn.Conv:
        return nn.Conv(4 * self.width, (3, 3), padding=1, kernel_init=init, dtype=self.dtype)

    def resized(self, x):
        b, height, width, d = x.shape
        y = self.conv(x).reshape(b, height, width, d, 2, 2)
        y = jnp.transpose(y, (0, 1, 4, 2, 5, 3)).reshape(b, 2 * height, 2 * width, d)
        return y + x.repeat(2, axis=1).repeat(2, axis=2)

    def resized_span(self, span):
        return 2 * span


def axes_of(features: int) -> tuple[int, int, int]:
    """Even numbers of a head's channels for the place on a line (an eighth), for rows, and for columns."""
    line = max(2, features // 16 * 2)
    rows = -(-(features - line) // 4) * 2
    return line, rows, features - line - rows


def places(line: int, height: int, width: int, span: int = 0) -> np.ndarray:
    """Places [m+h*w 3] along three axes, line, row and column: of rows on a line, then of a map (see `Resizing`)."""
    found = np.zeros((line + height * width, 3))
    found[:line, 0] = np.arange(line)
    for axis, (side, index) in enumerate(zip((height, width), np.indices((height, width)))):
        stretch = (span - 1) / max(side - 1, 1) if span else 1
        found[line:, 1 + axis] = index.reshape(-1) * stretch
    return found
