"""Zero-shot editing: images that keep a part of a given one, for every generator and without training."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct

from ar_jax.nets.resize import touched
from ar_jax.orders import Order, to_ranks
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Tokens, typed


@struct.dataclass
class Edit:
    """What is given of an image.

    Attributes:
      image: float32 [b H W c] in [-1, 1].
      free: bool [b H W], pixels to be drawn; the others are kept.
      scales: of the tokenizer's scales the first so many are kept whole.
      ranks: see `Source`.
    """

    image: Array
    free: Array
    scales: int = struct.field(pytree_node=False, default=0)
    ranks: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Source:
    """The tokens of an image of which some are kept.

    Attributes:
      tokens: [b n k] or [b n c], in slot order.
      known: bool [b n], those that are kept.
      ranks: so many first ranks are known in every image, so that no step need draw them.
    """

    tokens: Array
    known: Array
    ranks: int = struct.field(pytree_node=False, default=0)


def hold(tokenizer: Any, frozen: Callable, edit: Edit, tokens: Tokens | None = None) -> tuple[Source, Callable]:
    """The tokens that an edit keeps, and the frozen tokenizer to sample and decode with.

    Args:
      tokens: of `edit.image`, if they are known already.

    A token is drawn if any of its pixels is free. Where tokens of several scales add up (a tokenizer with `held`), those
    of coarse scales reach beyond the free pixels, so there what is read and decoded of them is the image's own as well.
    A tokenizer whose tokens have no fixed place in the image says itself which are known (`known`).
    """
    tokens = frozen(edit.image, method="encode") if tokens is None else tokens
    itself = hasattr(tokenizer, "known")
    known = tokenizer.known(tokens, edit.free) if itself else ~free_slots(tokenizer.spec, edit.free)
    known = known | (jnp.asarray(tokenizer.spec.coords)[:, 0] < edit.scales)
    if hasattr(tokenizer, "held"):
        frozen = tokenizer.held(frozen, tokens, edit.free)
    return Source(tokens, known, edit.ranks), frozen


@typed
def free_slots(spec: TokenSpec, free: Bool[Array, "b H W"]) -> Bool[Array, "b n"]:
    """Slots with a free pixel in their cell of the image, or anywhere in it if they have none."""
    if not spec.placed:
        return jnp.broadcast_to(free.any((1, 2))[:, None], (len(free), spec.n))
    return jnp.concatenate([touched(free, size).reshape(len(free), -1) for size in spec.scales], axis=1)


def keep(tokens: Tokens, source: Source, order: Order) -> Tokens:
    """The first ranks of a canvas, with the known tokens in their places."""
    ranks = tokens.shape[1]
    known = to_ranks(source.known[..., None].astype(jnp.int32), order)[:, :ranks]
    return jnp.where(known > 0, to_ranks(source.tokens, order)[:, :ranks].astype(tokens.dtype), tokens)
