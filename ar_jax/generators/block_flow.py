"""Flow generators: a transformer that is itself the velocity of tokens, group by group, given the groups before."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.data import Info
from ar_jax.generators.base import Conditioning, Frozen, Generator, Setting, State, Step, image_weight
from ar_jax.generators.inputs import some
from ar_jax.heads.diffusion import TRAINED, continuous
from ar_jax.heads.flow import draw_times
from ar_jax.heads.integrate import Anneal, Solver, calls, integrate, normal, schedule
from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Cond, fold, widen
from ar_jax.nets.gated import Condition, EncoderDecoder
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import TimeEmbedding, xavier
from ar_jax.nets.transformer import Cache
from ar_jax.orders import Order, to_ranks
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Key, Metrics, PRNGKey, Share, Steps, typed


@dataclasses.dataclass(frozen=True)
class Until:
    """Times from 1 to `last` in equal steps, and one step more to 0."""

    last: Share = 0.04

    def __call__(self, steps: int) -> np.ndarray:
        return np.append(np.linspace(1, self.last, steps), 0.0)


class BlockFlow(Generator):
    """Rectified flow of groups of tokens, one group after the other; the order says what a group is.

    `orders.Cells` makes squares of neighbours, `Cells(1)` single tokens, `Interleaved` tokens at equal distances, `scales`
    those of a pyramid's level, `whole` all. In training every group of an image has a time of its own, so later groups see
    earlier ones through noise ("noisy context learning"); in sampling they see them clean.

    Attributes:
      backbone: the network.
      conditioning: makes a vector from a batch (`Label`), as wide as the backbone.
      times: how they are drawn in training (see `heads.flow.draw_times`).
      steps: network calls for a group in sampling.
      grid: number of steps -> their times, falling from 1 to 0.
      solver: see `integrate`; the published ones are "stochastic" with `Until`, and "euler" with `heads.flow.uniform`.
      guided_until: guidance works at times up to this one.
      anneal, last_steps: with a rule other than "constant", the number of steps goes from `steps` for the first group to
        `last_steps` for the last (see `annealed`).
      dtype: of the matrix products at both ends; the backbone has its own.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: xAR (arXiv:2502.20388); annealing: DiSA (arXiv:2505.20297).
    """

    backbone: EncoderDecoder
    conditioning: Conditioning
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    steps: Steps = 50
    grid: Callable = Until()
    solver: Solver = "stochastic"
    guided_until: Share = 1.0
    anneal: Anneal = "constant"
    last_steps: Steps = 15
    dtype: Any = jnp.float32
    spec: TokenSpec | None = None

    adjustable = ("steps", "grid", "solver", "guided_until", "anneal", "last_steps")

    def complete(self, spec: TokenSpec, info: Info) -> "BlockFlow":
        if self.times not in ("uniform", "logit_normal"):
            raise ValueError(f"generator.times is {self.times!r}; it must be uniform or logit_normal")
        continuous(spec, "BlockFlow")
        return super().complete(spec, info)

    def setup(self):
        self.input = Linear(self.backbone.width, self.dtype, kernel_init=xavier, bias=True)
        self.time = TimeEmbedding(self.backbone.width, self.dtype, xavier)
        self.output = Linear(self.spec.channels, self.dtype, jnp.float32, xavier, bias=True)

    @typed
    def loss(
        self,
        tokens: Float[Array, "b n c"],
        batch: Batch,
        order: Order,
        *,
        drop: Bool[Array, "b"],
        key: PRNGKey,
        tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:
        """Error of the velocity of all groups at once, each at a time of its own.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: its steps are the groups.
          drop: images trained without their condition.
          key: for times and noise.
          tokenizer: unused.

        Returns:
          Squared error of every rank, mean over channels; its weight; and metrics.
        """
        t_key, noise_key = jax.random.split(key)
        t = draw_times(t_key, (len(tokens), len(order.sizes)), self.times)
        x0 = to_ranks(tokens, order).astype(jnp.float32)
        noise = shares.draw(jax.random.normal, noise_key, x0.shape)
        loss = self.errors(x0, self.condition(batch, drop), order, t, noise)
        return loss, jnp.broadcast_to(image_weight(batch, len(tokens))[:, None], loss.shape), {}

    def errors(
        self, x0: Float[Array, "b n c"], cond: Cond, order: Order, t: Float[Array, "b s"], noise: Float[Array, "b n c"]
    ) -> Float[Array, "b n"]:
        """Squared error of the velocity of tokens in rank order at given times and noise, mean over channels."""
        at = Condition(t, order.sizes).spread(t[..., None])
        found, _ = self.velocity((1 - at) * x0 + at * noise, t, cond, order, 0)
        return jnp.square(noise - x0 - found).mean(-1)

    @typed
    def velocity(
        self,
        x: Float[Array, "B m c"],
        t: Float[Array, "#B s"],
        cond: Cond,
        order: Order,
        first: Index,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B m c"], Cache | None]:
        """Velocities of ranks first..first+m, float32.

        Args:
          x: noisy tokens.
          t: time in [0, 1] of every group; what is beyond the third digit does not count. Without a cache those of all
            groups, with one that of the only group.
          cond: of the B rows.
          order: what each rank is.
          cache: with keys and values of all ranks before.
        """
        m, sizes = x.shape[1], order.sizes if cache is None else ()
        step = some(order.step, first, m, 0)
        slot = some(jnp.asarray(order.slot), first, m)
        coords = jnp.asarray(self.spec.coords)[widen(slot, len(x) // len(slot) if len(slot) > 1 else 1)]
        time = self.time(jnp.floor(TRAINED * t)).astype(jnp.float32)
        mod = Condition(cond.mod.vector + time, sizes)
        keys = None if cache is None else order.step[: cache.rows]
        rows = Rows(step, coords, first, keys)
        h, cache = self.backbone(constrain(self.input(x), BATCH), rows, mod=mod, cache=cache)
        return self.output(h), cache

    def begin(self, setting: Setting, images: int) -> State:
        return State(self.spec.zeros(images), self.backbone.empty_cache(len(setting.cond.rows), setting.kept))

    def grow(self, state: State, ranks: int, setting: Setting) -> State:
        return state.replace(cache=state.cache.grow(ranks))

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Moves the ranks of a step from noise to data, then writes them into the cache, clean.

        Guided rows share a token and are folded in every call; the temperature multiplies all noise.
        """
        guidance, temperature = (jnp.asarray(x)[now.i] for x in (setting.knobs.guidance, setting.knobs.temperature))
        cond, order, keys = setting.cond, setting.order, now.keys
        ways, steps = len(cond.rows) // len(keys), len(order.sizes)
        module, variables = self.unbind()  # loops of JAX take pure functions

        def network(x, t):
            t = jnp.full((1, 1), t, jnp.float32)
            return module.apply(variables, widen(x, ways), t, cond, order, now.first, state.cache, method="velocity")

        def velocity(x, t):
            return fold(network(x, t)[0], ways, jnp.where(t <= self.guided_until, guidance, 1.0))

        times, count = schedule(self.grid, self.anneal, self.steps, self.last_steps, steps, now.i)
        x = integrate(
            velocity,
            temperature * self.noise(keys, 0),
            times,
            solver=self.solver,
            noise=lambda s: temperature * self.noise(keys, s + 1),
            steps=count,
        )
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, x, now.first, axis=1)
        # nobody looks back at the last group
        cache = lax.cond(now.i < steps - 1, lambda: network(x, 0.0)[1], lambda: state.cache)
        return State(tokens, cache)

    @nn.nowrap
    def calls(self, order: Order) -> dict[str, np.ndarray]:
        count = calls(self.grid, self.anneal, self.steps, self.last_steps, len(order.sizes), self.solver)
        count[:-1] += 1  # of the clean group, into the cache
        return {"generator": count}

    def noise(self, keys: Key[Array, "b m"], s: Index) -> Float[Array, "b m c"]:
        """Where tokens start (s = 0), and the noise of step s-1 of the stochastic solver."""
        return normal(keys, s, self.spec.channels)
