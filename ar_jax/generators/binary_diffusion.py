"""Binary latent diffusion: all bits of an image at once, from coin tosses, in a few steps."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.data import Info
from ar_jax.generators.base import Conditioning, Frozen, Generator, Setting, State, Step, image_weight
from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.attention import Rows, join_heads, split_heads
from ar_jax.nets.conditioning import Cond, Label, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.positions import waves
from ar_jax.nets.transformer import init
from ar_jax.nets.vit import Plain
from ar_jax.orders import Order, raster
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Metrics, PRNGKey, Steps, typed


@dataclasses.dataclass(frozen=True)
class Denoised:
    """All tokens are drawn anew in every step (`BinaryDiffusion`, `CodeDiffusion`); how many ranks a step counts as revealing means
    nothing, and may be none.

    Attributes:
      steps: of decoding.
    """

    steps: Steps = 16

    adjustable = ("steps",)

    def __call__(self, spec: TokenSpec, keys: Any = None, images: int = 1, train_step: Any = 0) -> Order:
        sizes = tuple(len(part) for part in np.array_split(np.arange(spec.n), self.steps))
        return Order(raster(spec).slot, sizes, (spec.n,) * self.steps)


def kept_bits(steps: int, rule: str = "linear") -> np.ndarray:
    """Part of the information that is left at times 0..steps, float32 [steps+1]: a bit is tossed anew with the rest's probability.

    Source: Binary Latent Diffusion (arXiv:2304.04820).
    """
    u = np.arange(steps + 1) / steps
    if rule == "cos":
        return ((1 + np.cos(np.pi * u)) / 2).astype(np.float32)
    if rule == "sigmoid":
        s = 1 / (1 + np.exp(-3 / 0.8 * u))
        return ((s[-1] - s) / (s[-1] - s[0])).astype(np.float32)
    return (1 - u).astype(np.float32)


def step_factors(kept: np.ndarray) -> np.ndarray:
    """What each step keeps of what was left before it, float32 [steps+1]; the first is 1."""
    return np.concatenate([[1], kept[1:] / np.maximum(kept[:-1], 1e-12)]).astype(np.float32)


class Shown(Label):
    """One row of the class, which nobody sees where the condition is dropped; there is no row of "no class"."""

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        table = self.param("embedding", nn.initializers.normal(self.std), (self.classes, self.width))
        label = batch["label"]
        row = look_up(table, jnp.minimum(label, self.classes - 1))
        return Cond(row[:, None], valid=(~drop & (label < self.classes))[:, None])


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and times a learned vector."""

    width: int
    heads: int
    hidden: int
    eps: float
    dtype: Any

    no_decay = ("gamma1", "gamma2")

    def setup(self):
        def dense(features):
            return Linear(features, self.dtype, None, init, bias=True)

        def norm():
            return nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, use_fast_variance=False)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.qkv, self.out, self.fc1, self.fc2 = (
            dense(n) for n in (3 * self.width, self.width, self.hidden, self.width)
        )
        self.gamma1, self.gamma2 = (self.param(f"gamma{i}", nn.initializers.ones, (self.width,)) for i in (1, 2))

    def __call__(self, x, cache, seen):
        x = constrain(x, BATCH)
        y = join_heads(seen(*split_heads(self.qkv(self.attention_norm(x)), self.heads)))
        x = x + (self.gamma1 * self.out(y)).astype(x.dtype)
        y = self.fc2(nn.gelu(self.fc1(self.mlp_norm(x)), approximate=False))
        return x + (self.gamma2 * y).astype(x.dtype), cache


class Scaled(Plain):
    """A stack of `Block`s and a final norm; every row sees every row. Attributes: see `Plain`; there is no dropout."""

    eps: float = 1e-5

    def setup(self):
        sizes = (self.width, self.heads, self.hidden or 4 * self.width, self.eps, self.dtype)
        self.blocks = self.stack(Block, sizes, (nn.broadcast,))
        self.norm = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, use_fast_variance=False)

    def __call__(self, x: Float[Array, "B q d"], valid: Bool[Array, "B q"] | None = None) -> Float[Array, "B q d"]:
        """Runs all layers; rows that are not `valid` are seen by nobody else."""
        seen = Rows(np.zeros(x.shape[1], np.int32), valid=valid).sight()
        return self.norm(self.run(self.blocks, x.astype(self.dtype), None, (), (seen,))[0])


