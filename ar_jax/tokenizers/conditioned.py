"""Tokenizers that decode with more than tokens: with what a batch says of its images, such as their captions."""

from typing import Any

from ar_jax.typing import Batch


def said_of(tokenizer: Any, batch: Batch | None) -> dict[str, Any]:
    """What `decode` and `autoencode` are given besides what all tokenizers get, as keyword arguments: {} for most.

    A tokenizer names in its attribute `conditioned` the entries of a batch that it looks at. They come as `batch`; without one it
    decodes as if nothing were said.

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
    return {"batch": {name: batch[name] for name in names}}
