"""RAR: `Causal` in random orders that turn into raster order while it trains; every row knows which slot it predicts.

`Causal(Placed(...), StartLabel(...), Categorical(bias=True, std=0.02), Aimed())`, trained in `Annealed` order.

Source: RAR (arXiv:2411.00776).
"""

import dataclasses
import functools
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.base import Frozen
from ar_jax.generators.inputs import Previous, some
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.adaln import modulated
from ar_jax.nets.attention import Rows, attend, join_heads, remember, split_heads
from ar_jax.nets.conditioning import Cond, Label, widen
from ar_jax.nets.dropout import Dropout
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.transformer import Cache, init
from ar_jax.nets.vit import Plain
from ar_jax.orders import Order
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Key, Share, Tokens, Within, finite, typed


@dataclasses.dataclass(frozen=True)
class Annealed:
    """One slot a step, for every image in an order of its own: random for part of the images, else raster order.

    Attributes:
      start: train step up to which all orders are random.
      end: train step from which none is; in between their part falls linearly.
    """

    start: Annotated[int, Within(0, 2**24)] = 125_000
    end: int = 187_500

    def __post_init__(self):
        if not 0 <= self.start < self.end:
            raise ValueError(f"order.start is {self.start} and order.end {self.end}; needed is 0 <= start < end")

    def random(self, train_step: Index) -> Float[Array, ""]:
        """Probability of a random order, float32."""
        gone = (jnp.asarray(train_step, jnp.float32) - self.start) / (self.end - self.start)
        return 1 - jnp.clip(gone, 0, 1)

    def __call__(self, spec: TokenSpec, keys: Key[Array, "b"], images: int = 1, train_step: Index = 0) -> Order:
        share = self.random(train_step)

        def one(key):
            choice, shuffle = jax.random.split(key)
            slots = jnp.arange(spec.n, dtype=jnp.int32)
            return jnp.where(jax.random.bernoulli(choice, share), jax.random.permutation(shuffle, slots), slots)

        return Order(jax.vmap(one)(keys), (1,) * spec.n)


@dataclasses.dataclass(frozen=True)
class PowerCosine:
    """Guidance 1 + (weight - 1) (1 - cos(pi (i / steps)^power)) / 2 in step i, which rises from 1 to nearly `weight`."""

    weight: float = 1.0
    """Where it would arrive a step after the last; 1 is unguided."""
    power: float = 1.0
    """Larger ones stay low for longer; 0 is `weight` in all steps."""

    def __post_init__(self):
        finite("guidance.weight", self.weight)
        finite("guidance.power", self.power, 0)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        steps = len(order.sizes)
        gone = (np.arange(steps) / steps) ** self.power
        return (1 + (self.weight - 1) * (1 - np.cos(np.pi * gone)) / 2).astype(np.float32)


class StartLabel(Label):
    """A learned start row, then the row of the class; the class's vector modulates the network.

    The table begins with a row that nothing uses: in the released one the mask's id lies between codes and classes.

    Attributes: see `Label`; "no class" is the table's last row.
    """

    no_decay = ("position",)

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """As `Label`."""
        if self.apart:
            raise ValueError("conditioning.apart is True, but StartLabel keeps 'no class' in its table; give False")
        std = nn.initializers.normal(self.std)
        table = self.param("embedding", std, (self.classes + 2, self.width))
        position = self.param("position", std, (2, self.width))
        start = self.param("cls", nn.initializers.zeros, (self.width,))
        label = look_up(table, 1 + jnp.where(drop, self.classes, batch["label"]))
        rows = jnp.stack([jnp.broadcast_to(start, label.shape), label], axis=1) + position
        return Cond(rows, mod=label)


