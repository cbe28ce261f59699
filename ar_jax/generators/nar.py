"""NAR: `Causal` by neighbours. All tokens of a diagonal are drawn in one step, each from what the tokens beside it and above it say.

`Neighbouring(Branched(...), Label(...), ByAxis(), Neighbours())`, in the order of `orders.Diagonals`.

Source: NAR (arXiv:2503.10696).
"""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.data import Info
from ar_jax.generators.base import Frozen, Setting, State, Step
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Previous
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import Rules
from ar_jax.nets import transformer
from ar_jax.nets.attention import Kept, Rows
from ar_jax.nets.conditioning import Cond
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.positions import rotary
from ar_jax.nets.transformer import Cache, Transformer
from ar_jax.orders import Diagonals, Order
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Blocks, Float, Index, Int, Layers, Tokens, Within, typed


def axes_of(spec: TokenSpec) -> int:
    """Directions in which tokens have neighbours: along a row, down a column and, where levels are frames, in time.

    Raises:
      ValueError: levels are no full grids of one size.
    """
    (height, width), *others = spec.scales
    if set(others) - {(height, width)} or spec.n != len(spec.scales) * height * width:
        raise ValueError(
            f"neighbours need a grid of tokens, or frames that are full grids of one size, but these are {spec.n} in {spec.scales}"
        )
    return 2 if len(spec.scales) == 1 else 3


def before(spec: TokenSpec) -> Int[np.ndarray, "n a"]:
    """The slot before each slot along every axis (column, row, frame), -1 where there is none."""
    (height, width), axes = spec.scales[0], axes_of(spec)
    slot, strides = np.arange(spec.n, dtype=np.int32)[:, None], np.array([1, width, height * width], np.int32)
    return np.where(spec.coords[:, ::-1] > 0, slot - strides, -1)[:, :axes]


class Neighbours(Previous):
    """As `Previous`, for steps that reveal a diagonal each: row r + 1 carries the token of rank r, row 0 the condition."""

    def complete(self, spec: TokenSpec) -> "Neighbours":
        axes_of(spec)
        return super().complete(spec)

    def example(self) -> tuple[Order, None]:
        return Diagonals()(self.spec), None

    def check(self, order: Order) -> None:
        want = Diagonals()(self.spec)
        known = isinstance(order.slot, np.ndarray)  # else an argument of a compiled program
        if order.sizes != want.sizes or len(order.slot) > 1 or (known and (order.slot != want.slot).any()):
            raise ValueError(
                f"neighbours are drawn diagonal by diagonal, in steps of {want.sizes[:8]}..., but order.sizes is "
                f"{order.sizes[:8]}...; use orders.Diagonals()"
            )


class NotingBlock(transformer.Block):
    """As `Transformer`'s; of two arrays it changes the first, and where `here` keeps what came in as the second."""

    def __call__(self, both, cache, here, table, seen, first):
        x, noted = both
        after, cache = super().__call__(x, cache, table, seen, first)
        return (after, jnp.where(here, x, noted)), cache


