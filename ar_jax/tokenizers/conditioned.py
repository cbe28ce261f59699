"""Tokenizers that decode with more than tokens: with what a batch says of its images, such as their captions."""

from typing import Any

import jax.numpy as jnp

from ar_jax.typing import Batch


def said_of(tokenizer: Any, batch: Batch | None, images: int = 0) -> dict[str, Any]:
    """What `decode` and `autoencode` are given besides what all tokenizers get, as keyword arguments: {} for most.

    A tokenizer names in its attribute `conditioned` the entries of a batch that it looks at. They come as `batch`; without one it
    decodes as if nothing were said.

    Args:
      images: how many are decoded, if not one for each of the batch: of several candidates, neighbours, all are told the same.

    Raises:
      ValueError: the batch lacks one.
    """
    names = getattr(tokenizer, "conditioned", ())
    if not names or batch is None:
        return {}
    if missing := [name for name in names if name not in batch]:
        raise ValueError(
            f"{type(tokenizer).__name__} decodes with {' and '.join(names)} of its images, but these come without "
            f"{' and '.join(missing)}; give data with captions and their encoder (data.text)"
        )
    said = {name: batch[name] for name in names}
    return {"batch": {name: jnp.repeat(x, images // len(x), axis=0) if images else x for name, x in said.items()}}
