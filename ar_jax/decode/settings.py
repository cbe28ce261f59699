"""What a config and `sample.py` say about sampling, and the arrays and modules it comes to."""

import dataclasses
from typing import Any, Literal

import numpy as np

from ar_jax.decode.guidance import interval, linear, ramp
from ar_jax.decode.logits import Filter
from ar_jax.decode.sequential import Knobs
from ar_jax.orders import Order
from ar_jax.tokens import Scale


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is unguided. With the ramp 0 is."""
    guidance_rule: Literal["interval", "ramp", "linear"] = "interval"
    """One weight up to `guidance_last`; or VAR's 1 + t, where t rises to `guidance` over the steps; or MAR's, which rises
    from 1 to `guidance` with the part of the tokens that is known."""
    guidance_last: int = -1
    """Interval: last guided decode step, counted from the step after the first token; -1 guides all."""
    guidance_reach: int = 0
    """Ramp: step at which it has risen to `guidance`; later ones get more. 0 is the last step, or that if it is less."""
    temperature: float = 1.0
    """Divides the logits, 0 is greedy; of continuous tokens, multiplies the noise or the standard deviations."""
    top_k: int = 0
    """Draw from the k most likely codes; 0 is off."""
    top_p: float = 1.0
    """Draw from the most likely codes of this probability mass; 1 is off."""
    banned: tuple[int, ...] = ()
    """Codes that are never drawn."""
    soft: bool = False
    """Mixtures of codes instead of codes, as VAR's more_smooth: smoother pictures, no better figures."""
    scales: tuple[Scale, ...] = ()
    """Scales to draw, coarse to fine, for models that can draw other ones than they were trained on."""
    largest: int = 0
    """Scales with a longer side than this are drawn greedily and, with the ramp, guided in full; 0 is none."""
    known: tuple[int, ...] = ()
    """Scales whose longer side is not among these are drawn greedily; () is none."""
    refine: tuple[tuple[int, ...], ...] = ()
    """Of every scale, numbers of tokens: those that stay as first drawn, then those drawn anew by each further step, for
    models that can (HMAR). Any list serves; those of a scale sum to its tokens."""
    anneal: Literal["", "constant", "linear", "cosine", "two_stage"] = ""
    """Of diffusion and flow models: how the number of inner steps falls from the first decode step to the last (DiSA,
    arXiv:2505.20297), without training; "" is the model's own rule."""
    inner_steps: int = 0
    """Of diffusion and flow models: denoising steps within the first decode step; 0 is the model's own number."""
    last_inner_steps: int = 0
    """With `anneal`: those within the last decode step; 0 is the model's own number."""

    def __post_init__(self):
        if self.guidance_rule not in ("interval", "ramp", "linear"):
            raise ValueError(f"sampling.guidance_rule is {self.guidance_rule!r}; it must be interval, ramp or linear")


def read_settings(own: dict[str, Any]) -> Sampling:
    """Settings from what a model folder keeps of them.

    Raises:
      ValueError: some that this version does not know.
    """
    unknown = own.keys() - {field.name for field in dataclasses.fields(Sampling)}
    if unknown:
        raise ValueError(f"the model's sampling settings have {sorted(unknown)}, which this version does not know")
    return Sampling(**{name: _tuples(value) for name, value in own.items()})


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def arrange(settings: Sampling, generator: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Generator and tokenizer for these settings.

    Raises:
      ValueError: the settings ask for something these models cannot do.
    """
    if settings.scales:
        if not hasattr(tokenizer, "scales"):
            raise ValueError(f"scales is {settings.scales}, but the tokenizer {type(tokenizer).__name__} has none")
        tokenizer = tokenizer.clone(scales=settings.scales)
        generator = generator.on(tokenizer.spec)
    if settings.refine:
        if not hasattr(generator, "refine"):
            raise ValueError(f"refine is {settings.refine}, but {type(generator).__name__} draws every token once")
        generator = generator.clone(refine=settings.refine)
    if settings.anneal or settings.inner_steps or settings.last_inner_steps:
        inner = settings.anneal, settings.inner_steps, settings.last_inner_steps
        if hasattr(generator, "with_steps"):
            generator = generator.with_steps(*inner)
        elif hasattr(generator, "head") and hasattr(generator.head, "with_steps"):
            generator = generator.clone(head=generator.head.with_steps(*inner))
        else:
            raise ValueError(
                f"anneal, inner_steps and last_inner_steps are {inner}, but this {type(generator).__name__} draws without "
                f"inner steps"
            )
    return generator, tokenizer


def make_knobs(settings: Sampling, order: Order, scales: tuple[tuple[int, int], ...]) -> tuple[Knobs, bool]:
    """What each step of an order is drawn with, and whether any of it is guided.

    Args:
      scales: of the tokens, one per step where settings speak of scales.
    Raises:
      ValueError: settings speak of scales, but the steps are none.
    """
    steps = len(order.sizes)
    by_ramp = settings.guidance_rule == "ramp"
    if by_ramp:
        guidance = ramp(settings.guidance, steps, settings.guidance_reach)
    elif settings.guidance_rule == "linear":
        guidance = linear(settings.guidance, order.sizes)
    else:
        guidance = interval(settings.guidance, steps, settings.guidance_last)
    temperature = np.full(steps, settings.temperature, np.float32)
    if settings.largest or settings.known:
        if len(scales) != steps:
            raise ValueError(f"largest and known speak of scales, but {steps} steps draw {len(scales)} scales")
        sides = np.max(scales, axis=1)
        large = sides > (settings.largest or sides.max())
        guidance = np.where(large & by_ramp, np.float32(1 + settings.guidance), guidance)
        unknown = ~np.isin(sides, settings.known) if settings.known else np.zeros(steps, bool)
        temperature = np.where(large | unknown, np.float32(0), temperature)
    soften = np.arange(steps, dtype=np.float32) / max(steps - 1, 1) if settings.soft else None
    logits_fn = Filter(settings.top_k, settings.top_p, settings.banned)
    return Knobs(guidance, temperature, logits_fn, soften), bool((guidance != 1).any())
