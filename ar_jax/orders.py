"""Orders of generation. An order is two arrays, not a class hierarchy: which slot each rank fills, and how many ranks
each step reveals."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Index, Int, Key, Tokens, typed

State = TypeVar("State")


@struct.dataclass
class Order:
    """A generation order over n slots.

    Attributes:
      slot: int32 [1 n] (numpy, fixed order) or [b n] (an order per image): rank -> slot.
      sizes: ranks revealed by each step; they sum to n.
      rooms: ranks computed by each step, at least its size; those beyond it are thrown away and computed again in a later
        step. Neighbours of equal room share one loop, so that many different sizes need not make many programs. () is
        `sizes`; only generators that feed no row to a cache can do it.
    """

    slot: Array
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    rooms: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def step(self) -> np.ndarray:
        """Step of each rank, int32 [n]."""
        return np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)


# tokens, a key per image, images, train step
OrderFn = Callable[[TokenSpec, Key[Array, "b"], int, Int[Array, ""]], Order]


def raster(spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0) -> Order:
    """Slots in the tokenizer's own order, one a step."""
    return Order(slot=np.arange(spec.n, dtype=np.int32)[None], sizes=(1,) * spec.n)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """A random order for every image, few slots in the first steps and many in the last.

    Attributes:
      steps: of decoding; after i of them, a part cos(pi/2 i/steps) of the slots is unknown.
      scans: programs that the steps may be compiled to (see `Order.rooms`); more throw away less.
    Source: MAR (arXiv:2406.11838).
    """

    steps: int = 64
    scans: int = 4

    def __call__(self, spec: TokenSpec, keys: Key[Array, "b"], images: int = 1, train_step: Index = 0) -> Order:
        slot = jax.vmap(lambda key: jax.random.permutation(key, spec.n))(keys).astype(jnp.int32)
        sizes = cosine_sizes(spec.n, self.steps)
        return Order(slot, sizes, rooms(sizes, self.scans))


def cosine_sizes(n: int, steps: int) -> tuple[int, ...]:
    """Ranks revealed by each step if a part cos(pi/2 i/steps) of n, rounded down, is unknown after i steps; all at least 1.

    Raises:
      ValueError: more steps than ranks, or none.
    """
    if not 1 <= steps <= n:
        raise ValueError(f"order.steps is {steps}; it must be 1 to {n}, the number of tokens")
    unknown = [n]
    for i in range(1, steps):
        unknown.append(max(1, min(unknown[-1] - 1, math.floor(n * math.cos(math.pi / 2 * i / steps)))))
    return tuple(before - after for before, after in itertools.pairwise([*unknown, 0]))


def rooms(sizes: tuple[int, ...], scans: int) -> tuple[int, ...]:
    """Sizes raised so that at most `scans` runs of equal ones are left, with the smallest sum."""

    @functools.cache
    def best(start, runs):  # of the steps from `start` on: sum, and the ends of the runs
        if start == len(sizes):
            return 0, ()
        if not runs:
            return math.inf, ()
        highest, found = 0, (math.inf, ())
        for end in range(start + 1, len(sizes) + 1):
            highest = max(highest, sizes[end - 1])
            rest, ends = best(end, runs - 1)
            found = min(found, (highest * (end - start) + rest, (end, *ends)))
        return found

    raised, start = [], 0
    for end in best(0, max(scans, 1))[1]:
        raised += [max(sizes[start:end])] * (end - start)
        start = end
    return tuple(raised)


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
    rooms: tuple[int, ...] = (),
    grow: Callable[[State, int], State] = lambda state, ranks: state,
    segments: int = 1,
) -> State:
    """Runs `fn(state, step, first rank, room)` for every step; neighbours of equal room share one `lax.scan`.

    Args:
      sizes: ranks revealed by each step.
      fn: one step.
      state: what is handed from step to step.
      rooms: ranks computed by each step (see `Order.rooms`); () is `sizes`.
      grow: called before every scan with the number of ranks known after it; makes room for them in the state.
      segments: scans that a run of equal steps is cut into, so that `grow` can keep a cache no longer than needed;
        more segments read less and compile longer.
    """
    last = np.cumsum(sizes)
    first = last - sizes
    step = 0
    for room, run in itertools.groupby(rooms or sizes):
        steps = np.arange(step, step + len(list(run)))
        for part in np.array_split(steps, min(segments, len(steps))):
            state = grow(state, int(last[part[-1]]))
            if len(part) == 1:
                state = fn(state, int(part[0]), int(first[part[0]]), room)
            else:

                def body(carry, at, room=room):
                    return fn(carry, *at, room), None

                state, _ = lax.scan(body, state, (jnp.asarray(part), jnp.asarray(first[part])))
        step += len(steps)
    return state
