"""Decoders turn a generator into tokens. The first: one step after the other, each with one call of the generator."""

import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ar_jax.decode.edit import Source, keep
from ar_jax.generators.base import Frozen, Knobs, Setting, Step
from ar_jax.nets.conditioning import paired
from ar_jax.orders import Order, scan_steps, to_slots
from ar_jax.typing import Array, Batch, Key, Params, Tokens, typed


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


@typed
def settle(
    generator: Any,
    params: Params,
    batch: Batch,
    order: Order,
    *,
    tokenizer: Frozen | None,
    knobs: Knobs,
    images: int,
    guided: bool,
) -> Setting:
    """What stays the same while `images` are drawn; guided ones have a row with and a row without their condition."""
    condition = functools.partial(generator.apply, {"params": params}, batch, method="condition")
    cond = condition(jnp.zeros(images, bool))
    if guided:
        cond = paired(cond, condition(jnp.ones(images, bool)))
    return Setting(cond, order, knobs, tokenizer)


@dataclasses.dataclass(frozen=True)
class Sequential:
    """One step of the order after the other."""

    segments: int = 1
    """Parts in which the cache grows (see `scan_steps`): more read less memory and compile longer."""

    claim = Claim.SAME_TOKENS

    def __post_init__(self):
        if self.segments < 1:
            raise ValueError(f"decoder.segments is {self.segments}; it must be 1 or more")

    @typed
    def __call__(
        self,
        generator: Any,
        params: Params,
        batch: Batch,
        order: Order,
        *,
        tokenizer: Frozen | None = None,
        knobs: Knobs,
        keys: Key[Array, "b"],
        guided: bool,
        source: Source | None = None,
    ) -> tuple[Tokens, Account]:
        """Draws the tokens of one image per key; every decoder has these arguments.

        Args:
          generator: see `generators.base.Generator`.
          params: its parameters.
          batch: conditions, first axis b.
          order: what each step reveals.
          tokenizer: see `Setting`.
          knobs: guidance, temperature, filter.
          keys: one per image; the draw of a rank uses `fold_in(key, rank)`, so an image does not depend on its neighbours.
          guided: run every image with and without its condition.
          source: tokens that are known beforehand; what is drawn in their places is dropped.

        Returns:
          Tokens in slot order, with `knobs.soften` the vectors in their place; and what drawing took.
        """
        images = len(keys)
        setting = settle(
            generator, params, batch, order, tokenizer=tokenizer, knobs=knobs, images=images, guided=guided
        )
        call = functools.partial(generator.apply, {"params": params})
        if source is not None and knobs.soften is not None:
            source = source.replace(tokens=tokenizer(source.tokens, method="embed"))

        def known(state):
            return state if source is None else state.replace(tokens=keep(state.tokens, source, order))

        def step(state, i, first, size):
            now = Step(i, first, keys_of(keys, first + jnp.arange(size)))
            return known(call(state, now, setting, method="step"))

        def grow(state, ranks):
            return known(call(state, ranks, setting, method="grow"))

        done = source.ranks if source else 0
        state = scan_steps(
            order.sizes, step, call(setting, images, method="begin"), rooms=order.rooms, done=done, grow=grow,
            segments=self.segments,
        )  # fmt: skip
        return to_slots(state.tokens, order), self.account(generator, order, images, done)

    def account(self, generator: Any, order: Order, images: int, done: int = 0) -> Account:
        """What drawing takes if the first `done` ranks are known."""
        left = np.cumsum(order.sizes) > done
        calls = {name: count[left].sum() for name, count in generator.calls(order).items()}
        accepted = np.broadcast_to(np.array(order.sizes)[left], (images, left.sum()))
        return Account(
            {name: jnp.full(images, count, jnp.int32) for name, count in calls.items()}, jnp.asarray(accepted)
        )
