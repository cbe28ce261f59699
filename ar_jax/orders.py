"""Orders of generation. An order is two arrays, not a class hierarchy: which slot each rank fills, and how many ranks
each step reveals."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.machine import shares
from ar_jax.machine.sharding import platform
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Index, Int, Key, PRNGKey, Share, Tokens, Within, typed

NEVER = np.int32(2**30)  # the step of padding: later than all others

State = TypeVar("State")

Curve = Literal["cos", "arccos"]  # how the part of the slots that is unknown falls with the steps


@struct.dataclass
class Order:
    """A generation order over n slots.

    Attributes:
      slot: int32 [1 n] (numpy, fixed order) or [b n] (an order per image): rank -> slot.
      sizes: ranks revealed by each step; they sum to n.
      rooms: ranks computed by each step, at least its size; those beyond it are thrown away and computed again in a later
        step. Neighbours of equal room share one loop, so that many different sizes need not make many programs. () is
        `sizes`; a generator that feeds the rows it draws to a cache cannot do it.
      drawn: int32 [n], steps that are drawn anew for every update of a training, in place of `sizes`, or None. Ranks of
        step `NEVER` are padding. Such an order may leave slots out.
    """

    slot: Array
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    rooms: tuple[int, ...] = struct.field(pytree_node=False, default=())
    drawn: Array | None = None

    @property
    def n(self) -> int:
        return self.slot.shape[1]

    @property
    def by_token(self) -> bool:
        """Whether most steps reveal one token, so that layers that are laid out one by one decode faster."""
        return self.sizes.count(1) > len(self.sizes) / 2

    @property
    def step(self) -> Array:
        """Step of each rank, int32 [n]; numpy unless it is drawn."""
        if self.drawn is not None:
            return self.drawn
        return np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)


# tokens, a key per image, images, train step
OrderFn = Callable[[TokenSpec, Key[Array, "b"], int, Int[Array, ""]], Order]


def raster(spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0) -> Order:
    """Slots in the tokenizer's own order, one a step."""
    return Order(slot=np.arange(spec.n, dtype=np.int32)[None], sizes=(1,) * spec.n)


def scales(spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0) -> Order:
    """One scale of the tokenizer per step, coarse to fine."""
    sizes = tuple(height * width for height, width in spec.scales)
    return Order(slot=np.arange(spec.n, dtype=np.int32)[None], sizes=sizes)


def whole(spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0) -> Order:
    """All slots in one step."""
    return Order(slot=np.arange(spec.n, dtype=np.int32)[None], sizes=(spec.n,))


