"""Masked diffusion without a time: a masked model whose images count by how much of them is hidden, drawn by first hitting."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ar_jax.generators.base import Setting, Step
from ar_jax.generators.maskgit import MaskGIT, State
from ar_jax.orders import Order, to_ranks
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Index, Int, Key, Steps


@dataclasses.dataclass(frozen=True)
class FirstHitting:
    """A random order for every image, in which steps reveal equal numbers of slots.

    Attributes:
      steps: of decoding, at most one per slot. With one for every slot it is exact: hidden slots of a masked diffusion become
        known one by one and in any order, however late.
    Source: arXiv:2409.02908.
    """

    steps: Steps = 64

    adjustable = ("steps",)

    def __call__(
        self, spec: TokenSpec, keys: Key[Array, "b"], images: int = 1, train_step: Index = 0
    ) -> Order:  # fmt: skip
        steps = min(self.steps, spec.n)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (spec.n,)))(keys)
        ends = np.round(spec.n * np.arange(steps + 1) / steps).astype(int)
        sizes = tuple(np.diff(ends).tolist())
        hidden = jnp.ones(uniform.shape, bool)
        return Order(picked(uniform, hidden), sizes, (max(sizes),) * steps)


def picked(uniform: Float[Array, "b m"], hidden: Bool[Array, "b n"]) -> Int[Array, "b m"]:
    """Slots one after the other: of those that are left in slot order, the one at a part `uniform` of their number."""

    def pick(left, uniform):
        place = jnp.floor(uniform * left.sum(1)).astype(jnp.int32)
        place = jnp.minimum(place, left.sum(1) - 1)  # a product that is rounded up
        slot = ((jnp.cumsum(left, axis=1) == place[:, None] + 1) & left).argmax(1)
        return left & (jnp.arange(left.shape[1]) != slot[:, None]), slot

    return jax.lax.scan(pick, hidden, uniform.T)[1].T.astype(jnp.int32)


def hitting_chances(uniform: Float[Array, "b m"], left: Any) -> Float[Array, "b m"]:
    """By what a token's chance of being hidden has fallen when the next slots become known, one after the other.

    All of n hidden ones survive from c to c' with (c' / c)^n.

    Args:
      left: how many are hidden before the first of them.
    """
    count = jnp.maximum(left - jnp.arange(uniform.shape[1]), 1)
    return jnp.cumprod(uniform ** (1 / count), axis=1)


def hitting_times(chance: Float[Array, "*b"], curve: str = "linear") -> Float[Array, "*b"]:
    """Times at which tokens are hidden with a chance: the inverse of `corruption.hidden_part`."""
    if curve == "cos":
        return jnp.arccos(1 - chance) / (np.pi / 2)
    return {"linear": lambda c: c, "square": jnp.sqrt, "root": jnp.square, "log": lambda c: jnp.exp2(c) - 1}[curve](
        chance
    )


@struct.dataclass
class Past(State):
    """The carry of steps that look back.

    Attributes:
      chance: float32 [b], of a token to be hidden when the last slot became known.
      time: float32 [b], of the last network call; infinite before the first.
      odds: float32 [b n v], probabilities of codes that it gave.
    """

    chance: Array
    time: Array
    odds: Array


class MaskedDiffusion(MaskGIT):
    """A masked model trained by the bound of masked diffusion: n of the N tokens are hidden, n any number alike, and the image
    counts N / n times. That is all that is left of the time, which the network need not know.

    Drawn in the order's own random order (`FirstHitting`). Fields of `MaskGIT` that speak of schedules and of noise have no
    effect.

    Attributes:
      look_back: a step that reveals several slots draws each as at the time when it is hit, by going on as probabilities have
        changed since the step before. In steps of one slot it changes nothing but their times.
      times: how the chance of being hidden depends on time (`corruption.Hide`); for `look_back`.
      others: see `MaskGIT`.
    Source: arXiv:2409.02908; how probabilities go on is a proposal.
    """

    kept: Literal["surest", "ordered"] = "ordered"
    look_back: bool = False
    times: Literal["linear", "cos", "square", "root", "log"] = "linear"

    adjustable = ("look_back",)

    def drawn_mask(self, progress: Float[Array, "b 1"], scores: Float[Array, "b n"]) -> Bool[Array, "b n"]:
        count = 1 + jnp.floor(progress * scores.shape[1])
        return jnp.argsort(scores, axis=1) < count

    def weigh(self, hidden: Bool[Array, "b n"]) -> Float[Array, "b n"]:
        return hidden * (hidden.shape[1] / hidden.sum(1, keepdims=True))

    def begin(self, setting: Setting, images: int) -> State:
        state = super().begin(setting, images)
        if not self.look_back:
            return state
        odds = jnp.zeros((images, self.spec.n, self.spec.codes[0]))
        return Past(state.tokens, state.known, jnp.ones(images), jnp.full(images, jnp.inf), odds)

    def step(self, state: State, now: Step, setting: Setting) -> State:
        if not self.look_back:
            return super().step(state, now, setting)
        n, order = self.spec.n, setting.order
        rank, known, tokens, keys = self.sight(state, now, setting)
        logits = self.head.filtered(self.hidden(tokens, ~known, setting.cond), len(tokens), setting.knobs, now.i)
        odds = jax.nn.softmax(logits)
        uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, n))))(now.keys)
        chances = state.chance[:, None] * hitting_chances(uniform, n - now.first)
        size = jnp.asarray(order.sizes)[now.i]
        place = jnp.broadcast_to(jnp.clip(rank - now.first, 0, size - 1), known.shape)
        time, hit = (hitting_times(c, self.times) for c in (state.chance, jnp.take_along_axis(chances, place, axis=1)))
        drawn = self.head.draw(jnp.log(onward(odds, state.odds, time, state.time, hit)), keys, setting.knobs, now.i)
        revealed = ~known & (rank < now.first + size)
        tokens = jnp.where(revealed[..., None], drawn, tokens)
        return Past(to_ranks(tokens, order), known | revealed, chances[jnp.arange(len(tokens)), size - 1], time, odds)


def onward(
    odds: Float[Array, "b n v"], past: Float[Array, "b n v"], time: Float[Array, "b"], before: Float[Array, "b"],
    hit: Float[Array, "b n"],
) -> Float[Array, "b n v"]:  # fmt: skip
    """Probabilities at later times, from those of two network calls, as if they went on changing evenly; not normalised."""
    far = (hit - time[:, None]) / jnp.minimum(time - before, -1e-12)[:, None]
    return jnp.maximum(odds + far[..., None] * (odds - past), 0)