class Branched(Transformer):
    """As `Transformer`, with further blocks that branch off: a row comes out once for every axis of the tokens, side by side.

    What the trunk makes of a row is about the next token along its row; what a branch makes of it, about the next along the
    column, and a second branch about the next in time. Rows and columns turn queries and keys; frames have a learned
    vector, added to the rows (2+1 dimensions).

    Attributes:
      branch: blocks of every branch.
      ahead: branches begin before the last so many layers of the trunk.
      axes, frames: of the tokens; 0 until the tokenizer is known (`complete`).
      others: see `Transformer`.
    """

    branch: Layers = 1
    ahead: Blocks = 0
    axes: Annotated[int, Within(0, 3)] = 0
    frames: Annotated[int, Within(0, 2**16)] = 0

    no_decay = ("frame",)

    def complete(self, spec: TokenSpec) -> "Branched":
        if self.line or not self.final:
            raise ValueError(
                f"backbone has line {self.line} and final {self.final}; Branched lies in a grid and has last norms"
            )
        if not self.ahead <= self.layers:
            raise ValueError(f"backbone.ahead is {self.ahead}; it must be at most {self.layers}, the number of layers")
        return self.clone(axes=axes_of(spec), frames=len(spec.scales))

    def setup(self):
        hidden = self.hidden or -(-(8 * self.width // 3) // 256) * 256
        sizes = (self.width, self.heads, hidden, self.dropout, self.eps, self.dtype)
        shared = (nn.broadcast,) * 3
        if self.ahead:
            self.blocks = self.stack(NotingBlock, sizes, (0, *shared))
        else:
            self.blocks = self.stack(transformer.Block, sizes, shared)
        others = range(self.axes - 1)
        self.branches = [self.stack(transformer.Block, sizes, shared, self.branch) for _ in others]
        self.norm, self.branch_norms = transformer.RMSNorm(self.eps), [transformer.RMSNorm(self.eps) for _ in others]
        if self.frames > 1:
            self.frame = self.param("frame", transformer.init, (self.frames, self.width))

    @nn.nowrap
    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        if not path[1].startswith("branches_"):
            return super().slices(path, leaf)
        return {(path[0], f"{path[1]}_{i}", *path[2:]): leaf[i] for i in range(len(leaf))}

    def empty_cache(self, batch: int, kept: Kept = "own") -> Cache:
        """A cache without rows, of the trunk and each branch."""
        layers = [self.layers, *[self.branch] * (self.axes - 1)]
        caches = [super(Branched, self).empty_cache(batch, kept, count) for count in layers]
        return Cache(tuple(cache.k for cache in caches), tuple(cache.v for cache in caches))

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q f"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        if self.frames > 1:
            level = jnp.asarray(rows.coords)[..., :1]
            x = x + jnp.where(level < 0, 0, look_up(self.frame, jnp.maximum(level[..., 0], 0)))
        x = x.astype(self.dtype)
        table = rotary(rows.coords, self.width // self.heads, self.base)
        shared = (table, rows.sight(), rows.first)
        caches = [None] * self.axes if cache is None else [Cache(k, v) for k, v in zip(cache.k, cache.v)]
        if self.ahead:
            here = jnp.arange(self.layers) == self.layers - self.ahead
            (x, start), caches[0] = self.run(self.blocks, (x, x), caches[0], (here,), shared)
        else:
            x, caches[0] = self.run(self.blocks, x, caches[0], (), shared)
            start = x
        out = [self.norm(x)]
        for i, (branch, norm) in enumerate(zip(self.branches, self.branch_norms), 1):
            y, caches[i] = self.run(branch, start, caches[i], (), shared)
            out.append(norm(y))
        cache = cache and Cache(tuple(part.k for part in caches), tuple(part.v for part in caches))
        return jnp.concatenate(out, axis=-1), cache


class ByAxis(Categorical):
    """As `Categorical`, with a readout for each axis; a token's logits are the mean of those of the neighbours that it has.

    A row is what each neighbour says of the token, side by side, and then whether there is one (see `Neighbouring.met`).

    Attributes:
      axes: of the tokens; 0 until the tokenizer is known (`complete`).
      others: see `Categorical`; `std` is of the first readout, the others begin at 0.02.
    """

    axes: Annotated[int, Within(0, 3)] = 0

    def complete(self, spec: TokenSpec) -> "ByAxis":
        return super().complete(spec).clone(axes=axes_of(spec))

    def setup(self):
        super().setup()
        begin = nn.initializers.normal(0.02)
        self.others = [
            Linear(self.codes, self.dtype, jnp.float32, begin, self.bias)
            for _ in range(self.axes - 1)
        ]

    @property
    def rules(self) -> Rules:
        (_, divided), *_ = super().rules
        return ((r"/(readout|others_\d+)/kernel$", divided),)

    @typed
    def __call__(self, h: Float[Array, "B m f"]) -> Float[Array, "B m v"]:
        """Logits, float32."""
        logits, there = self.by_axis(h)
        return (logits * self.shares(logits, there)[..., None]).sum(-2)

    def shares(self, logits: Float[Array, "B m a v"], there: Float[Array, "B m a"]) -> Float[Array, "B m a"]:
        """What part each neighbour has in a token's logits."""
        return there / there.sum(-1, keepdims=True)

    def by_axis(self, h: Float[Array, "B m f"]) -> tuple[Float[Array, "B m a v"], Float[Array, "B m a"]]:
        """Logits that each neighbour gives, and whether there is such a one, 1 or 0."""
        rows, there = jnp.split(h, [h.shape[-1] - self.axes], axis=-1)
        parts = jnp.split(rows, self.axes, axis=-1)
        logits = [read(part) for read, part in zip((self.readout, *self.others), parts)]
        return jnp.stack(logits, axis=-2), there.astype(jnp.float32)


class Neighbouring(Causal):
    """Prediction of all tokens of a diagonal at once, each from what the rows of the tokens before it along every axis say.

    In a step the tokens of the diagonal before are fed into the cache, which all lie beside or above those that are drawn.
    Rows see those of their own diagonal and of earlier ones.

    Attributes: as in `Causal`; the networks are `Branched`, `Neighbours` and `ByAxis`.
    """

    backbone: Branched
    head: ByAxis = ByAxis()
    inputs: Neighbours = Neighbours()

    parses = False

    def complete(self, spec: TokenSpec, info: Info) -> "Neighbouring":
        for name, kind in (("backbone", Branched), ("head", ByAxis), ("inputs", Neighbours)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"generator.{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}"
                )
        return super().complete(spec, info)

    def row_steps(self, p: int, order: Order) -> Array:
        """Steps in which rows are fed: those of the condition, then each token's one after it is drawn."""
        return np.concatenate([np.arange(1 - p, 1, dtype=np.int32), order.step[:-1] + 1])

    def hidden(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None = None
    ) -> Float[Array, "b n f"]:
        """What is said of every rank (see `met`), from tokens in rank order."""
        self.inputs.check(order)
        return self.met(super().hidden(tokens, cond, order, tokenizer), 0, 0, order.n, order)

    def met(
        self, h: Float[Array, "B q f"], begin: Index, first: Index, size: int, order: Order
    ) -> Float[Array, "B m e"]:
        """What the neighbours of ranks first..first+size say of them, side by side, and which of them there are.

        Args:
          h: rows begin..begin+q.
        """
        slots = jnp.asarray(order.slot)[0]
        ranks = jnp.argsort(slots)
        neighbour = jnp.asarray(before(self.spec))[jnp.take(slots, first + jnp.arange(size), mode="clip")]
        there, begins = neighbour >= 0, (neighbour < 0).all(-1, keepdims=True)
        row = jnp.where(there, 1 + ranks[neighbour], 0)  # of the condition, for the first token along all axes
        parts = jnp.split(h, self.backbone.axes, axis=-1)
        found = [jnp.take(part, row[:, i] - begin, axis=1, mode="clip") for i, part in enumerate(parts)]
        flags = jnp.broadcast_to((there | begins).astype(h.dtype), (len(h), *there.shape))
        return jnp.concatenate([*found, flags], axis=-1)

    def rows(
        self, state: State, first: Index, size: int, setting: Setting
    ) -> tuple[Float[Array, "B m f"], Cache | None]:
        """What is said of ranks first..first+size; feeds the tokens of the step before, and as many as a loop has room for.

        Rows beyond those are of tokens not yet known. Nobody who counts sees them, and the next steps write them anew.
        """
        order = setting.order
        fed = size + _slack(order)
        starts = np.append(0, 1 + np.cumsum(order.sizes)[:-1] - order.sizes[:-1]).repeat(order.sizes)
        begin = np.minimum(starts, order.n - fed)  # the last steps reach back to rows that are right already
        begin = int(begin[first]) if isinstance(first, int) else jnp.asarray(begin, jnp.int32)[first]
        h, cache = super().rows(state, begin, fed, setting)
        return self.met(h, begin, first, size, order), cache

    def grow(self, state: State, ranks: int, setting: Setting) -> State:
        order = setting.order
        room = max(order.rooms or order.sizes) + _slack(order)
        return super().grow(state, min(ranks + room, order.n), setting)

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Reveals the ranks of a step; there may be more than it has."""
        h, cache = self.rows(state, now.first, now.size, setting)
        token = self.head.sample(h, now.keys, setting.knobs, now.i, setting.tokenizer)
        return State(state.tokens.at[:, now.first + jnp.arange(now.size)].set(token, mode="drop"), cache)


def _slack(order: Order) -> int:
    """How many rows more than it draws a step may have to feed."""
    return int(np.subtract(order.sizes[:-1], (order.rooms or order.sizes)[1:]).max(initial=0))
