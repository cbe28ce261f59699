"""Operations of a traced function, counted in its jaxpr: what the model asks for, whatever the compiler makes of it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core


def model_flops(fn: Callable, *args: Any) -> float:
    """Multiplications and additions of all matrix products and convolutions in one call of `fn`.

    Attention counts in full, whatever its mask, as usual for the share of a peak (MFU); sums, norms and the like do not
    count. Recomputation counts as often as it is traced, so pass functions of modules `without_remat`.

    Args:
      args: arrays or their shapes.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def without_remat(module: Any) -> Any:
    """The same module without anything that is computed again in the backward pass."""
    return with_fields(module, remat="none", chunk=0)


def with_fields(module: Any, **values: Any) -> Any:
    """The same dataclass with fields of these names, also of dataclasses inside it, set to these values."""
    changes = {}
    for field in dataclasses.fields(module):
        if not field.init or field.name in ("parent", "name"):
            continue
        value = getattr(module, field.name)
        if field.name in values:
            changes[field.name] = values[field.name]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = with_fields(value, **values)
    return dataclasses.replace(module, **changes) if changes else module


def _count(jaxpr) -> float:
    return sum(_one(equation) for equation in jaxpr.eqns)


def _one(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        out_features = kernel[numbers.rhs_spec[0]]
        holes = math.prod(params["lhs_dilation"])  # a strided convolution's gradient skips the zeros in between
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out_features / holes
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(_count(inner) for inner in jax.extend.core.jaxprs_in_params(params))
