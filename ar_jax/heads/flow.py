"""The flow head: every continuous token follows a learned velocity from noise to data, given its hidden row."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.heads.diffusion import RULES, TRAINED, continuous
from ar_jax.heads.integrate import Anneal, Solver, calls, integrate, normal, pure, schedule
from ar_jax.machine import shares
from ar_jax.machine.sharding import Rules
from ar_jax.nets.conditioning import fold, widen
from ar_jax.nets.mlp import ModulatedMLP
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Key, Layers, PRNGKey, Share, Steps, typed


def uniform(steps: int) -> np.ndarray:
    """Times of so many equal steps from noise (1) to data (0), float64 [steps + 1]."""
    return np.linspace(1, 0, steps + 1)


@dataclasses.dataclass(frozen=True)
class Times:
    """A given list of times, falling from 1 to 0, as a grid; the number of steps asked for does not change it."""

    times: tuple[float, ...]

    def __call__(self, steps: int) -> np.ndarray:
        return np.asarray(self.times)


def draw_times(key: PRNGKey, shape: tuple[int, ...], rule: str) -> Array:
    """Times for training, "uniform" or "logit_normal" (the sigmoid of a unit normal number)."""
    if rule == "uniform":
        return shares.draw(jax.random.uniform, key, shape)
    return jax.nn.sigmoid(shares.draw(jax.random.normal, key, shape))


class Flow(nn.Module):
    """Rectified flow between unit noise (t = 1) and data (t = 0), on straight lines.

    Attributes:
      width, depth: of the network, that of `Diffusion`.
      channels: of a token; 0 until the tokenizer is known (`complete`).
      multiplier: times drawn for every token in training.
      times: how they are drawn (see `draw_times`).
      steps: number of steps in sampling.
      grid: number of steps -> their times, falling from 1 to 0.
      solver: see `integrate`.
      guided_until: guidance works at times up to this one.
      anneal, last_steps: with a rule other than "constant", the number of steps goes from `steps` in the first decode
        step to `last_steps` in the last (see `annealed`).
      dtype: of the matrix products; the token on its way is float32.
      remat: see `ModulatedMLP`.
    Source: Flow matching (arXiv:2210.02747), rectified flow (arXiv:2209.03003).
    """

    width: int = 1024
    depth: Layers = 6
    channels: int = 0
    multiplier: int = 4
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    steps: Steps = 25
    grid: Callable = uniform
    solver: Solver = "euler"
    guided_until: Share = 1.0
    anneal: Anneal = "constant"
    last_steps: Steps = 15
    dtype: Any = jnp.float32
    remat: Literal["none", "full"] = "none"

    adjustable = ("steps", "grid", "solver", "guided_until", "anneal", "last_steps")

    def complete(self, spec: TokenSpec) -> "Flow":
        return self.clone(channels=continuous(spec, "Flow"))

    @nn.nowrap
    def calls(self, decode_steps: int) -> np.ndarray:
        """Calls of the network in every decode step, int [steps]."""
        return calls(self.grid, self.anneal, self.steps, self.last_steps, decode_steps, self.solver)

    def setup(self):
        if self.times not in ("uniform", "logit_normal"):
            raise ValueError(f"head.times is {self.times!r}; it must be uniform or logit_normal")
        self.net = ModulatedMLP(self.width, self.depth, self.channels, self.dtype, self.remat)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return RULES

    @typed
    def loss(self, h: Float[Array, "b m d"], target: Float[Array, "b m c"], *, key: PRNGKey) -> Float[Array, "b m"]:
        """Squared error of the velocity, mean over channels and `multiplier` times."""
        t_key, noise_key = jax.random.split(key)
        t = draw_times(t_key, (len(h), self.multiplier, h.shape[1]), self.times)
        noise = shares.draw(jax.random.normal, noise_key, (*t.shape, target.shape[-1]))
        return self.errors(h, target, t, noise).mean(1)

    @typed
    def errors(
        self, h: Float[Array, "b m d"], target: Float[Array, "b m c"], t: Float[Array, "b r m"], noise: Float[Array, "b r m c"]
    ) -> Float[Array, "b r m"]:  # fmt: skip
        """Squared error of the velocity at given times and noise, mean over channels."""
        x0, at = target[:, None].astype(jnp.float32), t[..., None]
        found = self.net((1 - at) * x0 + at * noise, TRAINED * t, h[:, None])
        return jnp.square(noise - x0 - found).mean(-1)

    @typed
    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs: Any, i: Index, tokenizer: Any = None
    ) -> Float[Array, "b m c"]:
        """Moves a token per row from noise to data; guided rows (B = b * ways) share it and are folded in every step.

        Guidance changes the velocity, the temperature multiplies all noise.
        """
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        field, ways = self.field(h, i), h.shape[0] // keys.shape[0]

        def velocity(x, t):
            return fold(field(widen(x, ways), t), ways, jnp.where(t <= self.guided_until, guidance, 1.0))

        decode_steps = len(knobs.guidance)
        times, steps = schedule(self.grid, self.anneal, self.steps, self.last_steps, decode_steps, i)
        return integrate(
            velocity,
            temperature * self.noise(keys, 0),
            times,
            solver=self.solver,
            noise=lambda s: temperature * self.noise(keys, s + 1),
            steps=steps,
        )

    def field(self, h: Float[Array, "B m d"], i: Index) -> Callable[[Array, Float[Array, ""]], Array]:
        """The velocity of tokens [B m c] at a time, given the hidden rows of step `i`; for loops of JAX."""
        network = pure(self.net)
        return lambda x, t: network(x, jnp.full(h.shape[:2], TRAINED * t), h)

    def noise(self, keys: Key[Array, "b m"], s: Index) -> Float[Array, "b m c"]:
        """Where a token starts (s = 0), and the noise of step s-1 of the stochastic solver."""
        return normal(keys, s, self.channels)
