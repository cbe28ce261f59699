"""The joint flow head: all tokens of a scale follow a learned velocity together, and see one another on the way."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.heads.diffusion import TRAINED, continuous
from ar_jax.heads.flow import Flow, draw_times, uniform
from ar_jax.heads.integrate import pure
from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import sight
from ar_jax.nets.gated import Attention, Condition, GatedMLP, gated_rules, modulated, rms
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import TimeEmbedding, xavier
from ar_jax.nets.positions import rotary, stretched
from ar_jax.nets.transformer import Backbone, RMSNorm
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Layers, PRNGKey, Share, typed


def two_speeds(steps: int) -> np.ndarray:
    """Times of FlowAR, float64: half of the steps from 1 to 0.3, half from 0.25 to 0; exactly 50 are equal.

    An odd number loses one step.
    Raises:
      ValueError: fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"head.steps is {steps}; with this grid it must be at least 2")
    if steps == 50:
        return uniform(steps)
    return np.concatenate([np.linspace(1, 0.3, steps // 2), np.linspace(0.25, 0, steps // 2 + 1)])


class Block(nn.Module):
    """Attention, with `cross` also to the hidden rows, and a gated perceptron, modulated by the time and by each row."""

    width: int
    heads: int
    cross: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, cache, time, rows, hidden, table, seen):
        def ada(name, parts, y):
            y = Linear(parts * self.width, self.dtype, jnp.float32, xavier, bias=True, name=name)(nn.silu(y))
            return y

        def attention(name, **fields):
            return Attention(self.width, self.heads, bias=False, dtype=self.dtype, name=name, **fields)

        x = constrain(x, BATCH)
        both = time.spread(time.vector) + rows
        if self.cross:
            parts = time.spread(ada("ada_attention", 3, time.vector)), ada("ada_mlp", 3, both)
            (gate1, scale1, shift1), (gate2, scale2, shift2) = (jnp.split(part, 3, axis=-1) for part in parts)
        else:
            gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(ada("ada", 6, both), 6, axis=-1)
        y, _ = attention("attention")(modulated(x, scale1, shift1), table, seen)
        x = (x + gate1 * y).astype(x.dtype)
        if self.cross:
            norms = [RMSNorm(1e-6, name=name) for name in ("cross_norm", "hidden_norm")]
            y, _ = attention("cross_attention", cross=True)(norms[0](x), table, seen, others=norms[1](hidden))
            x = x + y
        y = GatedMLP(self.width, dtype=self.dtype, name="mlp")(modulated(x, scale2, shift2))
        return (x + gate2 * y).astype(x.dtype), cache


class JointNet(Backbone):
    """The velocity of noisy tokens, each scale of which is a set of rows that see one another.

    Attributes:
      layers, width, heads: sizes.
      out: numbers of a token.
      cross: the blocks look at the hidden rows, too, not only through the modulation.
      dtype, remat: see `Backbone`.
    """

    out: int = 16
    cross: bool = True

    turned = True

    def setup(self):
        def dense(features, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, xavier, bias=True)

        self.time = TimeEmbedding(self.width, self.dtype, xavier)
        self.condition, self.input = dense(self.width), dense(self.width)
        self.modulation, self.output = dense(2 * self.width, jnp.float32), dense(self.out, jnp.float32)
        sizes = (self.width, self.heads, self.cross, self.dtype)
        self.blocks = self.stack(Block, sizes, (nn.broadcast,) * 5)

    @typed
    def __call__(
        self,
        x: Float[Array, "B m c"],
        t: Float[Array, "B s"],
        h: Float[Array, "B m d"],
        step: Int[np.ndarray, "m"],
        coords: Int[Array, "m 3"] | Float[Array, "m 3"],
        sizes: tuple[int, ...] = (),
    ) -> Float[Array, "B m c"]:
        """Velocities, float32.

        Args:
          x: noisy tokens.
          t: time in [0, 1] of every scale; what is beyond the third digit does not count.
          h: hidden rows.
          step: of the tokens; those of one step see one another.
          coords: their places.
          sizes: tokens of every scale; () if there is one.
        """
        time = self.time(jnp.floor(TRAINED * t))
        time, rows = Condition(time.astype(jnp.float32), sizes), self.condition(h).astype(jnp.float32)
        table = rotary(coords[None], self.width // self.heads)
        seen = sight(step, own=True)
        x, _ = self.run(self.blocks, self.input(x), None, (), (time, rows, h.astype(self.dtype), table, seen))
        modulation = self.modulation(nn.silu(time.spread(time.vector) + rows))
        shift, scale = jnp.split(modulation, 2, axis=-1)
        return self.output((rms(x) * (1 + scale) + shift).astype(x.dtype))


class JointFlow(Flow):
    """Rectified flow of all tokens of a scale together. Decode steps are scales, and ranks are slots.

    Attributes:
      heads: of the attention; 0 is one for 64 channels.
      cross: see `JointNet`.
      span: see `EncoderDecoder`.
      multiplier: times drawn for every scale of an image in training.
      spec: the tokens; None until the tokenizer is known (`complete`).
      others: as in `Flow`; an annealed number of steps falls from the first scale to the last.
    Source: FlowAR (arXiv:2412.15205); annealing: DiSA (arXiv:2505.20297).
    """

    depth: Layers = 12
    multiplier: int = 1
    times: Literal["uniform", "logit_normal"] = "uniform"
    grid: Callable = two_speeds
    guided_until: Share = 0.9
    remat: Literal["none", "dots", "full"] = "none"
    heads: int = 0
    cross: bool = True
    span: int = 16
    spec: TokenSpec | None = None

    def complete(self, spec: TokenSpec) -> "JointFlow":
        return self.clone(channels=continuous(spec, "JointFlow"), spec=spec)

    def setup(self):
        if self.times not in ("uniform", "logit_normal"):
            raise ValueError(f"head.times is {self.times!r}; it must be uniform or logit_normal")
        heads = self.heads or self.width // 64 or 1
        self.net = JointNet(
            self.depth, self.width, heads, self.dtype, self.remat, out=self.channels, cross=self.cross
        )  # fmt: skip

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return gated_rules()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of every scale."""
        return tuple(height * width for height, width in self.spec.scales)

    @typed
    def loss(self, h: Float[Array, "b n d"], target: Float[Array, "b n c"], *, key: PRNGKey) -> Float[Array, "b n"]:
        """Squared error of the velocity, mean over channels and `multiplier` times of every scale."""
        t_key, noise_key = jax.random.split(key)
        t = draw_times(t_key, (len(h), self.multiplier, len(self.sizes)), self.times)
        noise = shares.draw(jax.random.normal, noise_key, (*t.shape[:2], *target.shape[1:]))
        return self.errors(h, target, t, noise).mean(1)

    @typed
    def errors(
        self, h: Float[Array, "b n d"], target: Float[Array, "b n c"], t: Float[Array, "b r s"], noise: Float[Array, "b r n c"]
    ) -> Float[Array, "b r n"]:  # fmt: skip
        """Squared error of the velocity at given times and noise, mean over channels."""
        shape = noise.shape[:3]
        h, x0 = (y.repeat(shape[1], axis=0) for y in (h, target))
        t, noise, x0 = t.reshape(-1, t.shape[-1]), noise.reshape(x0.shape), x0.astype(jnp.float32)
        at = Condition(t, self.sizes).spread(t[..., None])
        step, coords = self.spec.coords[:, 0], stretched(self.spec.coords, self.spec.scales, self.span)
        found = self.net((1 - at) * x0 + at * noise, t, h, step, coords, self.sizes)
        return jnp.square(noise - x0 - found).mean(-1).reshape(shape)

    def field(self, h: Float[Array, "B m d"], i: Index) -> Callable[[Array, Float[Array, ""]], Array]:
        """The velocity of the tokens [B m c] of scale `i` at a time, given their hidden rows; for loops of JAX."""
        network, (images, m) = pure(self.net), h.shape[:2]
        first = np.cumsum(self.sizes) - self.sizes
        coords = lax.dynamic_slice_in_dim(jnp.asarray(self.spec.coords), jnp.asarray(first, jnp.int32)[i], m)
        coords, step = stretched(coords, self.spec.scales, self.span), np.zeros(m, np.int32)
        return lambda x, t: network(x, jnp.full((images, 1), t), h, step, coords)
