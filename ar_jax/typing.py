"""Array aliases for annotations, and the decorator that checks them while tracing."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import Bool, Float, Int, Key, UInt8, jaxtyped

__all__ = [
    "Array",
    "Batch",
    "Bool",
    "Float",
    "Index",
    "Int",
    "Key",
    "Metrics",
    "PRNGKey",
    "Params",
    "Tokens",
    "UInt8",
    "typed",
]

Array = jax.Array | np.ndarray
PRNGKey = Key[jax.Array, ""]
Params = Mapping[str, Any]  # plain nested dicts of arrays
Batch = Mapping[str, Any]  # arrays by name: image, tokens, label, text, text_mask, valid
Metrics = dict[str, Any]
Index = int | Int[Array, ""]
Tokens = Int[Array, "b n k"] | Float[Array, "b n c"]

typed = jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))  # an int is a float
