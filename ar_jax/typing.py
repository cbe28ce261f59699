"""Array aliases for annotations, the decorator that checks them while tracing, and the check of a setting's range."""

import math
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
    "finite",
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


def finite(field: str, value: float, least: float = -math.inf) -> None:
    """Raises a ValueError that names the field if its value is no finite number of at least `least`."""
    if not math.isfinite(value) or value < least:
        limit = "" if least == -math.inf else f" of {least:g} or more"
        raise ValueError(f"{field} is {value}; it must be a finite number{limit}")
