"""One function for every share of a batch, with the random numbers of the whole batch.

Where parts of a batch follow one another (`train.state`), gradients should be summed over devices once, behind the last
part, not once a part. So every copy of the model, along the mesh's axis "data", has gradients of its own until then: the
function that makes them is mapped over shares. What it draws for rows is its share of what one call for all would draw.
"""

import contextvars
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from ar_jax.typing import Array, PRNGKey

AXIS = "data"  # of the mesh
_NAME = "shares"

_inside = contextvars.ContextVar("shares", default=False)


def count() -> int:
    """Shares of the mesh in use (`jax.set_mesh`); 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def by_share(fn: Callable) -> Callable:
    """fn of rows (the first argument) for every share: results have a new first axis, which is divided over "data".

    Inside, `sharding.constrain` divides rows over the other axes of a batch, and draws for rows go through `draw`.

    Args:
      fn: (rows, *rest) -> tree; `rest` are the same for all.
    """

    def mapped(rows, *rest):
        token = _inside.set(True)
        try:
            split = jax.tree.map(lambda x: x.reshape(count(), -1, *x.shape[1:]), rows)
            each = jax.vmap(lambda rows: fn(rows, *rest), axis_name=_NAME, spmd_axis_name=AXIS)
            return each(split)
        finally:
            _inside.reset(token)

    return mapped


def zeros(tree: Any) -> Any:
    """Zeros for the sums of what `by_share` gives: of every leaf one for every share."""

    def one(x):
        where = P(AXIS, *[P.UNCONSTRAINED] * x.ndim)
        return lax.with_sharding_constraint(jnp.zeros((count(), *x.shape), x.dtype), where)

    return jax.tree.map(one, tree)


def summed(tree: Any, like: Any) -> Any:
    """Sums over shares, which devices exchange in the dtypes of `like`."""

    def one(x, like):
        return lax.reduce(x.astype(like.dtype), np.zeros((), like.dtype), lax.add, (0,)).astype(x.dtype)

    return jax.tree.map(one, tree, like)


def others(axes: Any) -> Any:
    """Mesh axes of a dimension, without the one that shares are divided over, inside `by_share`."""
    if not _inside.get() or axes is None:
        return axes
    left = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if axis != AXIS)
    return left or None


def draw(fn: Callable[[PRNGKey, tuple[int, ...]], Array], key: PRNGKey, shape: tuple[int, ...]) -> Array:
    """fn(key, shape), whose first axis are rows; inside `by_share`, this share's rows of the draw for all.

    `fn` closes over nothing that is traced.
    """
    if not _inside.get():
        return fn(key, shape)

    @custom_vmap
    def own(key, share):
        return fn(key, shape)

    @own.def_vmap
    def for_all(shares, batched, key, share):
        if batched[0]:
            raise ValueError("a share's own key gives no rows of a draw for all: shares.draw takes the key of the whole batch")
        return fn(key, (shares * shape[0], *shape[1:])).reshape(shares, *shape), True

    return own(key, lax.axis_index(_NAME))


def first(rows: Array) -> Array:
    """The first row; inside `by_share`, that of the first share for all."""
    if not _inside.get():
        return rows[0]

    @custom_vmap
    def own(rows, share):
        return rows[0]

    @own.def_vmap
    def for_all(shares, batched, rows, share):
        return rows[0, 0] if batched[0] else rows[0], False

    return own(rows, lax.axis_index(_NAME))
