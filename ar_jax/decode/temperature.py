"""Temperatures: rules that say how freely every step draws.

A rule is called with an order and the tokens and returns float32 [steps]. It divides the logits, 0 is greedy; of
continuous tokens it multiplies the noise or the standard deviations.
"""

import dataclasses

import numpy as np

from ar_jax.decode.guidance import by_sub_code
from ar_jax.orders import Order
from ar_jax.tokens import TokenSpec, by_side
from ar_jax.typing import finite


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same in all steps."""

    value: float = 1.0
    """Divides the logits, 0 is greedy; of continuous tokens, multiplies the noise or the standard deviations."""

    def __post_init__(self):
        finite("temperature.value", self.value, least=0)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        return np.full(len(order.sizes), self.value, np.float32)


@dataclasses.dataclass(frozen=True)
class Fading(Constant):
    """Falls to 0: value (1 - r) after step t of N, r = (t + 1) / N; the last step is greedy.

    Source: MaskGIT (arXiv:2202.04200), as in TiTok (arXiv:2406.07550).
    """

    eased: bool = False
    """Times 0.5 + 0.8 (1 - r) as well: so the generators of TiTok divide their logits beside."""

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        steps = len(order.sizes)
        left = 1 - np.arange(1, steps + 1) / steps
        return (self.value * left * (0.5 + 0.8 * left if self.eased else 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class BySubCode(Constant):
    """The same in all steps, but for each sub-code of a token its own; float32 [steps k].

    Source: Open-MAGVIT2 (arXiv:2409.04410).
    """

    others: tuple[float, ...] = ()
    """`value` is of the first sub-code, these of those after it; () is the same for all."""

    def __post_init__(self):
        for value in (self.value, *self.others):
            finite("temperature.value", value, least=0)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        return by_sub_code("temperature", (self.value, *self.others), order, spec)


@dataclasses.dataclass(frozen=True)
class KnownScales(Constant):
    """The same in all steps that draw scales the model was trained on; others are greedy.

    Source: FlexVAR (arXiv:2502.20313).
    """

    largest: int = 0
    """Scales with a longer side than this are drawn greedily; 0 is none."""
    known: tuple[int, ...] = ()
    """Scales whose longer side is not among these are drawn greedily; () is none."""

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        sides, value = by_side(order, spec), super().__call__(order, spec)
        greedy = sides > (self.largest or sides.max())
        if self.known:
            greedy |= ~np.isin(sides, self.known)
        return np.where(greedy, np.float32(0), value)


@dataclasses.dataclass(frozen=True)
class Sharper(Constant):
    """What logits are multiplied with, 1 / temperature, changes evenly from the first step to the last.

    Source: Halton-MaskGIT (ICLR 2025), which calls that the temperature.
    """

    last: float = 1.0
    """Divides the logits of the last step, as `value` those of the first."""
    warm: int = 0
    """So many first steps have twice their temperature."""

    def __post_init__(self):
        for name in ("value", "last"):
            finite(f"temperature.{name}", getattr(self, name), least=1e-6)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        factor = np.linspace(1 / self.value, 1 / self.last, len(order.sizes))
        factor[: self.warm] /= 2
        return (1 / factor).astype(np.float32)
