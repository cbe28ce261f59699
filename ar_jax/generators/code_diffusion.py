"""Discrete diffusion: all codes of an image at once, from hidden or random ones, over many steps."""

from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.base import Conditioning, Frozen, Generator, Setting, State, Step, image_weight
from ar_jax.generators.corruption import FLOOR, MaskAndReplace, Process, one_hot, spread
from ar_jax.heads.categorical import gumbel
from ar_jax.machine import shares
from ar_jax.nets.conditioning import fold, widen
from ar_jax.orders import Order
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Having, Index, Int, Metrics, Params, PRNGKey, Within, typed

Weight = Annotated[float, Within(0, 1e6)]


class Plan(NamedTuple):
    """What every step of sampling does, int [steps] each.

    Attributes:
      time: that the network is told.
      late, early: the times between which tokens go back; -1 is the image.
      reveal: how many hidden codes are drawn, where their number is fixed beforehand (`CodeDiffusion.reveal`).
    """

    time: np.ndarray
    late: np.ndarray
    early: np.ndarray
    reveal: np.ndarray


class CodeDiffusion(Generator):
    """The clean codes are predicted, for all tokens at once, from codes that a process has spoilt.

    Sampling goes from the last time to the image through as many times as the order has steps (`Denoised`). In every step the
    tokens of an earlier time are drawn, given those now and the predicted clean codes.

    Attributes:
      backbone: codes [B n], times [B] and a condition -> logits of the clean codes, float32 [B n v] (`CodeTransformer`,
        `CodeUNet`).
      conditioning: makes a condition from a batch (`Classes`, `Features`, `Nothing`; `Label` for a `CodeUNet`).
      process: how codes are spoilt (`MaskAndReplace`, `Hide`, `Uniform`).
      aux: weight of the cross entropy of the clean codes, beside that of the time before; it counts twice at the first
        time, once at the last.
      hidden_weight, shown_weight: of tokens that are hidden and that are not, in training.
      reveal: how many hidden codes become known in a step is up to the process ("drawn"), or the same in all steps: any of
        them ("evenly"), or rather those that are sure ("purity"). Then the last step alone goes by the process.
      sharpen: with "purity", codes are drawn the more sharply the surer they are, up to (1 + sharpen) times their logits.
      stride: where steps skip times, "exact" goes back over all of them; "published" only over the last, as released code
        does, so that most codes are drawn in the end.
      weigh_times: training draws times the more often, the larger their parts of the bound are (`importance`).
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: VQ-Diffusion (arXiv:2111.14822), "purity" is of its improved form (arXiv:2205.16007); VQ-DDM (arXiv:2112.01799).
    """

    backbone: Annotated[nn.Module, Having("predict")]
    conditioning: Conditioning
    process: Process = MaskAndReplace()
    aux: Weight = 0.0
    hidden_weight: Weight = 1.0
    shown_weight: Weight = 1.0
    reveal: Literal["drawn", "evenly", "purity"] = "drawn"
    sharpen: Weight = 0.0
    stride: Literal["exact", "published"] = "exact"
    weigh_times: bool = False
    spec: TokenSpec | None = None

    adjustable = ("reveal", "sharpen", "stride")

    def on(self, spec: TokenSpec) -> "CodeDiffusion":
        if len(spec.codes) != 1 or len(spec.scales) != 1:
            raise ValueError(
                f"CodeDiffusion needs one grid of tokens of one code, but the tokenizer gives codes {spec.codes[:8]} in grids "
                f"{spec.scales}"
            )
        if self.reveal != "drawn" and not self.process.hides:
            raise ValueError(
                f"generator.reveal is {self.reveal!r}, but {type(self.process).__name__} hides no codes; it must be 'drawn'"
            )
        net = self.backbone.clone(times=self.process.times, states=self.process.states(spec.codes[0]))
        return super(CodeDiffusion, self.clone(backbone=net)).on(spec)

    @property
    def codes(self) -> int:
        return self.spec.codes[0]

    @typed
    def loss(
        self, tokens: Int[Array, "b n k"], batch: Batch, order: Order, *, drop: Bool[Array, "b"], key: PRNGKey,
        tokenizer: Frozen | None = None, memory: Params | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:  # fmt: skip
        """The variational bound in nats, of a time drawn for every image, and the auxiliary loss.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: unused.
          drop: images trained without their condition.
          key: for times and noise.
          tokenizer: unused.
          memory: see `Generator.memory`; without it all times are drawn alike.

        Returns:
          Loss and weight of every token, and metrics.
        """
        time_key, noise_key = jax.random.split(key)
        clean, times, states = tokens[..., 0], self.process.times, self.process.states(self.codes)
        odds = jnp.full(times, 1 / times) if memory is None else importance(memory)
        noise = shares.draw(gumbel, time_key, (len(tokens), times))
        t = (jnp.log(odds) + noise).argmax(-1)
        noise = shares.draw(gumbel, noise_key, (*clean.shape, states))
        noisy = (self.spoilt(clean, t) + noise).argmax(-1)
        logits = self.backbone.predict(noisy, t, self.condition(batch, drop))
        bound, aux = self.errors(clean, noisy, t, logits)
        each = (bound + self.aux * aux) / odds[t][:, None] + self.process.prior(one_hot(clean, states))
        weight = image_weight(batch, len(tokens))[:, None] * jnp.ones(clean.shape)
        right = (logits.argmax(-1) == clean).mean()
        more = {} if memory is None else {"memory": remembered(memory, t, bound.sum(1))}
        return each, weight, {"right": right, **more}

    @nn.nowrap
    def memory(self) -> Params:
        """Of every time: the mean square of its part of the bound, and how often it was drawn."""
        if not self.weigh_times:
            return {}
        return {name: jnp.zeros(self.process.times) for name in ("squares", "seen")}

    def spoilt(self, clean: Int[Array, "b n"], t: Int[Array, "b"]) -> Float[Array, "b n s"]:
        """Log-probabilities of states at a time, given the clean codes."""
        table = self.process.rates(self.codes, np.arange(self.process.times))
        rates = jax.tree.map(lambda x: jnp.asarray(x)[t][:, None, None], table)
        return spread(one_hot(clean, self.process.states(self.codes)), rates, self.process.hides)

    def errors(
        self, clean: Int[Array, "b n"], noisy: Int[Array, "b n"], t: Int[Array, "b"], logits: Float[Array, "b n v"]
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
        """What a time adds to the bound, and the auxiliary loss without its weight, of every token."""
        every, codes = np.arange(self.process.times), self.codes
        jump = self.process.jump(codes, every, every - 1).take(t)
        true, found = one_hot(clean, self.process.states(codes)), self.predicted(logits)
        before, guess = (self.process.posterior(x, noisy, jump) for x in (true, found))
        weight = jnp.where(noisy == codes, self.hidden_weight, self.shown_weight)
        bound = weight * (jnp.exp(before) * (before - guess)).sum(-1)
        aux = weight * (jnp.exp(true) * (true - found))[..., :codes].sum(-1)
        first, surprise = (t == 0)[:, None], -(jnp.exp(true) * guess).sum(-1)
        aux = jnp.where(first, surprise, aux) * (2 - t / self.process.times)[:, None]
        return jnp.where(first, surprise, bound), aux

    def predicted(self, logits: Float[Array, "b n v"]) -> Float[Array, "b n s"]:
        """Log-probabilities of the states of time -1."""
        found = jnp.maximum(jax.nn.log_softmax(logits), FLOOR)
        return jnp.pad(found, ((0, 0), (0, 0), (0, int(self.process.hides))), constant_values=FLOOR)

    @nn.nowrap
    def seen(self, state: State, ranks: Index, order: Order) -> Bool[Array, "b n"]:
        """Slots whose codes are not hidden; they may still change."""
        return (state.tokens[..., 0] >= 0) & (state.tokens[..., 0] < self.codes)

    def begin(self, setting: Setting, images: int) -> State:
        return State(jnp.full((images, self.spec.n, 1), self.process.start(self.codes), jnp.int32))

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Draws all states of the next time."""
        plan, i, knobs = self.plan(len(setting.order.sizes)), jnp.asarray(now.i), setting.knobs
        noise, shuffle = self.noise(now)
        noisy = state.tokens[..., 0]
        if not self.process.hides:
            noisy = jnp.where(noisy < 0, self.start_noise(now).argmax(-1), noisy)
        t = jnp.full(len(noisy), jnp.asarray(plan.time)[i])
        ways = len(jax.tree.leaves(setting.cond)[0]) // len(noisy)
        logits = self.backbone.predict(widen(noisy, ways), widen(t, ways), setting.cond)
        found = self.guided(logits, ways, knobs, i)
        jump = self.process.jump(self.codes, plan.late, plan.early).take(i)
        drawn = (self.process.posterior(found, noisy, jump) + noise).argmax(-1)
        if self.reveal != "drawn":
            some = self.revealed(found, noisy, noise, shuffle, jnp.asarray(plan.reveal)[i])
            drawn = jnp.where(i == len(plan.time) - 1, drawn, some)
        return State(drawn[..., None].astype(jnp.int32))

    def guided(self, logits: Float[Array, "B n v"], ways: int, knobs, i: Index) -> Float[Array, "b n s"]:
        """Log-probabilities of clean codes in step `i`: guided, divided by the temperature, filtered and not normalised."""
        temperature = jnp.asarray(knobs.temperature)[i]
        logits = fold(logits, ways, jnp.asarray(knobs.guidance)[i]) / jnp.where(temperature > 0, temperature, 1)
        best = one_hot(logits.argmax(-1), self.codes)
        kept = jnp.where(temperature > 0, knobs.filter(jax.nn.log_softmax(logits)), best)
        kept = jnp.maximum(kept, FLOOR)
        return jnp.pad(kept, ((0, 0), (0, 0), (0, int(self.process.hides))), constant_values=FLOOR)

    def revealed(
        self, found: Float[Array, "b n s"], noisy: Int[Array, "b n"], noise: Float[Array, "b n s"],
        shuffle: Float[Array, "b n"], count: Index,
    ) -> Int[Array, "b n"]:  # fmt: skip
        """Codes in so many places that were hidden, drawn with the given Gumbel noise."""
        places = jnp.zeros(noisy.shape)
        if self.reveal == "purity":
            purity = jnp.exp(found.max(-1))
            purity = purity / (purity.max(-1, keepdims=True) + 1e-10)
            found, places = (1 + self.sharpen * purity)[..., None] * found, jnp.log(purity)
        score = jnp.where(noisy == self.codes, places + shuffle, -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
        return jnp.where((rank < count) & (noisy == self.codes), (found + noise).argmax(-1), noisy)

    @nn.nowrap
    def plan(self, steps: int) -> Plan:
        """What so many steps do.

        Raises:
          ValueError: more than the process has times.
        """
        times, n = self.process.times, self.spec.n
        if self.reveal != "drawn":
            time = np.round(np.linspace(times - 1, 0, steps)).astype(int) if steps > 1 else np.array([times - 1])
            counts = [len(part) for part in np.array_split(np.arange(n), max(steps - 1, 1))]
            return Plan(time, time, np.full(steps, -1), np.array([*counts, 0])[:steps])
        if steps > times:
            raise ValueError(f"order.steps is {steps}, but the process has {times} times; give as many, or fewer")
        edges = np.round(np.linspace(times - 1, -1, steps + 1)).astype(int)
        time, early = edges[:-1], edges[1:]
        return Plan(time, early + 1 if self.stride == "published" else time, early, np.zeros(steps, int))

    def noise(self, now: Step) -> tuple[Float[Array, "b n s"], Float[Array, "b n"]]:
        """Gumbel noise of one step: for the states of every token, and for the choice of tokens."""
        n, states = self.spec.n, self.process.states(self.codes)
        return self._noise(now, 0, (n, states)), self._noise(now, 1, (n,))

    def start_noise(self, now: Step) -> Float[Array, "b n s"]:
        """Gumbel noise for the tokens before the first step, where none are hidden."""
        return self._noise(now, 2, (self.spec.n, self.codes))

    def _noise(self, now, which, shape):
        # the number of the step counts as well, since steps may reveal no rank
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, now.i), which))(now.keys[:, 0])
        return jax.vmap(lambda key: gumbel(key, shape))(keys)


def importance(memory: Params) -> Float[Array, "t"]:
    """Probabilities of times in training: as the roots of their mean squares, once each was drawn more than ten times."""
    weight = jnp.sqrt(memory["squares"] + 1e-10) + 1e-4
    weight = weight.at[0].set(weight[min(1, len(weight) - 1)])  # of the first time the part is of another kind
    known = memory["seen"].min() > 10
    return jnp.where(known, weight / weight.sum(), 1 / len(weight))


def remembered(memory: Params, t: Int[Array, "b"], part: Float[Array, "b"]) -> Params:
    """The memory after these parts of the bound; of several of one time the last one counts."""
    drawn = t == jnp.arange(len(memory["seen"]))[:, None]
    last = len(t) - 1 - drawn[:, ::-1].argmax(1)
    squares = 0.9 * memory["squares"] + 0.1 * jax.lax.stop_gradient(part)[last] ** 2
    return {
        "squares": jnp.where(drawn.any(1), squares, memory["squares"]),
        "seen": memory["seen"] + drawn.sum(1),
    }
