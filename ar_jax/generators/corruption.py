"""How discrete diffusion spoils codes over time, and what an earlier time looked like: functions of log-probabilities.

A token is in one of v states: the codes, and where a process hides tokens, "hidden" after them. Log-probabilities are float32
[b n v]; times are 0 (nearly clean) to `times` - 1, and time -1 is the image itself. What is impossible has probability
`NONE`, not 0.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ar_jax.typing import Array, Float, Int, Steps, Within

NONE = 1e-30
FLOOR = -70.0  # of what is predicted

Odds = Annotated[float, Within(0, 1)]


@struct.dataclass
class Rates:
    """Logarithms of what happens to a token between two times, float32 [*b].

    Attributes:
      keep: it stays a code and is not drawn anew.
      replace: it is drawn anew, of each code.
      hide: it becomes hidden.
      show: it does not.
    """

    keep: Array
    replace: Array
    hide: Array
    show: Array


@struct.dataclass
class Jump:
    """Rates for going back from a time to an earlier one, [*b]: of all that was before the later time, of what lies between
    them, and of all that was before the earlier one."""

    late: Rates
    between: Rates
    early: Rates

    def take(self, i: Any) -> "Jump":
        """Some of several jumps, as wide as log-probabilities: of a number, or of one for each image."""
        return jax.tree.map(lambda x: jnp.asarray(x)[i][..., None, None], self)


@dataclasses.dataclass(frozen=True)
class Process:
    """What processes share. A process says with `left` what is left of an image at its times."""

    times: Steps = 100

    hides = True  # whether there is a state "hidden"

    def left(self) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities that a token is as it was, not drawn anew, and that it is hidden, at every time; float64 [times]."""
        raise NotImplementedError

    def states(self, codes: int) -> int:
        return codes + self.hides

    def start(self, codes: int) -> int:
        """What stands for a token before the first step of sampling: "hidden", or -1 for one that is to be drawn."""
        return codes if self.hides else -1

    def rates(self, codes: int, late: Any, early: Any = -1) -> Rates:
        """Between two times, int [*b]; computed in float64, since replacing may be as rare as 1e-6."""
        keep, hide = (np.append(part, clean) for part, clean in zip(self.left(), (1.0, 0.0)))
        return rates(keep[late] / keep[early], 1 - (1 - hide[late]) / (1 - hide[early]), codes)

    def jump(self, codes: int, late: Any, early: Any) -> Jump:
        """From times back to earlier ones, int [*b]."""
        return Jump(self.rates(codes, late), self.rates(codes, late, early), self.rates(codes, early))

    def posterior(self, clean: Float[Array, "b n v"], noisy: Int[Array, "b n"], jump: Jump) -> Float[Array, "b n v"]:
        """Log-probabilities of the earlier time, given those of time -1 and the states of the later one: for every clean code
        by Bayes' rule, and of these the mixture."""
        return mixture(clean, noisy, jump, self.hides)

    def prior(self, clean: Float[Array, "b n v"]) -> Float[Array, "b n"]:
        """By how much the last time differs from where sampling begins, in nats."""
        return jnp.zeros(clean.shape[:2])


@dataclasses.dataclass(frozen=True)
class MaskAndReplace(Process):
    """A token stays, or is replaced by any code, or is hidden for good; both parts change evenly with time.

    Attributes:
      keep, hide: the part that is as it was, and that is hidden, at the first and at the last time.
    Source: VQ-Diffusion (arXiv:2111.14822).
    """

    keep: tuple[Odds, Odds] = (0.99999, 0.000009)
    hide: tuple[Odds, Odds] = (0.000009, 0.99999)

    def __post_init__(self):
        for end, kept, hidden in zip(("first", "last"), self.keep, self.hide):
            if not 0 < kept <= 1 - hidden <= 1 or hidden == 1:
                raise ValueError(
                    f"process.keep and process.hide are {kept} and {hidden} at the {end} time; they must be above 0 and 0 or "
                    f"more, and at most 1 together"
                )

    def left(self) -> tuple[np.ndarray, np.ndarray]:
        return np.linspace(*self.keep, self.times), np.linspace(*self.hide, self.times)


@dataclasses.dataclass(frozen=True)
class Hide(Process):
    """A token is hidden for good, and nothing else happens: with probability t, or a function of it, t = (i + 1) / times.

    Attributes:
      curve: the function: t, 1 - cos(pi t / 2), t^2, the root of t, or log(1 + t) / log 2.
    Source: masked diffusion, as in arXiv:2409.02908.
    """

    curve: Literal["linear", "cos", "square", "root", "log"] = "linear"

    def left(self) -> tuple[np.ndarray, np.ndarray]:
        # of the last time nothing would be left, and to go back from a code that was given would be 0 / 0
        hidden = np.minimum(hidden_part(np.arange(1, self.times + 1) / self.times, self.curve), 1 - 1e-6)
        return 1 - hidden, hidden

    def posterior(self, clean: Float[Array, "b n v"], noisy: Int[Array, "b n"], jump: Jump) -> Float[Array, "b n v"]:
        """What is not hidden is as it was."""
        back = jump.between.hide + jump.early.show - jump.late.hide  # that it was hidden between the times
        before = jnp.broadcast_to(jump.early.hide - jump.late.hide, (*noisy.shape, 1))
        shown = jnp.concatenate([clean[..., :-1] + back, before], axis=-1)
        hidden = (noisy == clean.shape[-1] - 1)[..., None]
        return jnp.maximum(jnp.where(hidden, shown, one_hot(noisy, clean.shape[-1])), FLOOR)