@dataclasses.dataclass(frozen=True)
class Cells:
    """Squares of `side` x `side` neighbours, one a step, in raster order; those at the border may be smaller.

    Source: xAR (arXiv:2502.20388).
    """

    side: int = 8

    def __call__(
        self, spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0
    ) -> Order:
        level, row, column = spec.coords.T
        return grouped(spec, level, row // self.side, column // self.side)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Every `stride`-th row and column, `stride` squared steps: each is the image at a lower resolution.

    Source: xAR (arXiv:2502.20388).
    """

    stride: int = 2

    def __call__(
        self, spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0
    ) -> Order:
        level, row, column = spec.coords.T
        return grouped(spec, level, row % self.stride, column % self.stride)


@dataclasses.dataclass(frozen=True)
class Diagonals:
    """Slots as near to the first one, counted along rows and columns (and levels, where these are frames), in one step.

    Attributes:
      scans: programs that the steps may be compiled to (see `Order.rooms`); more throw away less.
    Source: NAR (arXiv:2503.10696).
    """

    scans: Annotated[int, Within(1, 1024)] = 4

    adjustable = ("scans",)

    def __call__(
        self, spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0
    ) -> Order:
        order = grouped(spec, spec.coords.sum(1))
        return order.replace(rooms=rooms(order.sizes, self.scans))


def grouped(spec: TokenSpec, *numbers: Int[np.ndarray, "n"]) -> Order:
    """Slots with the same numbers in one step; steps in rising order of the numbers, the first one most significant."""
    slot = np.lexsort((np.arange(spec.n), *reversed(numbers))).astype(np.int32)
    _, sizes = np.unique(np.stack(numbers), axis=1, return_counts=True)
    return Order(slot=slot[None], sizes=tuple(sizes.tolist()))


@dataclasses.dataclass(frozen=True)
class DrawnScales:
    """Orders that take another part of the tokenizer's scales in every update, the same for all images of a batch.

    The array's length is fixed, so one compiled program serves all lists; what a list does not fill is padding.

    Attributes:
      usual: sides of the list that is taken with probability `often`; its length is the limit of all others.
      often: probability.
      keep: sides that other lists begin with.
      some: (how many, from, to): so many different ones of these sides, `to` included.
      last: the side that other lists end with.
    Source: FlexVAR (arXiv:2502.20313); the defaults are its recipe, for a tokenizer with scales 1..16.
    """

    usual: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    often: Share = 0.05
    keep: tuple[int, ...] = (1, 2)
    some: tuple[tuple[int, int, int], ...] = ((5, 3, 10), (2, 11, 15))
    last: int = 16

    def __call__(self, spec: TokenSpec, keys: Key[Array, "b"], images: int = 1, train_step: Index = 0) -> Order:
        """An order over the tokenizer's scales, drawn with the first key.

        Raises:
          ValueError: the tokenizer lacks a side, or has scales that are not square.
        """
        sides = np.array([height for height, width in spec.scales if height == width])
        wanted = {*self.usual, *self.keep, self.last, *(s for _, low, up in self.some for s in range(low, up + 1))}
        if len(sides) != len(spec.scales) or not wanted <= set(sides.tolist()):
            raise ValueError(
                f"order draws lists of the square scales {tuple(sorted(wanted))}, but the tokenizer has {spec.scales}; "
                f"give it all of them"
            )
        chosen = self.draw(sides, shares.first(keys))
        level = spec.coords[:, 0]
        limit = sum(side**2 for side in self.usual)
        inside = chosen[level]
        slot = jnp.argsort(~inside, stable=True)[:limit].astype(jnp.int32)
        step = (jnp.cumsum(chosen) - 1).astype(jnp.int32)[level]
        step = jnp.where(inside, step, NEVER)[slot]
        return Order(slot=slot[None], sizes=(), drawn=step)

    def draw(self, sides: np.ndarray, key: PRNGKey) -> Bool[Array, "s"]:
        """Which of the sides are in the list."""
        keys = iter(jax.random.split(key, 16))

        def pick(candidates, count):
            """So many of the candidates, at random."""
            noise = jnp.where(candidates, jax.random.uniform(next(keys), sides.shape), -1)
            return candidates & (jnp.argsort(jnp.argsort(-noise)) < count)

        chosen = jnp.asarray(np.isin(sides, (*self.keep, self.last)))
        for count, low, up in self.some:
            chosen |= pick(jnp.asarray((low <= sides) & (sides <= up)), count)
        x = jax.random.uniform(next(keys))
        for threshold in (0.9, 0.95, 0.98, 0.99):
            place = jnp.cumsum(chosen) - 1
            inner = chosen & (place >= 2) & (place < chosen.sum() - 1)
            chosen &= ~(pick(inner, 1) & (x > threshold))
        limit = sum(side**2 for side in self.usual)

        def shorten(carry):
            chosen, key = carry
            key, now = jax.random.split(key)
            late = chosen & (jnp.cumsum(chosen[::-1])[::-1] <= 4)
            noise = jnp.where(late, jax.random.uniform(now, sides.shape), -1)
            return chosen & (jnp.arange(len(sides)) != noise.argmax()), key

        too_long = lambda carry: jnp.where(carry[0], sides**2, 0).sum() > limit  # noqa: E731
        chosen, _ = lax.while_loop(too_long, shorten, (chosen, next(keys)))
        usual = jax.random.uniform(next(keys)) < self.often
        return jnp.where(usual, np.isin(sides, self.usual), chosen)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """A random order for every image, few slots in the first steps and many in the last.

    Attributes:
      steps: of decoding, at most one per slot; after i of them, a part cos(pi/2 i/steps) of the slots is unknown.
      scans: programs that the steps may be compiled to (see `Order.rooms`); more throw away less.
    Source: MAR (arXiv:2406.11838).
    """

    steps: int = 64
    scans: int = 4

    adjustable = ("steps", "scans")

    def __call__(self, spec: TokenSpec, keys: Key[Array, "b"], images: int = 1, train_step: Index = 0) -> Order:
        slot = jax.vmap(lambda key: jax.random.permutation(key, spec.n))(keys).astype(jnp.int32)
        sizes = cosine_sizes(spec.n, min(self.steps, spec.n))
        return Order(slot, sizes, rooms(sizes, self.scans))


@dataclasses.dataclass(frozen=True)
class Confident:
    """How many slots each step reveals, for generators that find out which while they draw (`MaskGIT`).

    Attributes:
      steps: of decoding, at most one per slot.
      curve: after i of them a part cos(pi/2 i/steps) of the slots is unknown, or 2/pi arccos(i/steps), which is less.
    Source: MaskGIT (arXiv:2202.04200); "arccos" is of TiTok's generators (arXiv:2406.07550).
    """

    steps: int = 16
    curve: Curve = "cos"

    adjustable = ("steps",)

    def __call__(
        self, spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0
    ) -> Order:
        sizes = cosine_sizes(spec.n, min(self.steps, spec.n), self.curve)
        return Order(raster(spec).slot, sizes, (max(sizes),) * len(sizes))


@dataclasses.dataclass(frozen=True)
class Halton:
    """Every slot far from those just before it, by the Halton sequence: places drawn together know little of each other.

    Attributes:
      steps: of decoding, at most one per slot; after i of them a part 1 - 2/pi arccos(i/steps) of the slots is known.
      rolled: the order begins at a random slot of its own for every image.
      scans: see `Shuffled`.
    Source: "Halton Scheduler for Masked Generative Image Transformer" (ICLR 2025).
    """

    steps: int = 32
    rolled: bool = True
    scans: int = 4

    adjustable = ("steps", "rolled", "scans")

    def __call__(
        self, spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0
    ) -> Order:
        if len(spec.scales) != 1:
            raise ValueError(f"order Halton needs one grid of tokens, but these lie in {spec.scales}")
        (height, width), (_, row, column) = spec.scales[0], spec.coords.T
        rank = np.argsort(halton_slots(height, width))[row * width + column]  # of some slots too, as in-painting has them
        slot, sizes = np.argsort(rank).astype(np.int32)[None], halton_sizes(spec.n, min(self.steps, spec.n))
        if self.rolled and keys is not None:
            shift = jax.vmap(lambda key: jax.random.randint(key, (), 0, spec.n))(keys)
            slot = jax.vmap(lambda shift: jnp.roll(jnp.asarray(slot[0]), shift))(shift)
        return Order(slot, sizes, rooms(sizes, self.scans))


def halton_slots(height: int, width: int) -> Int[np.ndarray, "n"]:
    """Slots of a grid as the points of the Halton sequence of bases 2 and 3 first meet them."""

    def inverse(i, base):
        value, part = np.zeros(len(i)), 1.0
        while i.any():
            part /= base
            value, i = value + part * (i % base), i // base
        return value

    count = 4 * height * width
    while True:
        i = np.arange(1, count + 1)
        slots = np.floor(height * inverse(i, 2)).astype(int) * width + np.floor(width * inverse(i, 3)).astype(int)
        found, first = np.unique(slots, return_index=True)
        if len(found) == height * width:
            return slots[np.sort(first)].astype(np.int32)
        count *= 2


def halton_sizes(n: int, steps: int) -> tuple[int, ...]:
    """Slots revealed by each of so many steps (see `Halton`), counted in float32 as published."""
    share = np.float32(1) - np.arccos(np.arange(1, steps + 1, dtype=np.float32) / steps) / np.float32(np.pi / 2)
    ends = np.minimum(np.maximum(np.arange(1, steps + 1), (share * n).astype(int)), n)
    ends[-1] = n
    return tuple(np.diff(ends, prepend=0).tolist())


def known_first(order_fn: OrderFn, spec: TokenSpec, known: np.ndarray, keys: Key[Array, "b"]) -> Order:
    """An order of the slots that are not known, after a first step of those that are.

    Args:
      order_fn: orders the unknown slots as if there were no others.
      known: bool [n], the same for all images.
      keys: one per image.
    """
    inner, outer = np.flatnonzero(known).astype(np.int32), np.flatnonzero(~known).astype(np.int32)
    order = order_fn(dataclasses.replace(spec, coords=spec.coords[outer]), keys, len(keys), 0)
    slot = jnp.asarray(outer)[order.slot]
    slot = jnp.concatenate([jnp.broadcast_to(inner, (len(slot), len(inner))), slot], axis=1)
    if not len(inner):
        return order.replace(slot=slot)
    return Order(slot, (len(inner), *order.sizes), order.rooms and (len(inner), *order.rooms))


def cosine_sizes(n: int, steps: int, curve: Curve = "cos") -> tuple[int, ...]:
    """Ranks revealed by each step if a part of n on a curve, rounded down, is unknown after i steps; all at least 1.

    Raises:
      ValueError: more steps than ranks, or none.
    """
    if not 1 <= steps <= n:
        raise ValueError(f"order.steps is {steps}; it must be 1 to {n}, the number of tokens")
    unknown = [n]
    for i in range(1, steps):
        part = math.cos(math.pi / 2 * i / steps) if curve == "cos" else math.acos(i / steps) / (math.pi / 2)
        unknown.append(max(1, min(unknown[-1] - 1, math.floor(n * part))))
    return tuple(before - after for before, after in itertools.pairwise([*unknown, 0]))


def rooms(sizes: tuple[int, ...], scans: int) -> tuple[int, ...]:
    """Sizes raised so that at most `scans` runs of equal ones are left, with the smallest sum."""

    n = len(sizes)
    highest = np.array([np.maximum.accumulate([0] * start + list(sizes[start:])) for start in range(n)])
    length = np.arange(1, n + 1) - np.arange(n)[:, None]
    cost = np.where(length > 0, highest * length, np.inf)  # of one run from a step to another, [first last]
    rest = np.append(np.full(n, np.inf), 0)  # the best that further runs make of the steps from one on
    ends = []
    for _ in range(min(max(scans, 1), n)):
        total = cost + rest[1:]
        ends.append(total.argmin(1) + 1)
        rest = np.append(total.min(1), 0)
    raised, start = [], 0
    while start < n:
        end = int(ends.pop()[start])
        raised += [max(sizes[start:end])] * (end - start)
        start = end
    return tuple(raised)


@typed
def to_ranks(tokens: Int[Array, "b s k"] | Float[Array, "b s k"], order: Order) -> Tokens:
    """Reorders tokens from slots to ranks; slots that a drawn order leaves out are left out."""
    if _in_place(order, tokens):
        return tokens
    return jnp.take_along_axis(tokens, jnp.asarray(order.slot)[..., None], axis=1)


@typed
def to_slots(tokens: Tokens, order: Order) -> Tokens:
    """Reorders tokens from ranks to slots; the inverse of `to_ranks`."""
    if _in_place(order, tokens):
        return tokens
    return jnp.take_along_axis(tokens, jnp.argsort(order.slot, axis=-1)[..., None], axis=1)


def _in_place(order, tokens):
    slot = order.slot
    return isinstance(slot, np.ndarray) and np.array_equal(slot, np.arange(tokens.shape[1])[None])


class Stretch(NamedTuple):
    """Neighbouring steps of equal room, which one loop takes.

    Attributes:
      steps: int [s], their numbers.
      first: int [s], their first ranks.
      room: ranks that each of them computes (see `Order.rooms`).
      ranks: known after the last one.
    """

    steps: np.ndarray
    first: np.ndarray
    room: int
    ranks: int

    def run(
        self,
        fn: Callable[[State, Index, Index, int], State],
        state: State,
        part: tuple[Index, Index] | None = None,
    ) -> State:
        """Runs `fn(state, step, first rank, room)` for every step.

        Args:
          part: start and stop among the steps, which may be traced; None is all of them.
        """
        if len(self.steps) == 1:
            return fn(state, int(self.steps[0]), int(self.first[0]), self.room)
        if part is None and platform() != "gpu":  # a TPU's loop moves 1% more memory where it calculates ranks
            each = jnp.asarray(self.steps), jnp.asarray(self.first)
            return lax.scan(lambda state, at: (fn(state, *at, self.room), None), state, each)[0]
        start, rank = int(self.steps[0]), _by_step(self.steps, self.first)
        begin, end = part or (0, len(self.steps))
        return lax.fori_loop(start + begin, start + end, lambda i, state: fn(state, i, rank(i), self.room), state)


def stretches(
    sizes: tuple[int, ...], rooms: tuple[int, ...] = (), done: int = 0, segments: int = 1
) -> Iterator[Stretch]:
    """Cuts the steps of an order into stretches; arguments as of `scan_steps`."""
    last = np.cumsum(sizes)
    first = last - sizes
    step = int((last <= done).sum())
    for room, run in itertools.groupby((rooms or sizes)[step:]):
        steps = np.arange(step, step + len(list(run)))
        for part in np.array_split(steps, min(segments, len(steps))):
            yield Stretch(part, first[part], room, int(last[part[-1]]))
        step += len(steps)


def scan_steps(
    sizes: tuple[int, ...],
    fn: Callable[[State, Index, Index, int], State],
    state: State,
    *,
    rooms: tuple[int, ...] = (),
    done: int = 0,
    grow: Callable[[State, int], State] = lambda state, ranks: state,
    segments: int = 1,
) -> State:
    """Runs `fn(state, step, first rank, room)` for every step; neighbours of equal room share one `lax.scan`.

    Args:
      sizes: ranks revealed by each step.
      fn: one step.
      state: what is handed from step to step.
      rooms: ranks computed by each step (see `Order.rooms`); () is `sizes`.
      done: ranks known beforehand; steps that reveal no others are left out.
      grow: called before every scan with the number of ranks known after it; makes room for them in the state.
      segments: scans that a run of equal steps is cut into, so that `grow` can keep a cache no longer than needed;
        more segments read less and compile longer.
    """
    for stretch in stretches(sizes, rooms, done, segments):
        state = stretch.run(fn, grow(state, stretch.ranks))
    return state


def _by_step(steps, first):
    """Step -> first rank, for the steps of a loop: calculated where it can be, since a GPU starts a copy for every look-up."""
    start = int(steps[0])
    if np.ptp(rise := np.diff(first)):
        table = jnp.asarray(first)
        return lambda i: table[i - start]
    return lambda i: int(first[0]) + (i - start) * int(rise[0])