class Aimed(Previous):
    """`Previous` with two learned vectors added to the row: of the slot whose token it carries, and of the one it predicts.

    Attributes:
      rows: of the table of slots; 0 is one for every slot. The table of aims has two more, which nothing uses: those of
        the start and condition rows in the released model.
      others: see `Previous`.
    """

    rows: int = 0

    no_decay = ("position",)

    def setup(self):
        super().setup()
        rows, std = self.rows or self.spec.n, nn.initializers.normal(0.02)
        if rows < self.spec.n:
            raise ValueError(f"inputs.rows is {rows}, but the tokenizer has {self.spec.n} slots; give as many, or 0")
        self.position = self.param("position", std, (rows, self.width))
        self.aim = self.param("aim", std, (2 + rows, self.width))

    @typed
    def __call__(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None, first: Index, size: int
    ) -> tuple[Float[Array, "B m d"], Int[Array, "#B m 3"]]:
        """As `Previous`; the row of rank 0 carries the condition, whose position is in it."""
        x, coords = super().__call__(tokens, cond, order, tokenizer, first, size)
        slot = jnp.asarray(order.slot)
        carried, aimed = some(jnp.pad(slot[:, :-1], ((0, 0), (1, 0))), first, size), some(slot, first, size)
        begins = (first + jnp.arange(size) == 0)[:, None]
        place = jnp.where(begins, 0, look_up(self.position, carried)) + look_up(self.aim, 2 + aimed)
        return x + widen(place, len(x) // len(tokens) if len(slot) > 1 else 1).astype(x.dtype), coords


class Block(nn.Module):
    """Attention and a two-layer perceptron, each between a norm that the row's own condition modulates and a gate."""

    width: int
    heads: int
    hidden: int
    dropout: Share
    attention_dropout: Share
    eps: float
    dtype: Any

    def setup(self):
        def norm():
            # use_fast_variance loses digits where the mean is large against the spread
            return nn.LayerNorm(epsilon=self.eps, dtype=jnp.float32, use_fast_variance=False)

        def dense(features, kernel_init=init):
            return Linear(features, self.dtype, None, kernel_init, bias=True)

        self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm = (norm() for _ in range(4))
        self.qkv, self.out = dense(3 * self.width), dense(self.width)
        self.fc1, self.fc2 = dense(self.hidden), dense(self.width)
        self.modulation = dense(6 * self.width, nn.initializers.zeros)
        self.drop, self.attention_drop = Dropout(self.dropout), Dropout(self.attention_dropout)

    def __call__(self, x, cache, c, seen, first):
        det = not self.has_rng("dropout")
        x = constrain(x, BATCH)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(c), 6, axis=-1)
        y, cache = self.attend(self.shifted(self.attention_norm(x), shift1, scale1), cache, seen, first, det)
        x = x + gate1 * self.drop(y, deterministic=det)
        y = nn.gelu(self.fc1(self.shifted(self.mlp_norm(x), shift2, scale2)), approximate=False)
        return x + gate2 * self.drop(self.fc2(y), deterministic=det), cache

    def shifted(self, y, shift, scale):
        return (y * (1 + scale) + shift).astype(self.dtype)

    def attend(self, x, cache, seen, first, det):
        q, k, v = split_heads(self.qkv(x), self.heads)
        q, k = self.q_norm(q).astype(self.dtype), self.k_norm(k).astype(self.dtype)
        k, v, cache = remember(cache, k, v, first)
        if det or not self.attention_dropout:
            out = seen(q, k, v)
        else:
            out = attend(q, k, v, seen.mask, drop=functools.partial(self.attention_drop, deterministic=False))
        return self.out(join_heads(out)), cache


class Placed(Plain):
    """A stack of `Block`s modulated by the sum of the condition's vector and one of the row's place in the sequence.

    Attributes:
      rows: of the table of places; 0 is one for every row that is fed: two of the condition and all tokens but the last.
      others: see `Plain`.
    """

    rows: int = 0

    def complete(self, spec: TokenSpec) -> "Placed":
        return self if self.rows else self.clone(rows=spec.n + 1)

    def setup(self):
        sizes = (
            self.width, self.heads, self.hidden or 4 * self.width, self.dropout, self.attention_dropout, self.eps,
            self.dtype,
        )  # fmt: skip
        self.blocks = self.stack(Block, sizes, (nn.broadcast,) * 3)
        self.place = self.param("place", nn.initializers.normal(0.02), (self.rows, self.width))
        self.final = Linear(2 * self.width, self.dtype, kernel_init=nn.initializers.zeros, bias=True)

    def modulate(self, vector: Float[Array, "B d"]) -> Float[Array, "B d"]:
        """The vector itself: what it does to a row depends on the row's place."""
        return vector

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Float[Array, "B d"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        c = nn.silu(mod[:, None] + rows.of(self.place)).astype(self.dtype)
        seen = rows.sight(masked=self.attention_dropout > 0 and self.has_rng("dropout"))  # kernels do not drop weights
        x, cache = self.run(self.blocks, x.astype(self.dtype), cache, (), (c, seen, rows.first))
        scale, shift = jnp.split(self.final(c), 2, axis=-1)
        return modulated(self.before_last(x), scale, shift, self.eps), cache

    def before_last(self, x):
        """What comes between the blocks and the last norm; nothing."""
        return x
