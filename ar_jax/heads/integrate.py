"""Ways through noise: integration of a velocity over given times, noise by address, numbers of steps by decode step."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.typing import Array, Float, Index, Key, typed

Solver = Literal["euler", "heun", "midpoint", "stochastic"]
Anneal = Literal["constant", "linear", "cosine", "two_stage"]
SOLVERS = ("euler", "heun", "midpoint", "stochastic")


def pure(module: nn.Module) -> Callable:
    """A bound module as a plain function of its inputs, for loops of JAX inside a module."""
    unbound, variables = module.unbind()
    return lambda *args: unbound.apply(variables, *args)


@typed
def normal(keys: Key[Array, "*b"], s: Index, features: int) -> Float[Array, "*b c"]:
    """Unit normal numbers number `s` of every key."""
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, s), (features,))  # noqa: E731
    for _ in keys.shape:
        draw = jax.vmap(draw)
    return draw(keys)


def integrate(
    velocity: Callable[[Array, Float[Array, ""]], Array],
    x: Array,
    times: Float[Array, "s"],
    *,
    solver: Solver = "euler",
    noise: Callable[[Index], Array] | None = None,
    steps: Index | None = None,
) -> Array:
    """Follows dx/dt = velocity(x, t) from times[0] to times[steps] in one loop.

    Args:
      velocity: of data at t = 0 and unit noise at t = 1, (1 - t) data + t noise, in the shape of x.
      x: float32, at times[0].
      times: falling; longer than `steps` + 1 if several grids share an array.
      solver: "euler", "heun" and "midpoint" (two calls of the velocity per step) follow the flow; "stochastic" is
        Euler-Maruyama for the reverse process with diffusion 2t, whose last step adds no noise (xAR).
      noise: of step i, unit normal in the shape of x; "stochastic" needs it.
      steps: number of steps, which may be traced; None takes all.
    Raises:
      ValueError: an unknown solver, or a stochastic one without noise.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}")
    if solver == "stochastic" and noise is None:
        raise ValueError("the stochastic solver needs noise")
    times = jnp.asarray(times, jnp.float32)
    steps = len(times) - 1 if steps is None else steps

    def body(i, x):
        t, dt = times[i], times[i + 1] - times[i]
        v = velocity(x, t)
        if solver == "stochastic":
            drift = (2 - t) * v + x  # velocity minus t times the score, -((1 - t) v + x) / t
            return x + drift * dt + jnp.where(i < steps - 1, jnp.sqrt(2 * t * -dt), 0.0) * noise(i)
        if solver == "midpoint":
            return x + dt * velocity(x + dt / 2 * v, t + dt / 2)
        if solver == "heun":
            return x + dt / 2 * (v + velocity(x + dt * v, t + dt))
        return x + dt * v

    return lax.fori_loop(0, steps, body, x)


def annealed(rule: Anneal, first: int, last: int, steps: int) -> np.ndarray:
    """Number of denoising steps in every decode step, int [steps]: many at the start, few at the end.

    Source: DiSA (arXiv:2505.20297). Its "constant" takes `last` throughout; here it takes `first`.
    Raises:
      ValueError: an unknown rule, or numbers below 1.
    """
    if min(first, last) < 1:
        raise ValueError(f"denoising steps are {first} to {last}; both must be at least 1")
    i, end = np.arange(steps), max(steps - 1, 1)
    if rule == "constant":
        return np.full(steps, first)
    if rule == "linear":
        part = (steps - 1 - i) / end
    elif rule == "cosine":
        part = (np.cos(math.pi * i / end) + 1) / 2
    elif rule == "two_stage":
        part = (i < (steps - 1) / 2).astype(float)
    else:
        raise ValueError(f"the annealing rule is {rule!r}; it must be constant, linear, cosine or two_stage")
    return last + (part * (first - last)).astype(int)


def stacked(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [s ...] of different lengths as one [g s ...], padded by repeating the last entry."""
    longest = max(map(len, tables))
    return np.stack([np.concatenate([table, np.repeat(table[-1:], longest - len(table), 0)]) for table in tables])


def schedule(
    grid: Callable[[int], np.ndarray], anneal: Anneal, first: int, last: int, decode_steps: int, i: Index
) -> tuple[Float[Array, "s"], Index]:
    """Times of decode step `i`, for `integrate`, and how many steps they are.

    Args:
      grid: number of steps -> their times, one more.
      anneal, first, last: see `annealed`.
      decode_steps: in all.
    """
    kinds, which = np.unique(annealed(anneal, first, last, decode_steps), return_inverse=True)
    grids = [grid(count) for count in kinds.tolist()]
    if len(grids) == 1 or isinstance(i, int):
        times = grids[0 if len(grids) == 1 else which[i]]
        return np.asarray(times, np.float32), len(times) - 1
    group = jnp.asarray(which)[i]
    return jnp.asarray(stacked(grids), jnp.float32)[group], jnp.asarray([len(grid) - 1 for grid in grids])[group]


def calls(
    grid: Callable[[int], np.ndarray], anneal: Anneal, first: int, last: int, decode_steps: int, solver: Solver = "euler"
) -> np.ndarray:
    """Calls of the velocity in every decode step, int [steps]; arguments as of `schedule` and `integrate`."""
    each = 2 if solver in ("heun", "midpoint") else 1
    return np.array([each * schedule(grid, anneal, first, last, decode_steps, i)[1] for i in range(decode_steps)])