@dataclasses.dataclass(frozen=True)
class Uniform(Process):
    """A token stays or is replaced by any code: of t = 0..1 about cos^2(pi t / 2) is squared what is left.

    Attributes:
      offset: of t, so that the first times change little.
    Source: multinomial diffusion (arXiv:2102.05379), as in VQ-DDM (arXiv:2112.01799).
    """

    times: Steps = 4000
    offset: Annotated[float, Within(0, 1)] = 0.008

    hides = False

    def left(self) -> tuple[np.ndarray, np.ndarray]:
        t = np.arange(self.times + 1) / self.times
        squares = np.cos((t + self.offset) / (1 + self.offset) * np.pi / 2) ** 2
        return np.cumprod(np.sqrt(np.clip(squares[1:] / squares[:-1], 0.001, 1))), np.zeros(self.times)

    def posterior(self, clean: Float[Array, "b n v"], noisy: Int[Array, "b n"], jump: Jump) -> Float[Array, "b n v"]:
        """As if the probabilities of time -1 were those of one spoilt token: no mixture, as published."""
        early = spread(clean, jump.early, hides=False)
        return jax.nn.log_softmax(early + spread(one_hot(noisy, clean.shape[-1]), jump.between, hides=False))

    def prior(self, clean: Float[Array, "b n v"]) -> Float[Array, "b n"]:
        codes = clean.shape[-1]
        last = spread(clean, self.rates(codes, self.times - 1), hides=False)
        return (jnp.exp(last) * (last + np.log(codes))).sum(-1)


def hidden_part(t: Any, curve: str = "linear") -> Any:
    """The part of the tokens that is hidden at times in [0, 1] (see `Hide`)."""
    curves = {
        "linear": lambda t: t,
        "cos": lambda t: 1 - np.cos(np.pi / 2 * t),
        "square": np.square,
        "root": np.sqrt,
        "log": lambda t: np.log1p(t) / np.log(2),
    }
    return curves[curve](np.asarray(t, np.float64))


def rates(keep: Any, hide: Any, codes: int) -> Rates:
    """From probabilities that a token is kept and hidden, float64 [*b]; the rest is replaced by one of the codes."""
    keep, hide = np.asarray(keep, np.float64), np.asarray(hide, np.float64)
    replace = np.maximum(1 - keep - hide, 0) / codes
    with np.errstate(divide="ignore"):
        return Rates(*(np.log(part).astype(np.float32) for part in (keep, replace, hide, 1 - hide)))


def one_hot(states: Int[Array, "b n"], count: int) -> Float[Array, "b n v"]:
    """Log-probabilities of states that are known."""
    return jnp.where(states[..., None] == jnp.arange(count), 0.0, np.float32(np.log(NONE)))


def spread(log_p: Float[Array, "b n v"], rates: Rates, hides: bool = True) -> Float[Array, "b n v"]:
    """Log-probabilities after what happens at these rates to tokens that are not hidden yet."""
    codes = jnp.logaddexp(log_p[..., : log_p.shape[-1] - hides] + rates.keep, rates.replace)
    if not hides:
        return codes
    return jnp.concatenate([codes, jnp.logaddexp(log_p[..., -1:] + rates.show, rates.hide)], axis=-1)


def mixture(
    clean: Float[Array, "b n v"], noisy: Int[Array, "b n"], jump: Jump, hides: bool = True
) -> Float[Array, "b n v"]:
    """Log-probabilities of an earlier time by Bayes' rule, mixed over the clean codes; `clean` need not sum to one."""
    states, known = clean.shape[-1], one_hot(noisy, clean.shape[-1])
    chance, step = spread(known, jump.late, hides), spread(known, jump.between, hides)  # symmetric between codes
    if hides:
        is_hidden, none = (noisy == states - 1)[..., None], np.float32(np.log(NONE))
        last = jnp.arange(states) == states - 1
        chance = jnp.where(is_hidden, jump.late.hide, chance)
        step = jnp.where(is_hidden, jnp.where(last, 0.0, jump.between.hide), jnp.where(last, none, step))
        weighed = jnp.where(last, none, clean - chance)
    else:
        weighed = clean - chance
    total = jax.nn.logsumexp(weighed, axis=-1, keepdims=True)
    return jnp.clip(spread(weighed - total, jump.early, hides) + step + total, FLOOR, 0.0)
