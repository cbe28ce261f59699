"""The joint diffusion head: all tokens of an image are denoised together, and see one another; those that are known lead the way."""

from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ar_jax.heads.diffusion import TRAINED, Chain, continuous, kept_steps, times
from ar_jax.heads.integrate import normal, pure
from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.adaln import modulated
from ar_jax.nets.attention import join_heads, sight, split_heads
from ar_jax.nets.conditioning import fold, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.mlp import TimeEmbedding, xavier, zeros
from ar_jax.nets.positions import sine_quarters
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Index, Int, Key, Layers, PRNGKey, Within, typed

EPS = 1e-6  # of all norms


class Block(nn.Module):
    """Attention and a two-layer perceptron, each between a norm that the row's own condition modulates and a gate."""

    width: int
    heads: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x, c, seen):
        def dense(features, name, kernel_init=xavier, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, kernel_init, bias=True, name=name)

        mod = dense(6 * self.width, "modulation", zeros, jnp.float32)(nn.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(mod, 6, axis=-1)
        x = constrain(x, BATCH)
        q, k, v = split_heads(dense(3 * self.width, "qkv")(modulated(x, scale1, shift1, EPS)), self.heads)
        x = (x + gate1 * dense(self.width, "out")(join_heads(seen(q, k, v)))).astype(x.dtype)
        y = nn.gelu(dense(self.hidden, "fc1")(modulated(x, scale2, shift2, EPS)), approximate=True)
        return (x + gate2 * dense(self.width, "fc2")(y)).astype(x.dtype), None


class DiT(nn.Module):
    """A stack of `Block`s and a last modulated norm; gives zeros at the start.

    Attributes:
      width, depth, heads: of the blocks; their perceptrons are four times as wide.
      out: numbers of the result.
      dtype: of the matrix products; the result is float32.
      remat: "full" computes the blocks again in the backward pass, "none" keeps what it needs.
    Source: DiT (arXiv:2212.09748).
    """

    width: int
    depth: int
    heads: int
    out: int
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "B n c"], t: Float[Array, "B"], h: Float[Array, "B n d"], places: Float[Array, "#B n w"]
    ) -> Float[Array, "B n o"]:
        """For noisy tokens x, their image's time in [0, 1000], hidden rows h and vectors of their places."""

        def dense(features, name, kernel_init=xavier, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, kernel_init, bias=True, name=name)

        c = TimeEmbedding(self.width, self.dtype, name="time")(t)[:, None] + dense(self.width, "condition")(h)
        x = (dense(self.width, "input")(x) + places).astype(self.dtype)
        block = nn.remat(Block, prevent_cse=False) if self.remat == "full" else Block
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
        )
        seen = sight(np.zeros(x.shape[1], np.int32))
        x, _ = blocks(self.width, self.heads, 4 * self.width, self.dtype, name="blocks")(x, c, seen)
        shift, scale = jnp.split(dense(2 * self.width, "modulation", zeros, jnp.float32)(nn.silu(c)), 2, axis=-1)
        return dense(self.out, "output", zeros, jnp.float32)(modulated(x, scale, shift, EPS))


