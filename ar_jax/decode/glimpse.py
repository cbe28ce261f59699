"""What can be seen of an image while it is drawn."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.generators.base import Frozen
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Tokens, typed

NOTHING = 0.0  # mid grey


def glimpse(tokenizer: Any, frozen: Frozen, tokens: Tokens, known: Bool[Array, "b n"]) -> Float[Array, "b h w c"]:
    """Images, float32 in about [-1, 1], as far as their tokens are known; once all are, those that `decode` gives.

    Of a tokenizer with scales, what the whole scales say so far (its `decode_until`); of one grid, the cells that are known,
    and grey in place of the others.

    Args:
      tokenizer: the module.
      frozen: calls its methods.
      tokens: in slot order; what is not known may be anything.
      known: slots.
    """
    spec = tokenizer.spec
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
