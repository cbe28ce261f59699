"""DetailFlow's generator: `Causal` over codes that are drawn one by one at first, then in groups, all codes of one at once.

`Causal(Transformer(...), Label(...), inputs=Grouped(8))`, in the order `Groups(8, 8)`.

Source: DetailFlow (arXiv:2505.21473).
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.base import Frozen
from ar_jax.generators.inputs import Previous, some
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import look_up
from ar_jax.nets.positions import NOWHERE
from ar_jax.orders import Order
from ar_jax.tokenizers.ordered import Length, Registers
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, Tokens, finite, typed


@dataclasses.dataclass(frozen=True)
class Groups:
    """Slots in the tokenizer's own order: the first ones one by one, then groups of them, one a step."""

    single: Length = 8
    """How many come one by one."""
    group: Registers = 8

    def __call__(
        self, spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0
    ) -> Order:
        single = min(self.single, spec.n)
        count, rest = divmod(spec.n - single, self.group)
        if rest:
            raise ValueError(
                f"order.single is {self.single} and order.group {self.group}, but of {spec.n} tokens {spec.n - single} are "
                "left for groups; they must be whole groups"
            )
        sizes = (1,) * single + (self.group,) * count
        return Order(slot=np.arange(spec.n, dtype=np.int32)[None], sizes=sizes)


class Grouped(Previous):
    """As `Previous` for several tokens a step: a row carries the token at its place in the step before, or a learned vector of
    its place if that step had fewer. Rows lie where the token before the predicted one does.

    Attributes:
      group: tokens of the largest step.
      others: see `Previous`.
    """

    group: Registers = 8

    no_decay = ("places",)

    def check(self, order: Order) -> None:
        sizes = np.array(order.sizes)
        if not len(sizes) or (np.diff(sizes) < 0).any() or sizes[-1] > self.group:
            raise ValueError(
                f"Grouped needs steps that do not shrink, of {self.group} slots at most (inputs.group), but order.sizes is "
                f"{order.sizes[:8]}...; use Groups"
            )

    def setup(self):
        super().setup()
        if self.group > 1:
            self.places = self.param("places", nn.initializers.normal(0.02), (self.group - 1, self.width))

    @typed
    def __call__(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None, first: Index, size: int
    ) -> tuple[Float[Array, "B m d"], Int[Array, "#B m 3"]]:
        """As `Previous`."""
        ways, source = len(cond.rows) // len(tokens), some(carried(order.sizes), first, size, 0)
        x = widen(self.embed(jnp.take(tokens, jnp.maximum(source, 0), axis=1), tokenizer), ways)
        x = jnp.where((source == CONDITION)[:, None], cond.rows[:, -1:].astype(x.dtype), x)
        if self.group > 1:
            place = look_up(self.places, jnp.clip(CONDITION - 1 - source, 0, self.group - 2)).astype(x.dtype)
            x = jnp.where((source < CONDITION)[:, None], place, x)
        coords = jnp.asarray(self.spec.coords)[order.slot]
        coords = jnp.pad(coords[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=NOWHERE)
        return x, widen(some(coords, first, size), ways if len(coords) > 1 else 1)


CONDITION = -1  # what the row of a token carries that is none; below it are the learned vectors


def carried(sizes: tuple[int, ...]) -> np.ndarray:
    """The rank of the token that the row of each rank carries, int32 [n]; `CONDITION`, or below it CONDITION - j of place j."""
    source, begin, before = [], CONDITION, 1
    for size in sizes:
        source += [begin + j if j < before else CONDITION - j for j in range(size)]
        begin, before = begin + before, size
    return np.array(source, np.int32)


@dataclasses.dataclass(frozen=True)
class Gradual:
    """One weight for steps of a single token, and (G - k + 1) / (G + 1) of it for the k-th of G groups (from 0; single tokens
    make groups too). As published, the weights of the last groups may lie below 1."""

    weight: float = 1.0
    """Of the condition at first; 1 is unguided."""

    def __post_init__(self):
        finite("guidance.weight", self.weight)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        sizes = np.array(order.sizes)
        group, first = sizes.max(), np.cumsum(sizes) - sizes
        groups = spec.n // group
        part = np.where(sizes == 1, 1, (groups - first // group + 1) / (groups + 1))
        return np.where(self.weight == 1, 1, self.weight * part).astype(np.float32)
