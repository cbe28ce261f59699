"""Orders of generation. An order is two arrays, not a class hierarchy: which slot each rank fills, and how many ranks
each step reveals."""

import itertools
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Index, Int, PRNGKey, Tokens, typed

State = TypeVar("State")


@struct.dataclass
class Order:
    """A generation order over n slots.

    Attributes:
      slot: int32 [1 n] (numpy, fixed order) or [b n] (an order per image): rank -> slot.
      sizes: ranks revealed by each step; they sum to n.
    """

    slot: Array
    sizes: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def step(self) -> np.ndarray:
        """Step of each rank, int32 [n]."""
        return np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)


OrderFn = Callable[[TokenSpec, PRNGKey, int, Int[Array, ""]], Order]  # tokens, key, images, train step


def raster(spec: TokenSpec, key: PRNGKey | None = None, images: int = 1, train_step: Index = 0) -> Order:
    """Slots in the tokenizer's own order, one a step."""
    return Order(slot=np.arange(spec.n, dtype=np.int32)[None], sizes=(1,) * spec.n)


@typed
def to_ranks(tokens: Tokens, order: Order) -> Tokens:
    """Reorders tokens from slots to ranks."""
    return jnp.take_along_axis(tokens, jnp.asarray(order.slot)[..., None], axis=1)


@typed
def to_slots(tokens: Tokens, order: Order) -> Tokens:
    """Reorders tokens from ranks to slots; the inverse of `to_ranks`."""
    return jnp.take_along_axis(tokens, jnp.argsort(order.slot, axis=-1)[..., None], axis=1)


def scan_steps(
    sizes: tuple[int, ...],
    fn: Callable[[State, Index, Index, int], State],
    state: State,
    *,
    grow: Callable[[State, int], State] = lambda state, ranks: state,
    segments: int = 1,
) -> State:
    """Runs `fn(state, step, first rank, size)` for every step; neighbours of equal size share one `lax.scan`.

    Args:
      sizes: ranks revealed by each step.
      fn: one step.
      state: what is handed from step to step.
      grow: called before every scan with the number of ranks known after it; makes room for them in the state.
      segments: scans that a run of equal steps is cut into, so that `grow` can keep a cache no longer than needed;
        more segments read less and compile longer.
    """
    step = first = 0
    for size, run in itertools.groupby(sizes):
        count = len(list(run))
        for part in np.array_split(np.arange(count), min(segments, count)):
            state = grow(state, first + len(part) * size)
            if len(part) == 1:
                state = fn(state, step, first, size)
            else:

                def body(carry, i, step=step, first=first, size=size):
                    return fn(carry, step + i, first + i * size, size), None

                state, _ = lax.scan(body, state, jnp.arange(len(part)))
            step, first = step + len(part), first + len(part) * size
    return state
