"""Classifier-free guidance: rules that give the weight of the condition in every step.

A rule is called with an order and the tokens and returns float32 [steps]; 1 is unguided. What the weight does is up to the
head (`nets.conditioning.fold`).
"""

import dataclasses
from typing import Literal

import numpy as np

from ar_jax.orders import Order
from ar_jax.tokens import TokenSpec, by_side
from ar_jax.typing import Share, finite


@dataclasses.dataclass(frozen=True)
class Interval:
    """One weight for all steps, or for the first of them.

    Source: LlamaGen (arXiv:2406.06525).
    """

    weight: float = 1.0
    """Of the condition; 1 is unguided."""
    last: int = -1
    """Last guided decode step, counted from the step after the first token, which is always guided; -1 guides all."""

    def __post_init__(self):
        finite("guidance.weight", self.weight)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        weight = np.full(len(order.sizes), self.weight, np.float32)
        if self.last > -1:
            weight[self.last + 2 :] = 1
        return weight


@dataclasses.dataclass(frozen=True)
class BySubCode:
    """One weight for all steps, but for each sub-code of a token its own; float32 [steps k].

    Source: Open-MAGVIT2 (arXiv:2409.04410).
    """

    weight: float = 1.0
    """Of the condition, for the first sub-code; 1 is unguided."""
    others: tuple[float, ...] = ()
    """For the sub-codes after it; () is the same for all."""

    def __post_init__(self):
        for weight in (self.weight, *self.others):
            finite("guidance.weight", weight)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        return by_sub_code("guidance", (self.weight, *self.others), order, spec)


def by_sub_code(name: str, values: tuple[float, ...], order: Order, spec: TokenSpec) -> np.ndarray:
    """A number for every step and sub-code, float32 [steps k]; of a single one [steps]."""
    if len(values) == 1:
        return np.full(len(order.sizes), values[0], np.float32)
    if len(values) != len(spec.codes):
        raise ValueError(
            f"{name}.others is {values[1:]}, but tokens have {len(spec.codes)} sub-codes; give {len(spec.codes) - 1} numbers"
        )
    return np.tile(np.float32(values), (len(order.sizes), 1))


@dataclasses.dataclass(frozen=True)
class Ramp:
    """1 + t, for (1 + t) cond - t uncond: t rises over the steps.

    Source: VAR (arXiv:2404.02905), FlexVAR (arXiv:2502.20313).
    """

    weight: float = 0.0
    """Where t rises to, from 0 in the first step; 0 is unguided."""
    reach: int = 0
    """Step at which it gets there; later ones get more. 0 is the last step, or that if it is less."""
    largest: int = 0
    """Scales with a longer side than this get t = `weight`; 0 is none."""

    def __post_init__(self):
        finite("guidance.weight", self.weight)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        steps = len(order.sizes)
        full = max(min(self.reach or steps, steps - 1), 1)
        weight = (1 + self.weight * np.arange(steps) / full).astype(np.float32)
        if self.largest:
            weight = np.where(by_side(order, spec) > self.largest, np.float32(1 + self.weight), weight)
        return weight


PLANS = {  # of a share r of the steps, that of a step itself counted
    "linear": lambda r: r,
    "cos": lambda r: np.sin(np.pi / 2 * r),
    "log": lambda r: np.log1p(r * (np.e - 1)),
    "square": np.square,
    "square_root": lambda r: np.sqrt(r - r[0]),  # from here on it is not counted
    "lagging": lambda r: r - r[0],
    "half_linear": lambda r: np.minimum(2 * (r - r[0]), 1),
}


@dataclasses.dataclass(frozen=True)
class Rising:
    """1 + (weight - 1) f(r) in step t of N, r = (t + 1) / N, whatever each reveals: f rises from about 0 to 1.

    Source: ELM (arXiv:2410.16257); "lagging" is TiTok's (arXiv:2406.07550), "half_linear" Token-Shuffle's (arXiv:2504.17789).
    """

    weight: float = 1.0
    """Of the condition in the end; 1 is unguided."""
    plan: Literal["linear", "cos", "log", "square", "square_root", "lagging", "half_linear"] = "linear"
    """f: r, sin(pi r / 2), log(1 + r (e - 1)), r^2, the root of t / N, t / N, or 2 t / N and 1 in the second half."""

    def __post_init__(self):
        finite("guidance.weight", self.weight)
        if self.plan not in PLANS:
            raise ValueError(f"guidance.plan is {self.plan!r}; it must be one of {', '.join(PLANS)}")

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        steps = len(order.sizes)
        share = np.arange(1, steps + 1) / steps
        return (1 + (self.weight - 1) * PLANS[self.plan](share)).astype(np.float32)


STAGES = {  # parts of what the weight is above 1, by the rule and the share r of the steps that came before
    "step": lambda rule, r: r >= rule.start,
    "linear": lambda rule, r: r,
    "reversed": lambda rule, r: 1 - r,
    "triangle": lambda rule, r: np.minimum(r / max(rule.peak, 1e-9), (1 - r) / max(1 - rule.peak, 1e-9)),
    "window": lambda rule, r: (r >= rule.start) & (r <= rule.end),
}


@dataclasses.dataclass(frozen=True)
class Staged:
    """A weight that depends on the share of the steps that came before: the first step gets `weight`, step i of N the part
    of it that the plan has at i / (N - 1). It is never quite 1: where there is no guidance it is 1.0001, as published.

    Source: GigaTok (arXiv:2504.08736).
    """

    weight: float = 1.0
    """Of the condition where it is largest; 1 is unguided."""
    plan: Literal["step", "linear", "reversed", "triangle", "window"] = "step"
    """All of it from `start` on; rising to it; falling from it; both, with `peak` between; all of it from `start` to `end`."""
    start: Share = 0.18
    end: Share = 0.95
    peak: Share = 0.5

    def __post_init__(self):
        finite("guidance.weight", self.weight)
        if self.plan not in STAGES:
            raise ValueError(f"guidance.plan is {self.plan!r}; it must be one of {', '.join(STAGES)}")

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        steps = len(order.sizes)
        weight = self.at(np.arange(steps) / max(steps - 1, 1))
        weight[0] = self.weight
        return weight

    def at(self, share: np.ndarray) -> np.ndarray:
        """The weight where a share of the steps came before, float32; exactly 1 if the rule guides nowhere."""
        if self.weight == 1:
            return np.ones(len(share), np.float32)
        part = np.asarray(STAGES[self.plan](self, share), np.float64)
        flat = self.plan in ("step", "window")
        weight = np.where(part > 0, self.weight, 1.0001) if flat else 1.0001 + (self.weight - 1) * part
        return weight.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Rises from 1 to `weight` with the part of the tokens that is known after a step; the last counts one as unknown.

    Source: MAR (arXiv:2406.11838).
    """

    weight: float = 1.0
    """Of the condition in the end; 1 is unguided."""

    def __post_init__(self):
        finite("guidance.weight", self.weight)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        known = np.cumsum(order.sizes)
        known[-1] -= 1
        return (1 + (self.weight - 1) * known / (known[-1] + 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Between:
    """Rises evenly from a first to a last weight; steps with weights below 1 are unguided.

    Source: D-AR (arXiv:2505.23660).
    """

    first: float = 1.0
    """Of the condition in the first step."""
    weight: float = 1.0
    """In the last one; 1 is unguided."""

    def __post_init__(self):
        for name in ("first", "weight"):
            finite(f"guidance.{name}", getattr(self, name))

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        first = 1.001 if self.first == 1 < self.weight else self.first
        return np.maximum(np.linspace(first, self.weight, len(order.sizes)), 1).astype(np.float32)