class TossedBits(Generator):
    """All bits are drawn anew in every step (`Denoised`), from coin tosses to the likelier ones in the end.

    Others say which times the steps go through (`visited`), what of the bits is wrong at a time (`logits`), and how likely a 1 is
    at an earlier time (`earlier`).
    """

    def complete(self, spec: TokenSpec, info: Info) -> "TossedBits":
        if not spec.codes or set(spec.codes) != {2}:
            raise ValueError(
                f"{type(self).__name__} needs tokens of bits, but the tokenizer gives codes {spec.codes[:8]}"
            )
        return super().complete(spec, info)

    @nn.nowrap
    def seen(self, state: State, ranks: Index, order: Order) -> Bool[Array, "1 n"]:
        """All slots, whose bits are there from the first step on, and change."""
        return jnp.ones((1, order.n), bool)

    def begin(self, setting: Setting, images: int) -> State:
        return State(self.spec.zeros(images))

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Draws all bits of the next time; in the first step, those of the last time before that."""
        i, steps = jnp.asarray(now.i), len(setting.order.sizes)
        first, second = self.tosses(now, state.tokens.shape)
        noisy = jnp.where(i == 0, (first < 0.5).astype(jnp.int32), state.tokens)
        p, before = self.chances(noisy, i, setting)
        return State(jnp.where(i == steps - 1, p > 0.5, second < before).astype(jnp.int32))

    def chances(
        self, noisy: Int[Array, "b n k"], i: Index, setting: Setting
    ) -> tuple[Float[Array, "b n k"], Float[Array, "b n k"]]:
        """Probability of a 1 in the image, and at the time that step `i` goes to."""
        times = self.visited(len(setting.order.sizes))
        t, u = jnp.asarray(times)[i], jnp.asarray(np.append(times[1:], 0))[i]
        temperature = jnp.asarray(setting.knobs.temperature)[i]
        logits = self.logits(noisy, jnp.full(len(noisy), t), setting.cond)
        cond, uncond = (logits, logits) if len(logits) == len(noisy) else (logits[::2], logits[1::2])
        guided = cond + (jnp.asarray(setting.knobs.guidance)[i] - 1) * (cond - uncond)
        wrong = jax.nn.sigmoid(guided / jnp.where(temperature > 0, temperature, 1))
        p = jnp.where(noisy > 0, 1 - wrong, wrong)
        return p, self.earlier(p, noisy, t, u)

    @nn.nowrap
    def visited(self, steps: int) -> np.ndarray:
        """Times that so many steps go through, falling, [steps]; after the last comes 0."""
        raise NotImplementedError

    def logits(self, noisy: Int[Array, "b n k"], t: Array, cond: Cond) -> Float[Array, "B n k"]:
        """That bits are wrong at a time of each image, float32, of B = b * ways guided rows."""
        raise NotImplementedError

    def earlier(
        self, p: Float[Array, "b n k"], noisy: Int[Array, "b n k"], t: Array, u: Array
    ) -> Float[Array, "b n k"]:
        """Probability of a 1 at time u, given that of a 1 at time 0 and the bits at time t."""
        raise NotImplementedError

    def tosses(self, now: Step, shape: tuple[int, ...]) -> tuple[Float[Array, "b n k"], Float[Array, "b n k"]]:
        """Uniform numbers for the bits before the first step, and for those of this step."""

        def some(which):
            keys = jax.vmap(lambda key: jax.random.fold_in(key, which))(now.keys[:, 0])
            return jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)

        return some(0), some(1)


class BinaryDiffusion(TossedBits):
    """Which bits are wrong is predicted, for all tokens at once, of bits that are more and more often tossed anew.

    Time 0 is the image, time `times` is coin tosses. Sampling goes from there through as many times as the order has steps
    (`Denoised`), and takes the likelier bits in the end.

    Attributes:
      backbone: the network.
      conditioning: makes one row from a batch (`Shown`), as wide as the network.
      times: how many there are in training.
      rule: how bits are lost over the times ("linear", "cos", "sigmoid").
      focal: each bit counts by (1 - probability of the truth) to this power, and wrong and right bits of an image alike: 0 is
        the published balanced cross entropy. Below 0 it is the plain cross entropy of the bits.
      fading: later times count less: 1 - (t - 1) / times.
      aux: weight of the cross entropy between the posteriors of the step before by the true bits and by the predicted ones.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: Binary Latent Diffusion (arXiv:2304.04820).
    """

    backbone: Scaled
    conditioning: Conditioning
    times: Steps = 64
    rule: Literal["linear", "cos", "sigmoid"] = "linear"
    focal: float = 0.0
    fading: bool = False
    aux: float = 0.0
    spec: TokenSpec | None = None

    no_decay = ("position",)

    def setup(self):
        width, bits = self.backbone.width, len(self.spec.codes)
        dtype = self.backbone.dtype
        self.token = Linear(width, dtype, None, init)
        self.position = self.param(
            "position", lambda key, shape: place_table(self.spec, shape[1]), (self.spec.n, width)
        )
        self.time1, self.time2 = (Linear(width, dtype, None, init, bias=True) for _ in range(2))
        self.flip = Linear(bits, dtype, jnp.float32, init, bias=True)

    @typed
    def loss(
        self, tokens: Int[Array, "b n k"], batch: Batch, order: Order, *, drop: Bool[Array, "b"], key: PRNGKey,
        tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:  # fmt: skip
        """Prediction of the bits that are wrong at a time drawn for every image.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: unused.
          drop: images trained without their condition.
          key: for times and tosses.
          tokenizer: unused.

        Returns:
          Loss and weight of every token, and metrics.
        """
        time_key, toss_key = jax.random.split(key)
        t = shares.draw(
            functools.partial(jax.random.randint, minval=1, maxval=self.times + 1), time_key, (len(tokens),)
        )
        uniform = shares.draw(jax.random.uniform, toss_key, tokens.shape)
        noisy = (uniform < self.likely(tokens, t)).astype(jnp.int32)
        logits = self.logits(noisy, t, self.condition(batch, drop))
        loss, _ = self.errors(tokens, noisy, t, logits)
        weight = image_weight(batch, len(tokens))[:, None] * jnp.ones(tokens.shape[:2])
        return loss, weight, {"wrong": ((logits > 0) != (noisy != tokens)).mean()}

    def likely(self, tokens: Int[Array, "b n k"], t: Int[Array, "b"]) -> Float[Array, "b n k"]:
        """Probability of a 1 at a time, given the bits of time 0."""
        kept = jnp.asarray(kept_bits(self.times, self.rule))[t][:, None, None]
        return kept * tokens + (1 - kept) / 2

    def logits(self, noisy: Int[Array, "b n k"], t: Int[Array, "b"], cond: Cond) -> Float[Array, "B n k"]:
        """That bits are wrong, float32, of B = b * ways guided rows."""
        ways, width = len(cond.rows) // len(noisy), self.backbone.width
        x = self.token(2.0 * noisy - 1) + self.position
        time = self.time2(nn.silu(self.time1(waves((t - 1) / self.times * 4000, width))))
        x = widen(jnp.concatenate([x, time[:, None].astype(x.dtype)], axis=1), ways)
        x = jnp.concatenate([x, cond.rows.astype(x.dtype)], axis=1)
        valid = None
        if cond.valid is not None:
            valid = jnp.concatenate([jnp.ones((len(x), x.shape[1] - cond.valid.shape[1]), bool), cond.valid], axis=1)
        return self.flip(self.backbone(x, valid)[:, : self.spec.n])

    def errors(
        self, tokens: Int[Array, "b n k"], noisy: Int[Array, "b n k"], t: Int[Array, "b"], logits: Float[Array, "b n k"]
    ) -> tuple[Float[Array, "b n"], Float[Array, ""]]:
        """Loss of every token, a mean over its bits; and the mean of the auxiliary one, without its weight."""
        wrong = (tokens != noisy).astype(jnp.float32)
        if self.focal >= 0:
            cross = -jax.nn.log_sigmoid(jnp.where(wrong > 0, logits, -logits))
            if self.focal:
                right = jnp.maximum(jax.nn.sigmoid(jnp.where(wrong > 0, logits, -logits)), 1e-6)
                cross = cross * (1 - right) ** self.focal
            share = wrong.mean((1, 2), keepdims=True)
            each = cross * jnp.where(wrong > 0, 1 - share, share)
        else:
            clean = jnp.where(noisy > 0, -logits, logits)
            each = -jax.nn.log_sigmoid(jnp.where(tokens > 0, clean, -clean))
        weight = 1 - (t - 1) / self.times if self.fading else jnp.ones(len(t))
        loss = (each * weight[:, None, None]).mean(-1)
        if not self.aux:
            return loss, jnp.zeros(())
        clean = jax.nn.sigmoid(jnp.where(noisy > 0, -logits, logits))
        found, true = (self.posterior(p, noisy, t) for p in (clean, tokens.astype(jnp.float32)))
        found = jnp.clip(found, 1e-6, 1 - 1e-6)
        aux = -(true * jnp.log(found) + (1 - true) * jnp.log(1 - found))
        aux = (aux * weight[:, None, None]).mean(-1)
        return loss + self.aux * aux, aux.mean()

    def posterior(
        self, p: Float[Array, "b n k"], noisy: Int[Array, "b n k"], t: Int[Array, "b"]
    ) -> Float[Array, "b n k"]:
        """Probability of a 1 a time earlier, given that of a 1 at time 0 and the bits now."""
        kept = kept_bits(self.times, self.rule)
        before, step = (jnp.asarray(table)[i][:, None, None] for table, i in ((kept, t - 1), (step_factors(kept), t)))
        drawn = ratio(p, noisy, before, step, 1e-6)
        return jnp.where((t == 1)[:, None, None], p, drawn)

    @nn.nowrap
    def visited(self, steps: int) -> np.ndarray:
        """Times that so many steps go through, falling, int [steps]."""
        if steps > self.times:
            raise ValueError(
                f"order.steps is {steps}, but the generator knows {self.times} times; give as many, or fewer"
            )
        if steps > self.spec.n:  # steps that count as revealing nothing would toss alike
            raise ValueError(f"order.steps is {steps}, but there are {self.spec.n} slots; give as many, or fewer")
        if steps in (1, self.times):
            return np.arange(self.times, self.times - steps, -1)
        return 1 + (np.linspace(0, 1, steps) * (self.times - 1)).astype(int)[::-1]

    def earlier(
        self, p: Float[Array, "b n k"], noisy: Int[Array, "b n k"], t: Index, u: Index
    ) -> Float[Array, "b n k"]:
        kept = jnp.asarray(kept_bits(self.times, self.rule))
        return ratio(p, noisy, kept[u], kept[t] / jnp.maximum(kept[u], 1e-12), 0.0)


def ratio(p, noisy, before, step, eps):
    """Probability of a 1 at an earlier time: `before` is left there of time 0, and `step` of it at the time of `noisy`."""

    def one(p, x):
        return (before * p + (1 - before) / 2) * (step * x + (1 - step) / 2)

    a1, a0 = one(p, noisy), one(1 - p, 1 - noisy)
    return a1 / (a1 + a0 + eps)


def place_table(spec: TokenSpec, width: int) -> Float[Array, "n d"]:
    """Sines and cosines of a slot's column, then of its row."""
    quarter = width // 4
    frequency = 10000.0 ** (-np.arange(quarter) / quarter)
    parts = []
    for side in (spec.coords[:, 2], spec.coords[:, 1]):
        angle = side[:, None] * frequency
        parts += [np.sin(angle), np.cos(angle)]
    return jnp.asarray(np.concatenate(parts, axis=-1), jnp.float32)
