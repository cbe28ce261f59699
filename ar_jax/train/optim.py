"""AdamW with a warm-up schedule and clipping."""

import dataclasses
import functools
import re
from typing import Literal

import jax
import optax

from ar_jax.typing import Params

NO_DECAY = ("scale", "bias", "uncond")  # norms, biases, and the fixed features of dropped captions


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's two moments."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices and tables; norms and biases have none."""
    no_decay: tuple[str, ...] = ()
    """Patterns searched in the paths of the parameters; those they match have none either."""
    clip: float = 1.0
    """Largest global gradient norm, per network; 0 does not clip."""
    warmup: int = 0
    """Updates of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    end_lr: float = 0.0
    """Where the cosine ends."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0 keeps none."""
    accumulate: int = 1
    """Parts a batch is split into to save memory; gradients are averaged."""


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Learning rate of every update."""
    if optim.schedule == "cosine":
        if optim.warmup >= steps:
            raise ValueError(f"optim.warmup is {optim.warmup}, but there are only {steps} updates")
        return optax.warmup_cosine_decay_schedule(
            0.0 if optim.warmup else optim.lr, optim.lr, optim.warmup, steps, optim.end_lr
        )
    ramp = optax.linear_schedule(0.0, optim.lr, optim.warmup) if optim.warmup else optax.constant_schedule(optim.lr)
    return ramp


def make_optimiser(optim: Optim, steps: int, networks: tuple[str, ...] = ("model",)) -> optax.GradientTransformation:
    """One AdamW per network, each clipped by its own gradient norm."""

    decays = functools.partial(_decays, others=optim.no_decay)

    def one():
        return optax.chain(
            optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity(),
            optax.adamw(schedule(optim, steps), *optim.betas, weight_decay=optim.weight_decay, mask=decays),
        )

    return optax.partition({name: one() for name in networks}, {name: name for name in networks})


def _decays(params: Params, others: tuple[str, ...] = ()) -> Params:
    def one(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return path[-1].key not in NO_DECAY and not any(re.search(pattern, name) for pattern in others)

    return jax.tree_util.tree_map_with_path(one, params)
