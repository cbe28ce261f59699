"""The optimiser: a rule that makes steps of gradients, and around it clipping, weight decay and the learning rate."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ar_jax.typing import Params, PRNGKey, Share, Within

Moment = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Source: arXiv:1412.6980, with decoupled decay as in arXiv:1711.05101."""

    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the two moments."""
    moment: Moment = "float32"
    """How the first moment is stored; the second is float32."""

    def __call__(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(*self.betas, mu_dtype=_stored(self))


@dataclasses.dataclass(frozen=True)
class Lion:
    """The sign of a moving average; takes a learning rate several times smaller than AdamW's. Source: arXiv:2302.06675."""

    betas: tuple[Share, Share] = (0.9, 0.99)
    """Share of the moment in the step, and its decay."""
    moment: Moment = "float32"
    """How it is stored."""

    def __call__(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(*self.betas, mu_dtype=_stored(self))


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Second moments of matrices by row and column, steps clipped by their size, not scaled by that of the parameters.

    Source: arXiv:1804.04235, as in arXiv:2106.04560.
    """

    momentum: Share = 0.9
    """Decay of the first moment; 0 keeps none."""
    moment: Moment = "bfloat16"
    """How it is stored."""
    decay: float = 0.8
    """Second moments are averages over about t^decay of t updates."""
    smallest: int = 128
    """Of two axes, for a matrix to be kept by row and column."""

    def __call__(self) -> optax.GradientTransformation:
        rms = optax.scale_by_factored_rms(decay_rate=self.decay, min_dim_size_to_factor=self.smallest)
        first = [optax.ema(self.momentum, debias=False, accumulator_dtype=jnp.dtype(_stored(self)))] * (
            self.momentum > 0
        )
        return optax.chain(rms, optax.clip_by_block_rms(1.0), *first)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Orthogonal steps for kernels, as large as AdamW's, so that its learning rate and decay serve; AdamW for all else.

    Source: Muon (Jordan, 2024), with the size of arXiv:2502.16982.
    """

    momentum: Share = 0.95
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Of AdamW."""
    others: tuple[str, ...] = ("/(head|mask_head|conditioning|inputs?)/", "/conv_(in|out)/")
    """Patterns searched in the paths of kernels that AdamW takes too: of the first and of the last layers."""
    moment: Moment = "float32"
    """How first moments are stored."""
    steps: int = 5
    """Of the Newton-Schulz iteration."""

    def __call__(self) -> optax.GradientTransformation:
        def shapes(params):
            return jax.tree_util.tree_map_with_path(self._matrix, params)

        def known(params):  # as `optax.partition` hides the rest
            return jax.tree.map(lambda x: optax.MaskedNode() if x is None else x, shapes(params), is_leaf=_is_spec)

        def label(params):
            return jax.tree.map(lambda x: "adam" if x is None else "muon", shapes(params), is_leaf=_is_spec)

        stored = _stored(self)
        orthogonal = optax.chain(
            optax.contrib.scale_by_muon(
                beta=self.momentum, ns_steps=self.steps, mu_dtype=stored, weight_dimension_numbers=known
            ),
            optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(self._sized, updates)),
        )
        return optax.partition({"muon": orthogonal, "adam": optax.scale_by_adam(*self.betas, mu_dtype=stored)}, label)

    def _sized(self, path, step):
        (*summed,), out = (spec := self._matrix(path, step)).reduction_axis, spec.output_axis
        return 0.2 * max(math.prod(step.shape[axis] for axis in summed), step.shape[out]) ** 0.5 * step

    def _matrix(self, path, leaf):
        """Axes of a kernel that are summed over, and those of the result; of stacks of them the first axis is neither."""
        if path[-1].key != "kernel" or leaf.ndim < 2 or _matches(self.others, path):
            return None
        stacked = leaf.ndim % 2
        return optax.contrib.MuonDimensionNumbers(tuple(range(stacked, leaf.ndim - 1)), leaf.ndim - 1)


def _is_spec(x):
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)


def _stored(rule):
    if rule.moment not in ("float32", "bfloat16"):
        raise ValueError(f"optim.rule.moment is {rule.moment!r}; it must be float32 or bfloat16")
    return rule.moment


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser."""

    lr: Annotated[float, Within(0, math.inf)] = 1e-4
    """Peak learning rate."""
    rule: Callable = AdamW()
    """What makes a step of the gradients: `AdamW`, `Muon`, `Adafactor`, `Lion`, or any dataclass whose call gives such a
    transformation of optax."""
    weight_decay: float = 0.05
    """Decoupled decay of what the modules do not leave alone (see `decayed`)."""
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
    schedule: Literal["constant", "cosine", "linear", "root", "inverse_sqrt", "fifths"] = "constant"
    """After the warm-up; root falls as 1 - the root of the part gone, inverse_sqrt with the root of the updates done, from the
    end of the warm-up on, fifths to a fifth of what it was after 1/2, 2/3 and 5/6 of the run."""
    hold: Share = 0.0
    """Part of the run after the warm-up in which the linear and the root schedule stay at `lr`."""
    end_lr: float = 0.0
    """Where cosine, linear and root schedule end."""
    last: bool = False
    """They end with the last update, not with the one that would follow it."""
    trained: tuple[str, ...] = ()
    """Patterns searched in the paths of the parameters that are trained; all others stay and have no moments. () trains
    all."""
    ema: Share = 0.0
    """Decay of the moving average of the weights; 0 keeps none."""
    accumulate: int = 1
    """Parts a batch is split into to save memory; gradients are averaged."""
    gradients: Literal["product", "float32"] = "product"
    """Of linear layers: in the dtype of their products, or not rounded to it, which doubles what a mesh has to sum."""
    betas: tuple[Share, Share] | None = None
    """Short for those of the rule."""

    def __post_init__(self):
        if self.betas is not None:
            if not hasattr(self.rule, "betas"):
                raise ValueError(f"optim.betas is {self.betas}, but {type(self.rule).__name__} has none; leave it out")
            object.__setattr__(self, "rule", dataclasses.replace(self.rule, betas=self.betas))
            object.__setattr__(self, "betas", None)
        if self.gradients not in ("product", "float32"):
            raise ValueError(f"optim.gradients is {self.gradients!r}; it must be product or float32")


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Learning rate of every update."""
    if optim.schedule not in ("constant", "cosine", "linear", "root", "inverse_sqrt", "fifths"):
        raise ValueError(
            f"optim.schedule is {optim.schedule!r}; it must be constant, cosine, linear, root, inverse_sqrt or fifths"
        )
    rest = steps - optim.warmup - optim.last
    if optim.schedule != "constant" and rest < 1:
        raise ValueError(f"optim.warmup is {optim.warmup}, but there are only {steps} updates")
    if optim.schedule == "inverse_sqrt":
        begin = max(optim.warmup, 1)
        after = lambda step: optim.lr * jnp.sqrt(begin / (begin + step))  # noqa: E731
    elif optim.schedule == "constant":
        after = optax.constant_schedule(optim.lr)
    elif optim.schedule == "fifths":
        after = lambda step: optim.lr * 0.2 ** sum(step >= rest * part for part in (1 / 2, 2 / 3, 5 / 6))  # noqa: E731
    elif optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(optim.lr, rest, optim.end_lr / optim.lr if optim.lr else 0.0)
    else:
        held, fall = optim.hold * rest, jnp.sqrt if optim.schedule == "root" else lambda gone: gone
        after = lambda step: optim.lr + (optim.end_lr - optim.lr) * fall(jnp.clip((step - held) / (rest - held), 0, 1))  # noqa: E731
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


def decayed(make: Callable[[PRNGKey], Params]) -> Params:
    """Which parameters of a network weight decay may shrink, as bools in the structure of what `make` initialises.

    A module says which of its own parameters are left alone in its class attribute `no_decay`. Those that have none leave
    `scale` and `bias` alone: that is what Flax calls the parameters of norms, and what layers add.
    """
    usual, said = ("scale", "bias"), {}

    def listen(call, arguments, keywords, context):
        if context.module.scope is not None:  # Flax's own wrappers of a part come after the module they are in
            said.setdefault(context.module.path, getattr(type(context.module), "no_decay", usual))
        return call(*arguments, **keywords)

    def one(path, _):
        *owner, name = (key.key for key in path)
        return name not in said.get(tuple(owner), usual)

    with nn.intercept_methods(listen):
        shapes = jax.eval_shape(
            lambda key: make(key), jax.random.key(0)
        )  # a new function, or its trace may be an old one
    return jax.tree_util.tree_map_with_path(one, shapes)


def make_optimiser(optim: Optim, steps: int, networks: Mapping[str, Params]) -> optax.GradientTransformation:
    """The rule for each network, clipped by its own gradient norm.

    Args:
      optim: settings; `trained` and `no_decay` speak of paths inside a network, `trained` of "model" only.
      steps: updates.
      networks: for each network, which of its parameters decay may shrink (see `decayed`).
    """
    flat = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(networks))}
    label, shrinks = {}, {}
    for (network, *inside), may in flat.items():
        path = (network, *inside)
        free = network != "model" or is_trained(optim, inside)
        label[path] = network if free else "still"
        shrinks[path] = may and not _matches(optim.no_decay, inside)

    def one(network):
        return optax.chain(
            clipped(optim.clip, network) if optim.clip else optax.identity(),
            optax.chain(
                optim.rule(),
                optax.add_decayed_weights(decay_schedule(optim, steps), lambda params: _looked_up(shrinks, params)),
                optax.scale_by_learning_rate(schedule(optim, steps)),
            ),
        )

    rules = {name: one(name) for name in networks}
    still = {"still": optax.set_to_zero()} if "still" in label.values() else {}
    return optax.partition(rules | still, lambda params: _looked_up(label, params))


def clipped(largest: float, network: str) -> optax.GradientTransformationExtraArgs:
    """Gradients of a network, scaled down to this norm where theirs is larger.

    `update` may be given `norms`, those of all networks by name. The scale is one factor, which is multiplied where the
    gradients are read for the moments: clipping takes no pass over them of its own.
    """

    def update(grads, state, params=None, *, norms=None, **_):
        scale = jnp.minimum(1, largest / (optax.tree.norm(grads) if norms is None else norms[network]))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _looked_up(table, tree):
    """The table's entries in the structure of a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: table[tuple(key.key for key in path)], tree)


def _matches(patterns, path):
    """Whether one of them is found in a path of names (or of JAX's keys)."""
    name = "".join(f"/{getattr(key, 'key', key)}" for key in path)
    return any(re.search(pattern, name) for pattern in patterns)


def is_trained(optim: Optim, path: Any) -> bool:
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
