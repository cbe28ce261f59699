"""The Gaussian-mixture head: a continuous token's density in closed form."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.heads import categorical
from ar_jax.heads.diffusion import continuous
from ar_jax.machine.sharding import Rules
from ar_jax.nets.linear import Linear
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, PRNGKey, typed

SMALLEST = 1e-6  # standard deviation
PROPOSALS = 1000  # drawn at most for a guided token


@struct.dataclass
class Mixture:
    """Mixtures of k diagonal Gaussians over c channels.

    Attributes:
      logits: float32 [... k] of the weights, not normalised.
      mean, scale: float32 [... k c].
    """

    logits: Array
    mean: Array
    scale: Array

    @typed
    def log_density(self, x: Float[Array, "*b c"]) -> Float[Array, "*b"]:
        each = _log_normal(x[..., None, :], self.mean, self.scale).sum(-1)
        return jax.nn.logsumexp(jax.nn.log_softmax(self.logits) + each, axis=-1)

    def component(self, index: Int[Array, "*b"]) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
        """Mean and standard deviation of one component each."""
        take = lambda x: jnp.take_along_axis(x, index[..., None, None], axis=-2)[..., 0, :]  # noqa: E731
        return take(self.mean), take(self.scale)


class GaussianMixture(nn.Module):
    """A linear readout of mixture weights, means and standard deviations.

    Attributes:
      mixtures: number of Gaussians.
      channels: of a token; 0 until the tokenizer is known (`complete`).
      dtype: of the matrix product's inputs; the density is float32.
    Source: GIVT (arXiv:2312.02116).
    """

    mixtures: int = 16
    channels: int = 0
    dtype: Any = jnp.float32

    def complete(self, spec: TokenSpec) -> "GaussianMixture":
        return self.clone(channels=continuous(spec, "GaussianMixture"))

    def setup(self):
        features = self.mixtures * (1 + 2 * self.channels)
        zeros = nn.initializers.zeros
        self.readout = Linear(features, self.dtype, jnp.float32, zeros, bias=True, bias_init=self._bias)

    def _bias(self, key, shape, dtype=jnp.float32):
        """Spreads the means, which would otherwise be equal and learn the same."""
        k, c = self.mixtures, self.channels
        mean = jax.random.normal(key, (k, 1, c), dtype)
        return jnp.concatenate([jnp.zeros(k, dtype), jnp.pad(mean, ((0, 0), (0, 1), (0, 0))).reshape(-1)])

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return ()

    @typed
    def __call__(self, h: Float[Array, "B m d"]) -> Mixture:
        return self.mixture(self.readout(h))

    @nn.nowrap
    def mixture(self, raw: Float[Array, "*b o"]) -> Mixture:
        """The mixture that raw outputs mean: weights, then mean and spread of every component."""
        logits, rest = jnp.split(raw, [self.mixtures], axis=-1)
        rest = rest.reshape(*raw.shape[:-1], self.mixtures, 2, self.channels)
        mean, spread = rest[..., 0, :], rest[..., 1, :]
        return Mixture(logits, mean, jnp.maximum((spread + jnp.sqrt(jnp.square(spread) + 4)) / 2, SMALLEST))

    @typed
    def loss(
        self, h: Float[Array, "b m d"], target: Float[Array, "b m c"], *, key: PRNGKey | None = None
    ) -> Float[Array, "b m"]:
        """Negative log-density in nats; `key` is unused."""
        return -self(h).log_density(target.astype(jnp.float32))

    @typed
    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs: Any, i: Index, tokenizer: Any = None
    ) -> Float[Array, "b m c"]:
        """Draws a token per row; see `decide`."""
        return self.decide(h, keys, knobs, i)[0]

    @typed
    def decide(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs: Any, i: Index
    ) -> tuple[Float[Array, "b m c"], Float[Array, "b m"]]:
        """Draws a token per row; of guided rows (B = b * ways), one by rejection (see `Guided`). Also its log-density.

        Guidance g means density p^g / q^(g - 1) of the densities with (p) and without condition (q), of the drawn
        component and not normalised. The temperature multiplies standard deviations.
        """
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        mixture, ways = self(h), h.shape[0] // keys.shape[0]
        mixture = mixture.replace(scale=mixture.scale * temperature)
        with_, without = (jax.tree.map(lambda x, way=way: x[way::ways], mixture) for way in (0, ways - 1))
        fold_in = lambda s: jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, s)))(keys)  # noqa: E731
        draw = lambda fn, s, *shape: jax.vmap(jax.vmap(lambda key: fn(key, shape)))(fold_in(s))  # noqa: E731
        component = categorical.draw(with_.logits, fold_in(0), jnp.ones(()))
        mean, scale = with_.component(component)
        plain = mean + scale * draw(jax.random.normal, 1, self.channels)
        if ways == 1:
            return plain, with_.log_density(plain)

        def proposal(j):
            one = draw(jax.random.normal, 2 + 2 * j, self.channels)
            return one, draw(jax.random.uniform, 3 + 2 * j, self.channels)

        target = Guided(mean, scale, *without.component(component), guidance)
        drawn, _ = target.draw(proposal, plain, PROPOSALS)
        return drawn, target.log_density(drawn).sum(-1)


@struct.dataclass
class Guided:
    """The guided density of every channel, p^g / q^(g - 1) of two Gaussians, not normalised.

    Attributes:
      mean, scale: of p, with the condition, float32 [... c].
      mean_without, scale_without: of q, without it.
      guidance: g, at least 1.
    Source: GIVT (arXiv:2312.02116), density-based classifier-free guidance.
    """

    mean: Array
    scale: Array
    mean_without: Array
    scale_without: Array
    guidance: Array

    def log_density(self, x: Array) -> Array:
        with_ = _log_normal(x, self.mean, self.scale)
        without = _log_normal(x, self.mean_without, self.scale_without)
        return self.guidance * with_ - (self.guidance - 1) * without

    @property
    def spread(self) -> Array:
        """Standard deviation of the proposals, which lie around `mean`."""
        return 2 * jnp.maximum(self.scale, self.scale_without)

    def log_bound(self) -> Array:
        """Log of what the proposals' density is multiplied with to lie above the target: a heuristic, no strict bound."""

        def body(highest, offset):
            return jnp.maximum(highest, self.log_density(self.mean + offset)), None

        highest, _ = lax.scan(body, jnp.full_like(self.mean, -jnp.inf), np.linspace(-10, 10, 1001, dtype=np.float32))
        return highest - _log_normal(self.mean, self.mean, self.spread)

    def draw(self, proposal: Any, otherwise: Array, limit: int) -> tuple[Array, Array]:
        """The first accepted of at most `limit` proposals for every channel, else `otherwise`; and which were accepted.

        Args:
          proposal: number -> unit normal and uniform numbers in the shape of `mean`.
        """
        bound = self.log_bound()

        def body(carry):
            j, x, done = carry
            normal, uniform = proposal(j)
            new = self.mean + self.spread * normal
            height = jnp.log(uniform) + bound + _log_normal(new, self.mean, self.spread)
            accepted = ~done & (height < self.log_density(new))
            return j + 1, jnp.where(accepted, new, x), done | accepted

        start = (jnp.int32(0), otherwise, jnp.zeros(otherwise.shape, bool))
        _, x, done = lax.while_loop(lambda carry: (carry[0] < limit) & ~carry[2].all(), body, start)
        return x, done


def _log_normal(x, mean, scale):
    return -0.5 * jnp.square((x - mean) / scale) - jnp.log(scale) - 0.5 * np.log(2 * np.pi).astype(np.float32)