class JointDiffusion(nn.Module):
    """Denoising of the last level's tokens by one network that sees all of them, with a cosine schedule and fixed variances.

    Attributes:
      width, depth, heads: of the network.
      multiplier: noise levels drawn for every image in training.
      steps: denoising steps and their spacing (see `diffusion.kept_steps`).
      latest: noise levels beyond are not used in sampling.
      dtype: of the matrix products; what is denoised is float32.
      remat: see `DiT`.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: Hi-MAR (arXiv:2505.20288).
    """

    width: int = 512
    depth: Layers = 6
    heads: int = 8
    multiplier: Annotated[int, Within(1, 1024)] = 4
    steps: str = "250"
    latest: Annotated[int, Within(1, TRAINED)] = TRAINED
    dtype: Any = jnp.float32
    remat: Literal["none", "full"] = "none"
    spec: TokenSpec | None = None

    adjustable = ("steps", "latest")

    def complete(self, spec: TokenSpec) -> "JointDiffusion":
        continuous(spec, "JointDiffusion")
        if self.width % self.heads:
            raise ValueError(f"JointDiffusion: width is {self.width}; it must be a multiple of heads, {self.heads}")
        return self.clone(spec=spec)

    def setup(self):
        self.net = DiT(self.width, self.depth, self.heads, self.spec.channels, self.dtype, self.remat)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        where = "net/blocks/"
        return (
            (where + "(qkv|fc1)/kernel$", P(None, "tp")),
            (where + "(qkv|fc1)/bias$", P("tp")),
            (where + "(out|fc2)/kernel$", P("tp", None)),
        )

    def places(self, slot: Int[Array, "#b n"]) -> Float[Array, "#b n w"]:
        """Sines and cosines of the column, then of the row, of slots of the last level."""
        table = np.concatenate(np.split(sine_quarters(*self.spec.scales[-1], self.width), 2, axis=-1)[::-1], axis=-1)
        return look_up(table, slot)

    @typed
    def loss(
        self,
        h: Float[Array, "b n d"],
        target: Float[Array, "b n c"],
        slot: Int[Array, "#b n"],
        hidden: Bool[Array, "n"],
        *,
        key: PRNGKey,
    ) -> Float[Array, "b n"]:
        """Squared error of the noise, mean over channels and `multiplier` noise levels; 0 where a token is not hidden."""
        t_key, noise_key = jax.random.split(key)
        t = shares.draw(times, t_key, (len(h), self.multiplier))
        noise = shares.draw(jax.random.normal, noise_key, (*t.shape, *target.shape[1:]))
        return self.errors(h, target, slot, hidden[None], t, noise).mean(1)

    @typed
    def errors(
        self,
        h: Float[Array, "b n d"],
        target: Float[Array, "b n c"],
        slot: Int[Array, "#b n"],
        hidden: Bool[Array, "#b n"],
        t: Int[Array, "b r"],
        noise: Float[Array, "b r n c"],
    ) -> Float[Array, "b r n"]:
        """Squared errors at given levels and noise. All tokens are noisy, but only the hidden ones count."""
        chain, many = Chain.of(np.arange(TRAINED)).at(t[..., None, None]), t.shape[1]
        x = jnp.sqrt(chain.kept) * target[:, None].astype(jnp.float32) + jnp.sqrt(1 - chain.kept) * noise
        places = self.places(slot)
        places = widen(places, many) if len(places) > 1 else places
        time = t.reshape(-1).astype(jnp.float32)
        guess = self.net(x.reshape(-1, *x.shape[2:]), time, jnp.repeat(h, many, axis=0), places).reshape(noise.shape)
        return jnp.square((noise - guess) * hidden[:, None, :, None]).mean(-1)

    def chain(self) -> tuple[Chain, np.ndarray]:
        """The chain of sampling from its noisiest level on, and the log-variance of what each step adds."""
        chain = Chain.of(kept_steps(self.steps, self.latest)).reversed()
        return chain, np.append(chain.log_beta[:-1], chain.log_posterior[-1])

    @typed
    def sample(
        self,
        h: Float[Array, "B n d"],
        tokens: Float[Array, "b n c"],
        known: Bool[Array, "n"],
        slot: Int[Array, "#b n"],
        keys: Key[Array, "b n"],
        knobs: Any,
        i: Index,
    ) -> Float[Array, "b n c"]:
        """Denoises all tokens in step `i`; before every step, known ones are put back with the noise that they began with.

        Guided rows (B = b * ways) share their noise and are folded in every step.
        """
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        (chains, log_variance), network, ways = self.chain(), pure(self.net), h.shape[0] // keys.shape[0]
        places, begin, steps = self.places(slot), self.noise(keys, 0), len(log_variance)
        places = widen(places, ways) if len(places) > 1 else places

        def body(s, x):
            chain = chains.at(s)
            noisy = jnp.sqrt(chain.kept) * tokens + jnp.sqrt(1 - chain.kept) * begin
            x = jnp.where(known[:, None], noisy, x)
            guess = fold(network(widen(x, ways), jnp.full(len(h), chain.t), h, places), ways, guidance)
            spread = jnp.where(s < steps - 1, temperature, 0.0) * jnp.exp(0.5 * jnp.asarray(log_variance)[s])
            return chain.mean(x, chain.clean(x, guess)) + spread * self.noise(keys, s + 1)

        return lax.fori_loop(0, steps, body, begin)

    def noise(self, keys: Key[Array, "b n"], s: Index) -> Float[Array, "b n c"]:
        """Where denoising starts (s = 0), and what step s-1 adds."""
        return normal(keys, s, self.spec.channels)
