"""Array aliases for annotations, the decorator that checks them while tracing, and what fields say of their values."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import Bool, Float, Int, Key, UInt8, jaxtyped

__all__ = [
    "Array",
    "Batch",
    "Blocks",
    "Bool",
    "Float",
    "Having",
    "Index",
    "Int",
    "Key",
    "Layers",
    "Level",
    "Many",
    "Metrics",
    "PRNGKey",
    "Params",
    "Share",
    "Size",
    "Steps",
    "Tokens",
    "UInt8",
    "Unstored",
    "Within",
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


@dataclasses.dataclass(frozen=True)
class Within:
    """In an annotation (`Annotated[float, Within(0, 1)]`): the smallest and the largest number of a field.

    Held where a model's description is written or read (`files.codec`), as all that is said of fields.
    """

    least: float
    most: float


@dataclasses.dataclass(frozen=True, init=False)
class Having:
    """In an annotation (`Annotated[nn.Module, Having("loss", "sample")]`): what the class of a part has."""

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)


Share = Annotated[float, Within(0, 1)]  # of a whole; a probability
Layers = Annotated[int, Within(1, 1024)]  # and other things that are traced one by one
Blocks = Annotated[int, Within(0, 1024)]  # that may be none
Many = Annotated[int, Within(0, 2**24)]  # or none
Level = Annotated[int, Within(-32, 31)]  # of a network that halves its image, from the finest; -1 the coarsest
Steps = Annotated[int, Within(1, 10_000)]  # of a loop
Unstored = Annotated[bool, Within(False, False)]  # how parameters are laid out for decoding: never so on disk
Size = tuple[Annotated[int, Within(1, 2**13)], Annotated[int, Within(1, 2**13)]]  # height and width in pixels

typed = jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))  # an int is a float


def finite(field: str, value: float, least: float = -math.inf) -> None:
    """Raises a ValueError that names the field if its value is no finite number of at least `least`."""
    if not math.isfinite(value) or value < least:
        limit = "" if least == -math.inf else f" of {least:g} or more"
        raise ValueError(f"{field} is {value}; it must be a finite number{limit}")
