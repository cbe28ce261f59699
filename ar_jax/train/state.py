"""The state of a training run and the one update that serves every recipe."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.linear import float32_gradients
from ar_jax.typing import Array, Batch, Int, Metrics, Params, PRNGKey

# (params, extra, frozen, batch, key, step) -> (gradients of params, extra, metrics); if the loss is a weighted mean, the
# metrics have the sum of its weights as "weight"
GradFn = Callable[
    [Params, Params, Params, Batch, PRNGKey, Int[Array, ""]],
    tuple[Params, Params, Metrics],
]


@struct.dataclass
class TrainState:
    """Everything a checkpoint holds.

    Attributes:
      step: int32 [], finished updates, skipped ones included.
      params: the networks by name; "model" is the one that is kept in the end.
      ema: moving average of `params["model"]`, or None.
      opt: optimiser state.
      extra: what a recipe carries beside trained parameters (batch statistics, code usage).
      skipped: int32 [], updates whose loss or gradients were not finite.
      skipped_in_a_row: int32 [], how many of them came last, without a good one after them.
    """

    step: Array
    params: Params
    ema: Params | None
    opt: Any
    extra: Params
    skipped: Array
    skipped_in_a_row: Array


def create(params: Params, extra: Params, tx: optax.GradientTransformation, ema: float) -> TrainState:
    # a copy: the update donates its state, and one buffer must not be given away twice
    average = jax.tree.map(jnp.copy, params["model"]) if ema else None
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    return TrainState(zero(), params, average, tx.init(params), extra, zero(), zero())


def make_update(
    grad_fn: GradFn,
    tx: optax.GradientTransformation,
    *,
    ema: float = 0.0,
    accumulate: int = 1,
    float32: bool = False,
    rounded: Callable[[Params], Params] | None = None,
    after: Callable[[TrainState, PRNGKey], TrainState] = lambda state, key: state,
) -> Callable[[TrainState, Params, Batch, PRNGKey], tuple[TrainState, Metrics]]:
    """The training step: gradients (of `accumulate` parts of the batch, one after the other), optimiser, EMA.

    Parts have as many rows, every device its share of each; they count by the weights of their losses, so that the mean
    over them is that over the batch. Where the loss or a gradient is not finite, the update is skipped: only `step` and the counts of skipped updates move.

    Args:
      grad_fn: the recipe; its metrics have "loss".
      tx: optimiser over the whole of `params`.
      ema: decay per update; 0 keeps none.
      accumulate: number of parts; the batch size is a multiple of it.
      float32: gradients of kernels leave their products so (see `float32_gradients`).
      rounded: of a recipe whose loss is a mean over rows that do not look at one another: parameters in the dtypes in which
        devices sum the gradients of kernels, unless `float32`. They sum them once for all parts. Without it, once a part.
      after: last change to the state, for recipes that edit parameters directly.

    Returns:
      update(state, frozen, batch, key) -> (state, metrics), to be jitted with its state donated.
    """

    def gradients(state, frozen, batch, key):
        if accumulate == 1:
            grads, extra, metrics = grad_fn(state.params, state.extra, frozen, batch, key, state.step)
            metrics.pop("weight", None)
            return grads, extra, metrics

        images = len(jax.tree.leaves(batch)[0])
        divided = rounded is not None and shares.count() > 1 and images % (accumulate * shares.count()) == 0

        def part(carry, xs):
            total, extra = carry
            rows, key = xs

            def of(rows):
                return grad_fn(state.params, extra, frozen, rows, key, state.step)

            grads, extra, metrics = shares.by_share(of)(rows) if divided else of(rows)
            weight = jnp.asarray(metrics.pop("weight", 1.0))
            total = jax.tree.map(lambda t, g: t + jnp.expand_dims(weight, tuple(range(weight.ndim, g.ndim))) * g, total, grads)
            return (total, extra), (metrics, weight)

        def split(x):  # inside the batch axis, which is divided over devices
            return constrain(jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), None, BATCH)

        total = jax.tree.map(jnp.zeros_like, state.params)
        total = shares.zeros(total) if divided else total
        parts = jax.tree.map(split, batch), jax.random.split(key, accumulate)
        (grads, extra), (metrics, weights) = jax.lax.scan(part, (total, state.extra), parts)
        grads = jax.tree.map(lambda g: g / jnp.maximum(weights.sum(), 1e-9), grads)
        if divided:
            grads = shares.summed(grads, state.params if float32 else jax.eval_shape(rounded, state.params))
        share = weights / jnp.maximum(weights.sum(), 1e-9)
        return grads, extra, jax.tree.map(lambda m: jnp.tensordot(share, m, share.ndim), metrics)

    def update(state, frozen, batch, key):
        key, after_key = jax.random.split(key)
        with float32_gradients(float32):
            grads, extra, metrics = gradients(state, frozen, batch, key)
        norms = {name: optax.tree.norm(part) for name, part in grads.items()}
        finite = jnp.isfinite(jnp.stack([metrics["loss"], *norms.values()])).all()

        def apply(state, grads, extra):
            updates, opt = optax.with_extra_args_support(tx).update(grads, state.opt, state.params, norms=norms)
            params, average = optax.apply_updates(state.params, updates), state.ema
            if ema:
                average = jax.tree.map(lambda old, new: old + (1 - ema) * (new - old), state.ema, params["model"])
            new = state.replace(step=state.step + 1, params=params, ema=average, opt=opt, extra=extra)
            return after(new.replace(skipped_in_a_row=jnp.zeros_like(state.step)), after_key)

        def skip(state, grads, extra):
            counts = {name: getattr(state, name) + 1 for name in ("step", "skipped", "skipped_in_a_row")}
            return state.replace(**counts)

        state = jax.lax.cond(finite, apply, skip, state, grads, extra)
        metrics |= {"grad_norm": norms["model"]}
        return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

    return update
