"""The diffusion head: every continuous token is denoised on its own, given its hidden row."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ar_jax.heads.integrate import Anneal, annealed, normal, pure, stacked
from ar_jax.machine import shares
from ar_jax.machine.sharding import Rules
from ar_jax.nets.conditioning import fold, widen
from ar_jax.nets.mlp import ModulatedMLP
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, Layers, PRNGKey, Steps, Within, typed

TRAINED = 1000  # steps of the noise schedule the network is trained on

# The first product of a block divides its outputs, the last one its inputs.
RULES: Rules = (
    (r"net/blocks/fc1/kernel$", P(None, "tp")),
    (r"net/blocks/fc1/bias$", P("tp")),
    (r"net/blocks/fc2/kernel$", P("tp", None)),
)


class Diffusion(nn.Module):
    """Denoising of each token by a small network, with a cosine schedule and learned variances.

    Attributes:
      width, depth: of the network.
      channels: of a token; 0 until the tokenizer is known (`complete`).
      multiplier: noise levels drawn for every token in training.
      steps: denoising steps and their spacing (see `kept_steps`): "100" evenly, "10,5,5" by sections, "ddim25" by an
        integer stride.
      anneal, last_steps: with a rule other than "constant", the number of denoising steps goes from `steps` in the first
        decode step to `last_steps` in the last (see `annealed`).
      latest: noise levels beyond are not used in sampling; annealing was published with 950, or 980 for DDIM. At the last
        levels an error in the noise counts up to 20,000 times, so a head that was trained for a short while needs it too.
      sampler: "ancestral", or "ddim" without noise after the first.
      dtype: of the matrix products; what is denoised is float32.
      remat: see `ModulatedMLP`.
    Source: MAR (arXiv:2406.11838); annealing: DiSA (arXiv:2505.20297).
    """

    width: int = 1024
    depth: Layers = 6
    channels: int = 0
    multiplier: int = 4
    steps: str = "100"
    anneal: Anneal = "constant"
    last_steps: Steps = 5
    latest: Annotated[int, Within(1, TRAINED)] = TRAINED
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    dtype: Any = jnp.float32
    remat: Literal["none", "full"] = "none"

    adjustable = ("steps", "anneal", "last_steps", "latest", "sampler")

    def complete(self, spec: TokenSpec) -> "Diffusion":
        return self.clone(channels=continuous(spec, "Diffusion"))

    def adjusted(self, **fields: Any) -> "Diffusion":
        """The same with other fields; a chain that is annealed now leaves out the noisiest levels, as DiSA."""
        stride = "ddim" if self.steps.startswith("ddim") else ""
        if str(fields.get("steps", "")).isdigit():
            fields["steps"] = f"{stride}{fields['steps']}"
        if fields.get("anneal", "constant") != "constant" and self.latest == TRAINED:
            fields = {"latest": 980 if stride else 950} | fields
        return self.clone(**fields)

    @nn.nowrap
    def calls(self, decode_steps: int) -> np.ndarray:
        """Calls of the network in every decode step, int [steps]."""
        _, which, lengths = self.chains(decode_steps)
        return lengths[which]

    def setup(self):
        if self.sampler not in ("ancestral", "ddim"):
            raise ValueError(f"head.sampler is {self.sampler!r}; it must be ancestral or ddim")
        self.net = ModulatedMLP(self.width, self.depth, 2 * self.channels, self.dtype, self.remat)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return RULES

    @typed
    def loss(self, h: Float[Array, "b m d"], target: Float[Array, "b m c"], *, key: PRNGKey) -> Float[Array, "b m"]:
        """Squared error of the noise plus the variational bound in bits, mean over `multiplier` noise levels."""
        t_key, noise_key = jax.random.split(key)
        t = shares.draw(times, t_key, (len(h), self.multiplier, h.shape[1]))
        noise = shares.draw(jax.random.normal, noise_key, (*t.shape, target.shape[-1]))
        square, bound = self.errors(h, target, t, noise)
        return (square + bound).mean(1)

    @typed
    def errors(
        self, h: Float[Array, "b m d"], target: Float[Array, "b m c"], t: Int[Array, "b r m"], noise: Float[Array, "b r m c"]
    ) -> tuple[Float[Array, "b r m"], Float[Array, "b r m"]]:  # fmt: skip
        """Mean squared error of the noise; and the bound in bits, which trains the variances only."""
        chain = Chain.of(np.arange(TRAINED)).at(t[..., None])
        x0 = target[:, None].astype(jnp.float32)
        x = jnp.sqrt(chain.kept) * x0 + jnp.sqrt(1 - chain.kept) * noise
        guess, variance = jnp.split(self.net(x, t.astype(jnp.float32), h[:, None]), 2, axis=-1)
        square = jnp.square(noise - guess).mean(-1)
        mean = chain.mean(x, chain.clean(x, lax.stop_gradient(guess)))
        log_variance = chain.log_variance(variance)
        # between Gaussians, except in the last step, where latents count as rounded to 1/127.5
        gap = jnp.square(chain.mean(x, x0) - mean) * jnp.exp(-log_variance)
        ratio = chain.log_posterior - log_variance
        divergence = 0.5 * (jnp.exp(ratio) - ratio - 1 + gap)
        likelihood = _log_likelihood(x0, mean, 0.5 * log_variance)
        bound = jnp.where(t == 0, -likelihood.mean(-1), divergence.mean(-1)) / math.log(2)
        return square, bound

    @typed
    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs: Any, i: Index, tokenizer: Any = None
    ) -> Float[Array, "b m c"]:
        """Denoises a token per row; guided rows (B = b * ways) share their noise and are folded in every step.

        Guidance changes the predicted noise, the temperature multiplies the noise added in between.
        """
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        chains, which, lengths = self.chains(len(knobs.guidance))
        group = jnp.asarray(which)[i]
        network, ways = pure(self.net), h.shape[0] // keys.shape[0]

        def body(s, x):
            chain = chains.at((group, s))
            t = jnp.full(h.shape[:2], chain.t, jnp.float32)
            out = network(widen(x, ways), t, h)
            noise, variance = jnp.split(out, 2, axis=-1)
            noise, variance = fold(noise, ways, guidance), variance[::ways]
            clean = chain.clean(x, noise)
            if self.sampler == "ddim":
                return jnp.sqrt(chain.kept_after) * clean + jnp.sqrt(1 - chain.kept_after) * noise
            spread = jnp.where(s < jnp.asarray(lengths)[group] - 1, temperature, 0.0)
            more = jnp.exp(0.5 * chain.log_variance(variance)) * self.noise(keys, s + 1)
            return chain.mean(x, clean) + spread * more

        steps = lengths[0] if len(lengths) == 1 else jnp.asarray(lengths)[group]
        return lax.fori_loop(0, steps, body, self.noise(keys, 0))

    def noise(self, keys: Key[Array, "b m"], s: Index) -> Float[Array, "b m c"]:
        """Where denoising starts (s = 0), and what step s-1 adds."""
        return normal(keys, s, self.channels)

    @nn.nowrap
    def chains(self, decode_steps: int) -> tuple["Chain", np.ndarray, np.ndarray]:
        """The different chains as tables [g s], which of them each decode step takes, and the lengths [g]."""
        if self.anneal == "constant":
            chains = [Chain.of(kept_steps(self.steps, self.latest)).reversed()]
            which = np.zeros(decode_steps, np.int32)
        else:
            stride, count = self.steps.startswith("ddim"), self.steps.removeprefix("ddim")
            if not count.isdigit():
                raise ValueError(
                    f"head.steps is {self.steps!r}; with head.anneal it must be one number, or ddim and one"
                )
            counts = annealed(self.anneal, int(count), self.last_steps, decode_steps)
            kinds, which = np.unique(counts, return_inverse=True)
            spacings = [kept_steps(f"ddim{n}" if stride else str(n), self.latest) for n in kinds.tolist()]
            chains = [Chain.of(kept).reversed() for kept in spacings]
        lengths = np.array([len(chain.t) for chain in chains], np.int32)
        return Chain(*(stacked(tables) for tables in zip(*(chain.tables() for chain in chains)))), which, lengths


def times(key, shape):
    return jax.random.randint(key, shape, 0, TRAINED)


def continuous(spec: TokenSpec, head: str) -> int:
    """Channels of the tokens.

    Raises:
      ValueError: they are discrete.
    """
    if not spec.channels:
        raise ValueError(
            f"{head} needs continuous tokens, but the tokenizer gives codes {spec.codes}; use a head for codes "
            f"(Categorical), or a tokenizer such as KLVAE or Patches"
        )
    return spec.channels


@dataclasses.dataclass(frozen=True)
class Chain:
    """What a step of a denoising chain needs, as float32 arrays of one shape; computed in float64.

    Attributes:
      t: noise level in 0..999, as the network knows it.
      kept, kept_after: part of the signal's variance at this level and at the next cleaner one.
      log_beta: log-variance of what the step adds to the next cleaner level.
      log_posterior: log-variance of the next cleaner level given this one and the clean token.
      to_clean, to_current: what its mean is made of.
    """

    t: Any
    kept: Any
    kept_after: Any
    log_beta: Any
    log_posterior: Any
    to_clean: Any
    to_current: Any

    @classmethod
    def of(cls, steps: Int[np.ndarray, "s"]) -> "Chain":
        """The chain over some of the trained noise levels, from the cleanest on."""
        kept = np.cumprod(1 - cosine_betas())[steps]
        after = np.append(1.0, kept[:-1])
        beta = 1 - kept / after
        posterior = beta * (1 - after) / (1 - kept)
        posterior[0] = posterior[min(1, len(steps) - 1)] or 1e-20  # of the first step it is 0, which has no logarithm
        tables = (
            steps, kept, after, np.log(beta), np.log(posterior),
            beta * np.sqrt(after) / (1 - kept), (1 - after) * np.sqrt(1 - beta) / (1 - kept),
        )  # fmt: skip
        return cls(*(np.asarray(table, np.float32) for table in tables))

    def tables(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def reversed(self) -> "Chain":
        return Chain(*(table[::-1] for table in self.tables()))

    def at(self, index: Any) -> "Chain":
        return Chain(*(jnp.asarray(table)[index] for table in self.tables()))

    def clean(self, x: Array, noise: Array) -> Array:
        """The clean token, if x holds this noise; it is not clipped."""
        return x * lax.rsqrt(self.kept) - noise * jnp.sqrt(1 / self.kept - 1)

    def mean(self, x: Array, clean: Array) -> Array:
        """Mean of the next cleaner level."""
        return self.to_clean * clean + self.to_current * x

    def log_variance(self, variance: Array) -> Array:
        """Learned log-variance: between the two bounds for -1..1, beyond them outside."""
        part = (variance + 1) / 2
        return part * self.log_beta + (1 - part) * self.log_posterior


def cosine_betas(steps: int = TRAINED) -> np.ndarray:
    """Variance added by every step of the cosine schedule, float64 [steps] (arXiv:2102.09672)."""
    kept = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999)


def kept_steps(spacing: str, latest: int = TRAINED, steps: int = TRAINED) -> np.ndarray:
    """The noise levels of 0..steps-1 that a shorter chain keeps, int [s], rising.

    Args:
      spacing: "n" takes n evenly spaced ones; "n,m,..." cuts the levels into equal sections and takes so many of each, 0
        too; "ddimn" takes every k-th for a whole k, of fewer than all levels where these have no such k.
      latest: later ones are moved here, and equal ones count once.
    Raises:
      ValueError: no such spacing.
    """
    problem = ValueError(f"head.steps is {spacing!r}; it must be a number such as 100, several of them, or ddim25")
    words = spacing.removeprefix("ddim").split(",")
    if not all(word.strip().isdigit() for word in words):
        raise problem
    counts = [int(word) for word in words]
    if not 0 < sum(counts) <= steps or (spacing.startswith("ddim") and len(counts) > 1):
        raise problem
    if spacing.startswith("ddim"):
        grids = (range(0, end, stride) for end in range(steps, 0, -1) for stride in range(1, end + 1))
        found = next(grid for grid in grids if len(grid) == counts[0])
    else:
        found, start = [], 0
        for i, count in enumerate(counts):
            size = steps // len(counts) + (i < steps % len(counts))
            if size < count:
                raise problem
            stride, at = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
            for _ in range(count):
                found.append(start + round(at))  # of a sum and half to even, as the published tables are made
                at += stride
            start += size
    return np.unique(np.minimum(found, latest))


def _log_likelihood(x, mean, log_scale):
    """Log-probability of rounded latents under Gaussians, with the tails for values outside -0.999..0.999."""

    def cdf(x):
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def log(p):
        return jnp.log(jnp.maximum(p, 1e-12))

    sharp = jnp.exp(-log_scale)
    above, below = cdf(sharp * (x - mean + 1 / 255)), cdf(sharp * (x - mean - 1 / 255))
    return jnp.where(x < -0.999, log(above), jnp.where(x > 0.999, log(1 - below), log(above - below)))
