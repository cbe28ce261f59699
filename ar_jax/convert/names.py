"""Renaming between our parameter trees and released state dicts, both ways, from one table of rules."""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from ar_jax.files import words
from ar_jax.typing import Params


class Layout(NamedTuple):
    """How a parameter is stored in PyTorch, and back.

    Attributes:
      to_torch, from_torch: between our array and theirs.
      part: (i, n), ours is the i-th of n equal parts of their entry, or of parts with the sizes n.
      axis: of their entry, along which the parts lie.
      pieces: ours holds so many of their entries, numbered by the {} of the key, side by side along its last axis; 0, with
        a {}: each by itself along its first.
      first: the number of the first of these entries.
    """

    to_torch: Callable
    from_torch: Callable
    part: tuple[int, int | tuple[int, ...]] = (0, 1)
    axis: int = 0
    pieces: int = 0
    first: int = 0

    def keys(self, key: str, entries: int) -> list[str]:
        """Of the entries that a parameter is spread over."""
        return [key.format(self.first + i) for i in range(entries)] if entries else [key]


PLAIN = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
CONV = Layout(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))
CONV1 = Layout(lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T)  # our Dense, their 1x1 convolution


def qkv_layout(heads: int, parts: int = 3) -> Layout:
    """Our joint kernel [d, 3f] holds query, key and value head by head; theirs [3f, d] all queries first.

    Two parts are keys and values alone.
    """

    def reordered(x, first, second):
        return x.reshape(first, second, -1, x.shape[-1]).swapaxes(0, 1).reshape(x.shape)

    return Layout(lambda x: reordered(x.T, heads, parts), lambda x: reordered(x, parts, heads).T)


# (pattern of our path, joined with "/"; their key, with {} for the layer of stacked parameters; layout)
Rule = tuple[str, str | Callable[[re.Match], str], Layout]


def _renamed(shapes: Params, rules: list[Rule]) -> Iterator[tuple[str, str, Layout]]:
    for path in traverse_util.flatten_dict(shapes, sep="/"):
        for pattern, key, layout in rules:
            match = re.fullmatch(pattern, path)
            if match:
                yield path, match.expand(key) if isinstance(key, str) else key(match), layout
                break
        else:
            raise ValueError(f"no rule names the parameter {path!r}")


def count(shapes: Iterable[str], pattern: str) -> int:
    """How many layers the keys have, whose numbers a pattern finds: those from 0 on.

    Raises:
      ValueError: a number is left out.
    """
    numbers = {int(m[1]): key for key in shapes if (m := re.match(pattern, key))}
    if numbers and max(numbers) >= len(numbers):
        raise ValueError(f"{words.name(numbers[max(numbers)])} is numbered beyond the {len(numbers)} of its kind")
    return len(numbers)


def multiple(shapes: Mapping[str, tuple[int, ...]], key: str, features: int) -> int:
    """How many times so many features an entry has as its first axis.

    Raises:
      ValueError: no whole number, or none.
    """
    count, rest = divmod(shapes[key][0], features)
    if rest or not count:
        raise ValueError(f"{key} has shape {tuple(shapes[key])}, whose first axis is no multiple of {features}")
    return count


def to_params(
    weights: Mapping[str, np.ndarray], shapes: Params, rules: list[Rule], buffers: Container[str] = ()
) -> Params:
    """Our tree from a state dict.

    Args:
      weights: the state dict.
      shapes: our tree of shapes, as `jax.eval_shape` gives it.
      rules: the source's names.
      buffers: keys of entries that are no parameters.
    Raises:
      ValueError: a key is missing, a shape differs, a number is not finite, or no parameter has a key; the first one is
        named.
    """
    flat = traverse_util.flatten_dict(shapes, sep="/")
    params, asked = {}, set()
    for path, key, layout in _renamed(shapes, rules):
        want = flat[path].shape
        entries, one = _spread(want, key, layout)
        keys = layout.keys(key, entries)
        asked |= {*keys}
        if entries:
            parts = [layout.from_torch(_part(_get(weights, key, path), layout)) for key in keys]
            finite = [_finite(part) for part in parts]
            key = keys[finite.index(False) if False in finite else 0]
            if all(part.shape == one for part in parts):
                params[path] = np.concatenate(parts, axis=-1) if layout.pieces else np.stack(parts)
        else:
            params[path] = np.asarray(layout.from_torch(_part(_get(weights, key, path), layout)), order="C")
            finite = [_finite(params[path])]
        if path not in params or params[path].shape != want:
            raise ValueError(f"{key} (our {path}) has another shape than the model's {tuple(want)}")
        if not all(finite):
            raise ValueError(f"{key} (our {path}) holds NaN or infinity: the file is damaged, or its training diverged")
    for key in weights:
        if key not in asked and key not in buffers:
            raise ValueError(f"{words.name(key)} is not part of this model: no parameter asks for it")
    return traverse_util.unflatten_dict(params, sep="/")


