"""Classifier-free guidance: the weight of the condition in every step."""

import numpy as np


def interval(scale: float, steps: int, last: int = -1) -> np.ndarray:
    """Guidance weight of every step, float32 [steps]: `scale` up to decode step `last`, 1 afterwards.

    Decode steps are counted as LlamaGen does: 0 is the step after the first token, and the first token is always
    guided. -1 guides every step.
    """
    weight = np.full(steps, scale, np.float32)
    if last > -1:
        weight[last + 2 :] = 1
    return weight


def ramp(scale: float, steps: int, reach: int = 0) -> np.ndarray:
    """Guidance weight of every step, float32 [steps], as VAR counts: 1 + t with (1 + t) cond - t uncond.

    t rises from 0 at step 0 to `scale` at step `reach` and on beyond it; steps-1 if that comes first, or `reach` is 0.
    """
    full = max(min(reach or steps, steps - 1), 1)
    return (1 + scale * np.arange(steps) / full).astype(np.float32)


def linear(scale: float, sizes: tuple[int, ...]) -> np.ndarray:
    """Guidance weight of every step, float32 [steps]: rises from 1 to `scale` with the part of tokens known after it.

    The last step counts one token as unknown, as in MAR (arXiv:2406.11838).
    """
    known = np.cumsum(sizes)
    known[-1] -= 1
    return (1 + (scale - 1) * known / (known[-1] + 1)).astype(np.float32)
