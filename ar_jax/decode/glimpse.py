"""What can be seen of an image while it is drawn."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.decode.sequential import Account, Task, looked_at
from ar_jax.generators.base import Frozen
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Key, Tokens, typed

NOTHING = 0.0  # mid grey


def glimpse(
    tokenizer: Any, frozen: Frozen, tokens: Tokens, known: Bool[Array, "b n"], key: Key[Array, "b"] | None = None
) -> Float[Array, "b h w c"]:
    """Images, float32 in about [-1, 1], as far as their tokens are known; once all are, those that `decode` gives.

    Of a tokenizer that shows any known tokens, what these say (its `partly`); of one of which any prefix decodes, what the first
    tokens say (its `prefix`); of one with scales, what the whole scales say so far (its `decode_until`); of one grid, the cells
    that are known, and grey in place of the others.

    Args:
      tokenizer: the module.
      frozen: calls its methods.
      tokens: in slot order; what is not known may be anything.
      known: slots.
      key: of each image, for tokenizers whose decoders draw (see `decode.sampling.decoding_keys`).
    """
    spec = tokenizer.spec
    if hasattr(tokenizer, "partly"):
        return frozen(tokens, known, key=key, method="partly")
    if hasattr(tokenizer, "prefix"):
        return frozen(tokens, jnp.cumprod(known, axis=1).sum(1), key=key, method="prefix")
    if len(spec.scales) > 1 and hasattr(tokenizer, "decode_until"):
        of_level = jnp.stack([known[:, spec.coords[:, 0] == level].all() for level in range(len(spec.scales))])
        whole = jnp.cumprod(of_level).sum()
        images = frozen(tokens, jnp.maximum(whole - 1, 0), method="decode_until")
        return jnp.where(whole > 0, images, NOTHING)
    images = frozen(jnp.where(known[..., None], tokens, 0), method="decode")
    return jnp.where(cells(spec, known, images.shape[1:3])[..., None], images, NOTHING)


@typed
def cells(spec: TokenSpec, slots: Bool[Array, "b n"], size: tuple[int, int]) -> Bool[Array, "b H W"]:
    """Pixels of images of a height and width that lie in the cells of these slots, those of the last scale; all once all
    slots are there, if these have no cells."""
    if not spec.placed:
        return jnp.broadcast_to(slots.all(1)[:, None, None], (len(slots), *size))
    level, row, column = spec.coords.T
    last, grid = level == level.max(), spec.scales[-1]
    at = jnp.zeros((len(slots), *grid), bool).at[:, row[last], column[last]].set(slots[:, last])
    rows, columns = (np.arange(pixels) * cells // pixels for pixels, cells in zip(size, grid))
    return at[:, rows][:, :, columns]


def marks(steps: int, most: int) -> tuple[int, ...]:
    """Numbers of steps after which to look: all of them, else 1, 2, 4, ... and the end; if these are too many, about as spread."""
    if steps <= most:
        return tuple(range(1, steps + 1))
    doubled = [2**i for i in range(steps.bit_length()) if 2**i < steps] + [steps]
    if len(doubled) <= most:
        return tuple(doubled)
    return tuple(np.unique(np.geomspace(1, steps, most).round().astype(int)).tolist()) if most > 1 else (steps,)


def previews(decoder: Any, task: Task, most: int) -> tuple[Float[Array, "b p h w c"], Account]:
    """Images in the making: a glimpse after some steps of the decoder's loop (`marks`), the last one after all.

    Tokens are noted within the loop and decoded after it, by one program for all glimpses.

    Args:
      decoder: one that tells of its steps has `watched`; of others, tokens are taken for known in the order's steps.
      task: what it draws; has `look`.
      most: how many pictures.
    """
    order, done = task.order, task.source.ranks if task.source else 0
    left = np.flatnonzero(np.cumsum(order.sizes) > done)
    steps = tuple(int(left[mark - 1]) for mark in marks(len(left), most))
    if hasattr(decoder, "watched"):
        (tokens, known), account = decoder.watched(task, steps)
    else:
        drawn, account = decoder(task)
        ends = np.cumsum(order.sizes)[list(steps)]
        known = jnp.stack([looked_at(task, None, int(end))[1] for end in ends])
        tokens = jnp.broadcast_to(drawn, (len(steps), *drawn.shape))
    images = lax.map(lambda at: task.look(*at), (tokens, known))
    return jnp.moveaxis(images, 0, 1), account
