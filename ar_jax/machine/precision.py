"""How exact products of float32 numbers are, which devices decide for themselves unless they are told."""

import contextlib
from typing import Literal

import jax

Precision = Literal["default", "tensorfloat32", "highest"]


def multiply_in(precision: Precision) -> contextlib.AbstractContextManager:
    """What is traced inside multiplies float32 numbers so; products in bfloat16 are what they are.

    "default" leaves it to the device: CPUs take float32, GPUs (since Ampere) tensorfloat32, with 10 bits for the fraction,
    TPUs bfloat16, with 7. "tensorfloat32" is at least that, on TPUs three products of bfloat16. "highest" is float32.
    """
    return contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision)


def products(precision: Precision, platform: str = "") -> str:
    """What the products are, as caches record it: "float32", or else the precision and the platform ("" is this one)."""
    platform = platform or jax.default_backend()
    return "float32" if precision == "highest" or platform == "cpu" else f"{precision} on {platform}"
