"""What the row that predicts a token is made of. The same functions serve training, on all rows, and sampling, on those of
a step: they read tokens of earlier steps only, so later ones may be anything."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.generators.base import Frozen
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.positions import NOWHERE, sine_grid
from ar_jax.nets.resize import area_matrix, bicubic_matrix
from ar_jax.orders import Order, raster, scales, to_ranks, to_slots
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Tokens, typed


def some(x: Array, first: Index, size: int, axis: int = 1) -> Array:
    """The entries of ranks first..first+size; of a numpy array at a known place, one again."""
    if isinstance(first, int):
        return x[(slice(None),) * axis + (slice(first, first + size),)]
    return lax.dynamic_slice_in_dim(jnp.asarray(x), first, size, axis)


class Previous(nn.Module):
    """The row of rank r carries the token of rank r-1; that of rank 0 is the condition's last row.

    Of a code it carries a learned embedding, of several sub-codes the sum of theirs, of a continuous token a projection.

    Attributes:
      width: of the rows; 0 until the network is known (`Causal.on`).
      spec: the tokens; None until the tokenizer is known (`complete`).
      shared: codes are looked up in the tables of the head (`Factorised`), not in its own.
    Source: LlamaGen (arXiv:2406.06525).
    """

    width: int = 0
    spec: TokenSpec | None = None
    shared: bool = False

    def complete(self, spec: TokenSpec) -> "Previous":
        return self.clone(spec=spec)

    def example(self) -> tuple[Order, None]:
        """An order and a tokenizer for initialisation."""
        return raster(self.spec), None

    def check(self, order: Order) -> None:
        """Raises a ValueError if an order of this kind cannot be generated."""
        if set(order.sizes) != {1} or len(order.sizes) != self.spec.n:
            raise ValueError(
                f"Previous reveals one of {self.spec.n} slots per step, but order.sizes is {order.sizes[:8]}...; "
                f"use orders.raster or another order of single slots"
            )

    def setup(self):
        std = nn.initializers.normal(0.02)
        if self.shared:
            return
        if len(self.spec.codes) == 1:
            self.embedding = self.param("embedding", std, (self.spec.codes[0], self.width))
        elif self.spec.codes:
            sizes = enumerate(self.spec.codes)
            self.tables = [nn.Embed(v, self.width, embedding_init=std, name=f"code_{i}") for i, v in sizes]
        else:
            self.projection = Linear(self.width, kernel_init=nn.initializers.xavier_uniform(), bias=True)

    def embed(self, tokens: Tokens, elsewhere: Frozen | None = None) -> Float[Array, "b m d"]:
        if not self.spec.codes:
            return self.projection(tokens)
        found = self.vectors(tokens, elsewhere).reshape(*tokens.shape, -1)
        if found.shape[-1] != self.width:
            raise ValueError(
                f"head.net.width is {found.shape[-1]}; it must be {self.width}, that of the generator's network"
            )
        return found.sum(2)

    def vectors(self, tokens: Int[Array, "b m k"], elsewhere: Frozen | None = None) -> Float[Array, "b m c"]:
        """What codes stand for, side by side."""
        if self.shared:
            return elsewhere(tokens, method="embed")
        if len(self.spec.codes) == 1:
            return look_up(self.embedding, tokens[..., 0])
        return jnp.concatenate([look_up(x.embedding, tokens[..., i]) for i, x in enumerate(self.tables)], axis=-1)

    @typed
    def __call__(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None, first: Index, size: int
    ) -> tuple[Float[Array, "B m d"], Int[Array, "#B m 3"]]:
        """Rows of ranks first..first+size, and the coordinates of what they carry.

        Args:
          tokens: in rank order.
          cond: of B = b * ways guided rows.
          order: what each rank is.
          tokenizer: calls a method of the frozen tokenizer, or of the head if `shared` (see `Causal.tables`).
        """
        coords = jnp.asarray(self.spec.coords)[order.slot]

        def before(x, fill):
            return some(jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=fill), first, size)

        ways = len(cond.rows) // len(tokens)
        x = widen(self.embed(before(tokens, 0), tokenizer), ways)
        begins = (first + jnp.arange(size) == 0)[:, None]
        coords = before(coords, NOWHERE)
        return jnp.where(begins, cond.rows[:, -1:].astype(x.dtype), x), widen(coords, ways if len(coords) > 1 else 1)


class Joined(Previous):
    """As `Previous`, but the row carries a projection of what the token's codes stand for, side by side.

    Attributes:
      shared: see `Previous`.
      bias: the projection has one.
      others: see `Previous`.
    Source: FQGAN (arXiv:2411.16681); with tables of its own and no bias ELM (arXiv:2410.16257).
    """

    shared: bool = True
    bias: bool = True

    def complete(self, spec: TokenSpec) -> "Joined":
        if not spec.codes:
            raise ValueError("Joined needs tokens of codes, but the tokenizer gives continuous ones; use Previous")
        return super().complete(spec)

    def setup(self):
        super().setup()
        self.projection = Linear(self.width, bias=self.bias)

    def embed(self, tokens: Tokens, elsewhere: Frozen | None = None) -> Float[Array, "b m d"]:
        return self.projection(self.vectors(tokens, elsewhere))


class Bits(Previous):
    """As `Previous`, but the row carries a projection of the token's bits, which are zeros and ones. Attributes: see there.

    Source: Instella-T2I (arXiv:2506.21022).
    """

    def complete(self, spec: TokenSpec) -> "Bits":
        if not spec.codes or set(spec.codes) != {2}:
            raise ValueError(f"Bits needs tokens of bits, but the tokenizer gives codes {spec.codes[:8]}; use Previous")
        return super().complete(spec)

    def setup(self):
        self.projection = Linear(self.width, bias=True)

    def embed(self, tokens: Tokens, elsewhere: Frozen | None = None) -> Float[Array, "b m d"]:
        return self.projection(tokens.astype(jnp.float32))


class NextScale(nn.Module):
    """Every row carries what coarser scales say of its slot, projected; those of the first scale carry the condition.

    What they say is the tokenizer's `context`. To it are added learned vectors of the slot and, if `levels`, of its scale.

    Attributes:
      channels: of the tokenizer's codes.
      levels: whether scales have learned vectors.
      width: of the rows; 0 until the network is known (`Causal.on`).
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: VAR (arXiv:2404.02905).
    """

    channels: int = 32
    levels: bool = True
    width: int = 0
    spec: TokenSpec | None = None

    no_decay = ("start", "position", "level")

    def complete(self, spec: TokenSpec) -> "NextScale":
        return self.clone(spec=spec)

    def example(self) -> tuple[Order, Frozen]:
        """An order and a stand-in for the tokenizer, for initialisation."""
        return scales(self.spec), lambda tokens, method: jnp.zeros((*tokens.shape[:2], self.channels))

    def check(self, order: Order) -> None:
        """Raises a ValueError if an order of this kind cannot be generated."""
        sizes = tuple(height * width for height, width in self.spec.scales)
        if order.sizes != sizes:
            raise ValueError(
                f"{type(self).__name__} reveals one scale per step, of {sizes} slots, but order.sizes is "
                f"{order.sizes[:8]}; use orders.scales"
            )

    def setup(self):
        init = nn.initializers.normal((3 * self.width) ** -0.5)
        self.word = Linear(self.width, kernel_init=init, bias=True)
        self.start = self.param("start", init, (int((self.spec.coords[:, 0] == 0).sum()), self.width))
        if self.levels:
            self.level = self.param("level", init, (len(self.spec.scales), self.width))
        self.position = self.param("position", *self.position_init())

    @nn.nowrap
    def position_init(self) -> tuple[Callable, tuple[int, ...]]:
        """Initialiser and shape of the learned positions."""
        return nn.initializers.normal((3 * self.width) ** -0.5), (self.spec.n, self.width)

    @typed
    def __call__(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen, first: Index, size: int
    ) -> tuple[Float[Array, "B m d"], Int[Array, "#B m 3"]]:
        """Rows of ranks first..first+size, and the coordinates of their slots.

        Args:
          tokens: in rank order; codes, or vectors in their place.
          cond: of B = b * ways guided rows.
          order: what each rank is.
          tokenizer: calls a method of the frozen tokenizer.
        """
        known = self.context(tokens, order, tokenizer, first, size)
        if known.shape[-1] != self.channels:
            raise ValueError(
                f"generator.inputs.channels is {self.channels}, but the tokenizer's codes have {known.shape[-1]}"
            )
        return self.place(widen(self.word(known), len(cond.rows) // len(tokens)), cond, order, first, size)

    def context(self, tokens, order, tokenizer, first, size) -> Float[Array, "b m c"]:
        known = tokenizer(to_slots(tokens, order), method="context")
        return some(to_ranks(known, order), first, size)

    def place(self, x, cond, order, first, size):
        """Puts the condition in the place of rows of the first scale, and adds what tells the rows apart."""
        slot = some(jnp.asarray(order.slot), first, size)
        coords = jnp.asarray(self.spec.coords)[slot]
        start = self.start[jnp.minimum(slot, len(self.start) - 1)].astype(x.dtype)
        x = jnp.where(coords[..., :1] == 0, cond.rows[:, -1:].astype(x.dtype) + start, x)
        table = self.positions().astype(x.dtype)
        if self.levels:
            table = table + self.level.astype(x.dtype)[self.spec.coords[:, 0]]
        return x + table[slot], coords

    def positions(self) -> Float[Array, "n d"]:
        """A vector of every slot."""
        return self.position


class NextLatent(NextScale):
    """Every row carries what the scale before says of its slot, projected; positions are the network's affair.

    Attributes: as in `NextScale`; there are no levels.
    Source: FlowAR (arXiv:2412.15205).
    """

    channels: int = 16
    levels: bool = False

    def setup(self):
        self.word = Linear(self.width, kernel_init=nn.initializers.xavier_uniform(), bias=True)

    def place(self, x, cond, order, first, size):
        coords = jnp.asarray(self.spec.coords)[some(jnp.asarray(order.slot), first, size)]
        return jnp.where(coords[..., :1] == 0, cond.rows[:, -1:].astype(x.dtype), x), coords


class Upsampled(NextScale):
    """Every row carries the codes of the scale before, enlarged to its own scale; that may be any of the tokenizer's.

    Nothing depends on the list of scales: positions are a learned grid, averaged to the size of each scale. In training an
    order may take another part of the tokenizer's scales in every update.

    Attributes:
      side: of the grid.
      others: as in `NextScale`.
    Source: FlexVAR (arXiv:2502.20313).
    """

    levels: bool = False
    side: int = 32

    @nn.nowrap
    def position_init(self) -> tuple[Callable, tuple[int, ...]]:
        return lambda key, shape: jnp.asarray(sine_grid(self.side, self.width)), (self.side, self.side, self.width)

    def context(self, tokens, order, tokenizer, first, size):
        weight = upsampling(self.spec, order, first, size)
        return jnp.einsum("mn,bnc->bmc", weight, tokenizer(tokens, method="embed"), precision=lax.Precision.HIGHEST)

    def positions(self):
        grid, parts = self.position.astype(jnp.float32), []
        for height, width in self.spec.scales:
            rows, columns = (area_matrix(side, self.side) for side in (height, width))
            part = jnp.einsum("hy,wx,yxd->hwd", rows, columns, grid, precision=lax.Precision.HIGHEST)
            parts.append(part.reshape(height * width, -1))
        return jnp.concatenate(parts)


def upsampling(spec: TokenSpec, order: Order, first: Index, size: int) -> Float[Array, "m n"]:
    """Bicubic weights of all ranks in what the step before says of ranks first..first+size; zeros for step 0."""
    sides = sorted({side for scale in spec.scales for side in scale})
    table = np.zeros((len(sides), len(sides), sides[-1], sides[-1]), np.float32)  # to, from, place there, place here
    for i, to in enumerate(sides):
        for j, source in enumerate(sides):
            table[i, j, :to, :source] = bicubic_matrix(to, source)
    scales = np.array([[sides.index(side) for side in scale] for scale in spec.scales], np.int32)
    coords = jnp.asarray(spec.coords)[order.slot[0]]
    kind = jnp.asarray(scales)[coords[:, 0]]  # which of the sides [n 2]
    step = jnp.asarray(order.step)
    before = step == some(step, first, size, 0)[:, None] - 1
    weight = before.astype(jnp.float32)
    for axis in range(2):
        source = jnp.where(before, kind[:, axis], 0).max(1)
        here = some(kind[:, axis], first, size, 0)
        rows = jnp.asarray(table)[here, source, some(coords[:, 1 + axis], first, size, 0)]
        # a product with zeros and ones: exact, and faster on a TPU than picking numbers
        chosen = jax.nn.one_hot(coords[:, 1 + axis], sides[-1], axis=0)
        weight = weight * jnp.matmul(rows, chosen, precision=lax.Precision.HIGHEST)
    return weight
