"""AdamW with a warm-up schedule and clipping."""

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from ar_jax.typing import Params

# norms, biases, the fixed features of dropped captions; of next-scale models their learned vectors of places and layers
NO_DECAY = (
    "scale", "bias", "uncond", "q_bias", "v_bias", "log_scale", "start", "position", "level", "table"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's two moments."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices and tables; norms, biases and position vectors have none."""
    weight_decay_end: float | None = None
    """Where the decay moves to over the run, on half a cosine; None keeps it."""
    no_decay: tuple[str, ...] = ()
    """Patterns searched in the paths of the parameters; those they match have none either."""
    clip: float = 1.0
    """Largest global gradient norm, per network; 0 does not clip."""
    warmup: int = 0
    """Updates of linear warm-up."""
    warmup_start: float = 0.0
    """Where the warm-up begins, as a part of `lr`."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up."""
    hold: float = 0.0
    """Part of the run after the warm-up in which the linear schedule stays at `lr`."""
    end_lr: float = 0.0
    """Where cosine and linear schedule end."""
    last: bool = False
    """They end with the last update, not with the one that would follow it."""
    trained: tuple[str, ...] = ()
    """Patterns searched in the paths of the parameters that are trained; all others stay. () trains all."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0 keeps none."""
    accumulate: int = 1
    """Parts a batch is split into to save memory; gradients are averaged."""
    gradients: Literal["product", "float32"] = "product"
    """Of linear layers: in the dtype of their products, or not rounded to it, which doubles what a mesh has to sum."""

    def __post_init__(self):
        if self.gradients not in ("product", "float32"):
            raise ValueError(f"optim.gradients is {self.gradients!r}; it must be product or float32")


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Learning rate of every update."""
    if optim.schedule not in ("constant", "cosine", "linear"):
        raise ValueError(f"optim.schedule is {optim.schedule!r}; it must be constant, cosine or linear")
    rest = steps - optim.warmup - optim.last
    if optim.schedule != "constant" and rest < 1:
        raise ValueError(f"optim.warmup is {optim.warmup}, but there are only {steps} updates")
    if optim.schedule == "constant":
        after = optax.constant_schedule(optim.lr)
    elif optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(optim.lr, rest, optim.end_lr / optim.lr if optim.lr else 0.0)
    else:
        held = optim.hold * rest
        after = lambda step: optim.lr + (optim.end_lr - optim.lr) * jnp.clip((step - held) / (rest - held), 0, 1)  # noqa: E731
    if not optim.warmup:
        return after
    before = optax.linear_schedule(optim.warmup_start * optim.lr, optim.lr, optim.warmup)
    return optax.join_schedules([before, after], [optim.warmup])


def decay_schedule(optim: Optim, steps: int) -> optax.Schedule | float:
    """Weight decay of every update."""
    if optim.weight_decay_end is None:
        return optim.weight_decay
    end, length = optim.weight_decay_end, max(steps - 1, 1)
    return lambda step: end + (optim.weight_decay - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / length, 1)))


def make_optimiser(optim: Optim, steps: int, networks: tuple[str, ...] = ("model",)) -> optax.GradientTransformation:
    """One AdamW per network, each clipped by its own gradient norm."""

    def one():
        return optax.chain(
            optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity(),
            optax.adamw(schedule(optim, steps), *optim.betas, weight_decay=decay_schedule(optim, steps), mask=decays),
        )

    def decays(params):
        def one(path, _):
            return path[-1].key not in NO_DECAY and is_trained(optim, path) and not _matches(optim.no_decay, path)

        return jax.tree_util.tree_map_with_path(one, params)

    return optax.partition({name: one() for name in networks}, {name: name for name in networks})


def _matches(patterns, path):
    name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
    return any(re.search(pattern, name) for pattern in patterns)


def is_trained(optim: Optim, path: tuple) -> bool:
    return not optim.trained or _matches(optim.trained, path)


def only_trained(optim: Optim, params: Params) -> Params:
    """The same parameters, of which those that are not trained get no gradient.

    Raises:
      ValueError: a pattern matches none.
    """
    for pattern in optim.trained:
        if not any(
            is_trained(Optim(trained=(pattern,)), path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ):
            raise ValueError(f"optim.trained has {pattern!r}, which matches no parameter")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if is_trained(optim, path) else jax.lax.stop_gradient(x), params
    )