def to_weights(params: Params, rules: list[Rule]) -> dict[str, np.ndarray]:
    """A state dict under the source's names; the inverse of `to_params`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    weights, parts = {}, {}
    for path, key, layout in _renamed(params, rules):
        value = np.asarray(flat[path])
        each = {key: value}
        if "{}" in key:
            split = np.split(value, layout.pieces, axis=-1) if layout.pieces else value
            each = dict(zip(layout.keys(key, len(split)), split))
        for name, one in each.items():
            if layout.part[1] != 1:
                parts.setdefault(name, (layout.axis, {}))[1][layout.part[0]] = layout.to_torch(one)
            else:
                weights[name] = np.asarray(layout.to_torch(one), order="C")
    return weights | {
        key: np.concatenate([found[i] for i in sorted(found)], axis) for key, (axis, found) in parts.items()
    }


def key_shapes(shapes: Params, rules: list[Rule]) -> dict[str, tuple[int, ...]]:
    """The keys and shapes `to_weights` would give, computed without memory."""
    keys = {}
    flat = traverse_util.flatten_dict(shapes, sep="/")
    for path, key, layout in _renamed(shapes, rules):
        leaf = flat[path]
        entries, one = _spread(leaf.shape, key, layout)
        one = jax.ShapeDtypeStruct(one, leaf.dtype)
        shape, (n, axis) = jax.eval_shape(layout.to_torch, one).shape, (layout.part[1], layout.axis)
        if n != 1:
            shape = (*shape[:axis], sum(n) if isinstance(n, tuple) else shape[axis] * n, *shape[axis + 1 :])
        keys |= dict.fromkeys(layout.keys(key, entries), shape)
    return keys


def _spread(shape, key, layout):
    """Over how many entries a parameter is spread, 0 if it is one, and its shape for one."""
    if "{}" not in key:
        return 0, shape
    if layout.pieces:
        return layout.pieces, (*shape[:-1], shape[-1] // layout.pieces)
    return shape[0], shape[1:]


def differences(want: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """The first difference between two sets of keys and shapes, in words; empty if there is none."""
    for key in sorted(want.keys() | found.keys()):
        name = words.name(key)
        if key not in found:
            return f"{name} is missing (expected shape {tuple(want[key])})"
        if key not in want:
            return f"{name} of shape {tuple(found[key])} is not part of this model"
        if tuple(want[key]) != tuple(found[key]):
            return f"{name} has shape {tuple(found[key])}, expected {tuple(want[key])}"
    return ""


def _part(entry, layout):
    """Our part of an entry; all of it if it has not the size of all parts, so that its shape is found to be wrong."""
    (i, n), axis = layout.part, layout.axis
    length = entry.shape[axis] if entry.ndim > axis else 0
    ends = np.cumsum(n if isinstance(n, tuple) else (length // n,) * n)
    return np.split(entry, ends[:-1], axis)[i] if 0 < length == ends[-1] else entry


def _finite(array):
    return array.dtype.kind in "iub" or np.isfinite(array).all()


def _get(weights, key, path):
    if key not in weights:
        raise ValueError(f"{key} (our {path}) is missing from the weights")
    return np.asarray(weights[key])
