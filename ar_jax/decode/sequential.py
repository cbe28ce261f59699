"""The sampling loop shared by all generators that reveal a fixed number of ranks per step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ar_jax.decode.edit import Edit, Source, hold, keep
from ar_jax.decode.logits import Filter
from ar_jax.nets.conditioning import paired
from ar_jax.orders import Order, scan_steps, to_slots
from ar_jax.typing import Array, Batch, Float, Key, Params, Tokens, typed


@struct.dataclass
class Knobs:
    """What a user turns while sampling.

    Attributes:
      guidance: float32 [steps], weight of the condition; 1 is unguided.
      temperature: float32 [steps]; 0 is greedy.
      logits_fn: applied to the guided logits divided by the temperature.
      soften: float32 [steps], or None for codes: mixtures of all codes are drawn, blurred as `logits.mixture` says.
    """

    guidance: Array
    temperature: Array
    logits_fn: Callable = struct.field(pytree_node=False, default=Filter())
    soften: Array | None = None


@typed
def sample(
    generator: Any,
    params: Params,
    batch: Batch,
    order: Order,
    *,
    tokenizer: Callable | None = None,
    knobs: Knobs,
    keys: Key[Array, "b"],
    guided: bool,
    segments: int = 1,
    source: Source | None = None,
) -> Tokens:
    """Draws the tokens of one image per key.

    Args:
      generator: a Linen module with methods `condition`, `begin`, `grow` and `step`.
      params: its parameters.
      batch: conditions, first axis b.
      order: what each step reveals.
      tokenizer: calls a method of the frozen tokenizer, `tokenizer(tokens, method="embed")`; LlamaGen needs none.
      knobs: guidance, temperature, filter.
      keys: one per image; the draw of a rank uses `fold_in(key, rank)`, so an image does not depend on its neighbours.
      guided: run every image with and without its condition.
      segments: the cache grows in so many parts (see `scan_steps`).
      source: tokens that are known beforehand; what is drawn in their places is dropped.

    Returns:
      Tokens in slot order; with `knobs.soften` the vectors in their place.
    """
    images = len(keys)
    call = functools.partial(generator.apply, {"params": params})
    cond = call(batch, jnp.zeros(images, bool), method="condition")
    if guided:
        cond = paired(cond, call(batch, jnp.ones(images, bool), method="condition"))

    def known(state):
        return state if source is None else state.replace(tokens=keep(state.tokens, source, order))

    def step(state, i, first, size):
        ranks = first + jnp.arange(size)
        rank_keys = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(ranks))(keys)
        state = call(
            state, i, first, size, cond=cond, order=order, tokenizer=tokenizer, knobs=knobs, keys=rank_keys,
            method="step",
        )  # fmt: skip
        return known(state)

    def grow(state, ranks):
        return known(call(state, ranks, cond, method="grow"))

    vectors = 0
    if knobs.soften is not None:
        vectors = jax.eval_shape(lambda: tokenizer(jnp.zeros((1, 1, 1), jnp.int32), method="embed")).shape[-1]
        if source is not None:
            source = source.replace(tokens=tokenizer(source.tokens, method="embed"))
    state = call(cond, order, images, vectors, method="begin")
    state = scan_steps(
        order.sizes, step, state, rooms=order.rooms, done=source.ranks if source else 0, grow=grow, segments=segments
    )
    return to_slots(state.tokens, order)


def sample_images(
    generator: Any,
    tokenizer: Any,
    params: Params,
    tokenizer_params: Params,
    batch: Batch,
    order: Order,
    *,
    knobs: Knobs,
    keys: Key[Array, "b"],
    guided: bool,
    segments: int = 1,
    edit: Edit | None = None,
) -> Float[Array, "b h w c"]:
    """Draws tokens with a generator, all or those that an edit leaves free, and decodes them."""
    frozen, source = functools.partial(tokenizer.apply, {"params": tokenizer_params}), None
    if edit is not None:
        source, frozen = hold(tokenizer, frozen, edit)
    tokens = sample(
        generator, params, batch, order, tokenizer=frozen, knobs=knobs, keys=keys, guided=guided, segments=segments,
        source=source,
    )  # fmt: skip
    return frozen(tokens, method="decode")
