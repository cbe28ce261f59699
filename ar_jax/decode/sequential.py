"""Decoders turn a generator into tokens. The first: one step after the other, each with one call of the generator."""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ar_jax.decode.edit import Source, keep
from ar_jax.generators.base import Frozen, Generator, Knobs, Setting, Step
from ar_jax.nets.attention import Kept
from ar_jax.nets.conditioning import paired
from ar_jax.orders import Order, Stretch, stretches, to_slots
from ar_jax.typing import Array, Batch, Index, Key, Params, Tokens

LONG = 128  # steps from which on a cache that grows in parts saves more than compiling them costs


class Claim(enum.Enum):
    """What a decoder promises of its tokens beside those of `Sequential`; tests hold it to this."""

    SAME_TOKENS = "the same tokens"
    SAME_DISTRIBUTION = "other tokens of the same distribution"
    APPROXIMATE = "tokens of about the same distribution"


@struct.dataclass
class Account:
    """What drawing took.

    Attributes:
      calls: by network, int32 [b], how often it was called for every image.
      accepted: int32 [b c], tokens accepted at each call of the generator; zeros where an image needed no more.
    """

    calls: dict[str, Array]
    accepted: Array


def keys_of(keys: Key[Array, "b"], ranks: Array) -> Key[Array, "b m"]:
    """The keys of ranks, int [m] or [b m], which do not depend on how they are drawn."""
    ranks = jnp.broadcast_to(ranks, (len(keys), jnp.shape(ranks)[-1]))
    return jax.vmap(lambda key, ranks: jax.vmap(functools.partial(jax.random.fold_in, key))(ranks))(keys, ranks)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a decoder is asked to draw: one image for each key.

    Attributes:
      generator: see `generators.base.Generator`.
      params: its parameters.
      batch: conditions, first axis b.
      order: what each step reveals.
      knobs: guidance, temperature, filter.
      keys: [b]; the draw of a rank uses `fold_in(key, rank)`, so an image does not depend on its neighbours.
      guided: run every image with and without its condition.
      tokenizer: see `Setting`.
      source: tokens that are known beforehand; what is drawn in their places is dropped.
      look: tokens in slot order and which are known -> images (see `decode.glimpse`), for decoders that look at them, or None.
      extra: what a decoder asks for with `weights`, such as parameters of a judge; None, and it reads them itself.
    """

    generator: Any
    params: Params
    batch: Batch
    order: Order
    knobs: Knobs
    keys: Key[Array, "b"]
    guided: bool = False
    tokenizer: Frozen | None = None
    source: Source | None = None
    look: Callable[[Tokens, Array], Array] | None = None
    extra: Any = None

    @property
    def images(self) -> int:
        return len(self.keys)

    def call(self, *arguments: Any, method: Any) -> Any:
        """A method of the generator."""
        return self.generator.apply({"params": self.params}, *arguments, method=method)

    def setting(self, kept: Kept = "own") -> Setting:
        """What stays the same in all steps; guided images have a row with and a row without their condition.

        Args:
          kept: see `Setting`.
        """
        cond = self.call(self.batch, jnp.zeros(self.images, bool), method="condition")
        if self.guided:
            cond = paired(cond, self.call(self.batch, jnp.ones(self.images, bool), method="condition"))
        return Setting(cond, self.order, self.knobs, self.tokenizer, kept)

    def begin(self, setting: Setting) -> Any:
        """The state before the first step.

        Raises:
          ValueError: the generator has no cache that could be kept otherwise, or cannot draw around known tokens.
        """
        if self.source is not None and not getattr(self.generator, "editable", True):
            raise ValueError(
                f"{type(self.generator).__name__} cannot keep a part of an image: which tokens there are is drawn with them"
            )
        state = self.call(setting, self.images, method="begin")
        if setting.kept != "own" and getattr(state, "cache", None) is None:
            raise ValueError(
                f"decoder.cache is {setting.kept!r}, but this {type(self.generator).__name__} keeps no cache"
            )
        return state

    def known(self, state: Any) -> Any:
        """A state with the tokens that are known beforehand in their places."""
        return state if self.source is None else state.replace(tokens=keep(state.tokens, self.source, self.order))


def softened(task: Task) -> Task:
    """The task with vectors as tokens that are known beforehand, where vectors are drawn."""
    if task.source is None or task.knobs.soften is None:
        return task
    vectors = task.tokenizer(task.source.tokens, method="embed")
    return dataclasses.replace(task, source=task.source.replace(tokens=vectors))


def looked_at(task: Task, state: Any, ranks: Index) -> tuple[Tokens | None, Array]:
    """Tokens of a state in slot order, [b n k], and which slots are known of it, bool [b n], the first so many ranks.

    Without a state, no tokens, and slots as generators have them that keep to the order.
    """
    n = task.order.n
    seen = functools.partial(Generator.seen, task.generator) if state is None else task.generator.seen
    known = jnp.broadcast_to(seen(state, ranks, task.order), (task.images, n))
    if task.source is not None:
        known |= task.source.known
    if state is None:
        return None, known
    return to_slots(jnp.pad(state.tokens, ((0, 0), (0, n - state.tokens.shape[1]), (0, 0))), task.order), known


def check_cache(kept: str) -> None:
    """Raises a ValueError if a cache cannot be kept so."""
    if kept not in get_args(Kept):
        raise ValueError(f"decoder.cache is {kept!r}; it must be one of {', '.join(get_args(Kept))}")


@dataclasses.dataclass(frozen=True)
class Sequential:
    """One step of the order after the other."""

    segments: int = 0
    """Parts in which the cache grows (see `scan_steps`): more read less memory and compile longer. 0 is 4 where at least 128
    equal steps fill one, else 1."""
    cache: Kept = "own"
    """How keys and values are kept: in the dtype of the products, or in a byte each (int8), which moves hidden rows by less
    than three percent."""

    @property
    def claim(self) -> Claim:
        return Claim.SAME_TOKENS if self.cache == "own" else Claim.APPROXIMATE

    def __post_init__(self):
        check_cache(self.cache)
        if self.segments < 0:
            raise ValueError(f"decoder.segments is {self.segments}; it must be 1 or more, or 0 to choose")

    def parts(self, order: Order, cached: bool) -> int:
        """Into how many parts a run of equal steps of an order is cut, with a cache or without."""
        longest = max(len(list(run)) for _, run in itertools.groupby(order.rooms or order.sizes))
        return self.segments or (4 if cached and longest >= LONG else 1)

    def __call__(self, task: Task) -> tuple[Tokens, Account]:
        """Tokens in slot order, with `knobs.soften` the vectors in their place; and what drawing took."""
        setting, task = task.setting(self.cache), softened(task)
        state, done = task.begin(setting), task.source.ranks if task.source else 0
        for stretch in self.stretches(task.order, state, done):
            state = self.advance(task, setting, self.enter(task, setting, state, stretch), stretch)
        return to_slots(state.tokens, task.order), self.account(task.generator, task.order, task.images, done)

    def watched(self, task: Task, steps: tuple[int, ...]) -> tuple[tuple[Tokens, Array], Account]:
        """What is known after each of p steps, the last of the order among them: tokens [p b n k] in slot order, bool [p b n].

        The loops are those of `__call__`; what is asked for is written beside while they run.
        """
        setting, task = task.setting(self.cache), softened(task)
        state, done = task.begin(setting), task.source.ranks if task.source else 0
        place = np.full(len(task.order.sizes), len(steps))  # which beyond the last are dropped
        place[list(steps)] = np.arange(len(steps))
        ends, one = jnp.asarray(np.cumsum(task.order.sizes)), self.stepper(task, setting)

        def step(both, i, first, size):
            state = one(both[0], i, first, size)
            now = looked_at(task, state, ends[i])
            return state, tuple(x.at[jnp.asarray(place)[i]].set(new, mode="drop") for x, new in zip(both[1], now))

        shape = (len(steps), task.images, task.order.n)
        notes = jnp.zeros((*shape, state.tokens.shape[-1]), state.tokens.dtype), jnp.zeros(shape, bool)
        for stretch in self.stretches(task.order, state, done):
            state, notes = stretch.run(step, (self.enter(task, setting, state, stretch), notes))
        return notes, self.account(task.generator, task.order, task.images, done)

    # The parts of `__call__`, for programs that look at a drawing while it is made

    def stretches(self, order: Order, state: Any, done: int = 0) -> list[Stretch]:
        """What one loop each takes, given the state before the first step and the number of ranks known beforehand."""
        segments = self.parts(order, getattr(state, "cache", None) is not None)
        return list(stretches(order.sizes, order.rooms, done, segments))

    def enter(self, task: Task, setting: Setting, state: Any, stretch: Stretch) -> Any:
        """The state with room for the ranks of a stretch."""
        return task.known(task.call(state, stretch.ranks, setting, method="grow"))

    def advance(
        self, task: Task, setting: Setting, state: Any, stretch: Stretch, part: tuple[Index, Index] | None = None
    ) -> Any:
        """Takes the steps of a stretch, or a part of them (see `Stretch.run`)."""
        return stretch.run(self.stepper(task, setting), state, part)

    def stepper(self, task: Task, setting: Setting) -> Callable[[Any, Index, Index, int], Any]:
        """What takes one step (see `Stretch.run`)."""

        def step(state, i, first, size):
            now = Step(i, first, keys_of(task.keys, first + jnp.arange(size)))
            return task.known(task.call(state, now, setting, method="step"))

        return step

    def account(self, generator: Any, order: Order, images: int, done: int = 0) -> Account:
        """What drawing takes if the first `done` ranks are known."""
        left = np.cumsum(order.sizes) > done
        calls = {name: count[left].sum() for name, count in generator.calls(order).items()}
        accepted = np.broadcast_to(np.array(order.sizes)[left], (images, left.sum()))
        return Account(
            {name: jnp.full(images, count, jnp.int32) for name, count in calls.items()}, jnp.asarray(accepted)
        )
