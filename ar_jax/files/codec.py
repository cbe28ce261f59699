"""Modules to JSON and back, so that a checkpoint folder says what it holds without running anybody's code."""

import dataclasses
import importlib
import types
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

PACKAGE = "ar_jax"


def encode(value: Any) -> Any:
    """JSON-able form of a module: nested dataclasses, functions by name, dtypes, arrays, plain values.

    Raises:
      ValueError: something that has no such form, or a class or function outside this package.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, types.FunctionType):
        return {"function": _name(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hidden = ("parent", "name") if isinstance(value, nn.Module) else ()
        fields = [field.name for field in dataclasses.fields(value) if field.init and field.name not in hidden]
        return {"type": _name(type(value)), **{name: encode(getattr(value, name)) for name in fields}}
    try:
        return {"dtype": jnp.dtype(value).name}
    except TypeError:
        raise ValueError(f"{value!r} cannot be written to JSON") from None


def decode(value: Any) -> Any:
    """The inverse of `encode`; lists become tuples. Only names inside this package are looked up.

    Raises:
      ValueError: an unknown name or field.
    """
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"array", "dtype"}:
        return np.array(value["array"], value["dtype"])
    if value.keys() == {"dtype"}:
        return jnp.dtype(value["dtype"]).type
    if value.keys() == {"function"}:
        return _find(value["function"], types.FunctionType)
    kind = _find(value.get("type", ""), type)
    try:
        return kind(**{name: decode(field) for name, field in value.items() if name != "type"})
    except TypeError as error:
        raise ValueError(f"{value['type']}: {error}") from None


def _name(thing):
    name = f"{thing.__module__}:{thing.__qualname__}"
    if thing.__module__.split(".")[0] != PACKAGE:
        raise ValueError(f"{name} lies outside {PACKAGE}; a checkpoint can only name what the package holds")
    return name


def _find(name, kind):
    module, _, attribute = str(name).partition(":")
    if module.split(".")[0] != PACKAGE or not attribute.isidentifier():
        raise ValueError(f"a checkpoint names {name!r}; only things inside {PACKAGE} are allowed")
    try:
        thing = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise ValueError(f"a checkpoint names {name!r}, which this version of {PACKAGE} does not have") from None
    ours = getattr(thing, "__module__", "").split(".")[0] == PACKAGE  # not merely imported by a module of ours
    if not ours or not isinstance(thing, kind) or (kind is type and not dataclasses.is_dataclass(thing)):
        raise ValueError(
            f"a checkpoint names {name!r}, which is no {'dataclass' if kind is type else 'function'} of it"
        )
    return thing


def difference(a: Any, b: Any, where: str = "module") -> str:
    """The first difference of two encoded values in words; empty if they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *b]:
            if name not in a or name not in b:
                return f"{where}.{name} is only on one side"
            if found := difference(a[name], b[name], f"{where}.{name}"):
                return found
        return ""
    return "" if a == b else f"{where} is {a!r} there and {b!r} here"
