"""The categorical head: one softmax over a codebook."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import Rules
from ar_jax.nets.conditioning import fold
from ar_jax.nets.linear import Linear
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, PRNGKey, Share, Tokens, typed


class Categorical(nn.Module):
    """A linear readout with float32 logits.

    Attributes:
      codes: size of the codebook; 0 until the tokenizer is known (`complete`).
      dtype: of the matrix product's inputs.
      chunk: the training loss is computed for so many rows of every image at a time, and again in the backward pass, so
        that the logits of all rows never lie in memory; 0 computes all at once.
      bias: the readout has one.
      std: of the readout at the start.
      smoothing: in training this part of the probability is asked for of all other codes together, alike.
      z_loss: in training so many times the squared logarithm of the softmax's denominator is added to the loss, so that logits stay small.
      sure: what `decide` calls how sure a code is, its log-probability or its guided logit before temperature and filter.
    """

    codes: int = 0
    dtype: Any = jnp.float32
    chunk: int = 0
    bias: bool = False
    std: float = 0.0
    smoothing: Share = 0.0
    z_loss: Share = 0.0
    sure: Literal["probability", "logit"] = "probability"

    def complete(self, spec: TokenSpec) -> "Categorical":
        if len(spec.codes) != 1:
            raise ValueError(
                f"Categorical needs tokens of one discrete code, but the tokenizer gives codes {spec.codes}"
            )
        return self.clone(codes=spec.codes[0])

    def setup(self):
        begin = nn.initializers.normal(self.std) if self.std else nn.initializers.zeros
        self.readout = Linear(self.codes, self.dtype, jnp.float32, begin, self.bias)

    @typed
    def __call__(self, h: Float[Array, "B m d"]) -> Float[Array, "B m v"]:
        """Logits, float32."""
        return self.readout(h)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return ((r"/readout/kernel$", P(None, "tp")),)

    @typed
    def loss(
        self, h: Float[Array, "b m d"], target: Int[Array, "b m 1"], *, key: PRNGKey | None = None
    ) -> Float[Array, "b m"]:
        """Cross entropy in nats; `key` is unused."""
        rows = h.shape[1]
        if not 0 < self.chunk < rows:
            return self._cross_entropy(h, target)
        parts = -(-rows // self.chunk)

        def chunks(x):
            x = jnp.pad(x, ((0, 0), (0, parts * self.chunk - rows), (0, 0)))
            return jnp.moveaxis(x.reshape(len(x), parts, self.chunk, -1), 1, 0)

        @functools.partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
        @functools.partial(nn.remat, prevent_cse=False)
        def body(head, carry, some):
            return carry, head._cross_entropy(*some)

        _, loss = body(self, (), (chunks(h), chunks(target)))
        return jnp.moveaxis(loss, 0, 1).reshape(len(h), -1)[:, :rows]

    def _cross_entropy(self, h, target):
        logits = self(h)
        # not a gather: the vocabulary may be divided over devices
        chosen = jnp.where(jnp.arange(self.codes) == target, logits, 0).sum(-1)
        total = jax.nn.logsumexp(logits, axis=-1)
        loss = total - chosen
        if self.smoothing:
            others = (logits.sum(-1) - chosen) / (self.codes - 1)
            loss = total - (1 - self.smoothing) * chosen - self.smoothing * others
        return loss + self.z_loss * jnp.square(total) if self.z_loss else loss

    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index, tokenizer: Callable | None = None
    ) -> Tokens:
        """Draws a code per row of step `i`; guided rows (B = b * ways) are folded first.

        With `knobs.soften`, a mixture of all the tokenizer's codes in place of one.
        """
        logits = self.filtered(h, len(keys), knobs, i)
        if knobs.soften is not None:
            everything = tokenizer(jnp.arange(self.codes)[None, :, None], method="embed")[0]
            return mixture(logits, keys, jnp.asarray(knobs.soften)[i]) @ everything
        return self.draw(logits, keys, knobs, i)

    def decide(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index
    ) -> tuple[Int[Array, "b m 1"], Float[Array, "b m"]]:
        """Draws a code per row of step `i`; and its log-probability among those that the filter leaves, or its logit (`sure`)."""
        logits = self.filtered(h, len(keys), knobs, i)
        token = self.draw(logits, keys, knobs, i)
        if self.sure == "logit":
            score = fold(self(h), h.shape[0] // len(keys), jnp.asarray(knobs.guidance)[i])
        else:
            score = jax.nn.log_softmax(logits)
        return token, jnp.take_along_axis(score, token, axis=-1)[..., 0]

    def draw(self, logits: Float[Array, "b m v"], keys: Key[Array, "b m"], knobs, i: Index) -> Int[Array, "b m 1"]:
        """Draws a code per row of step `i` from `filtered` logits."""
        return draw(logits, keys, jnp.asarray(knobs.temperature)[i])[..., None]

    def filtered(self, h: Float[Array, "B m d"], images: int, knobs, i: Index) -> Float[Array, "b m v"]:
        """Logits of step `i` that a draw is made from: guided, divided by the temperature (unless it is 0), filtered."""
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        logits = fold(self(h), h.shape[0] // images, guidance)
        return knobs.filter(logits / jnp.where(temperature > 0, temperature, 1))


@typed
def draw(logits: Float[Array, "b m v"], keys: Key[Array, "b m"], temperature: Float[Array, ""]) -> Int[Array, "b m"]:
    """Draws one entry per row with its own key; temperature 0 takes the largest."""
    drawn = (logits + jax.vmap(jax.vmap(lambda key: gumbel(key, logits.shape[-1:])))(keys)).argmax(-1)
    return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)


def gumbel(key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Noise whose sum with logits is largest at an entry with that entry's probability, float32.

    JAX's usual noise is made of 23 random bits, and so ends at 15.9: an entry of a probability of 1e-6 beside a likely one is
    drawn 6% too rarely, one of 1e-8 never. This ends at about 32.
    Source: of such noise in masked diffusion, arXiv:2409.02908.
    """
    return jax.random.gumbel(key, shape, jnp.float32, mode="high")


@typed
def mixture(
    logits: Float[Array, "b m v"], keys: Key[Array, "b m"], sharpness: Float[Array, ""]
) -> Float[Array, "b m v"]:
    """A draw that is blurred: weights of all entries, the less blurred the nearer `sharpness` is to 1.

    softmax((logits (1 + sharpness) + Gumbel noise) / max(0.27 (1 - 0.95 sharpness), 0.005)): VAR's `more_smooth`, where
    sharpness rises from 0 at the first scale to 1 at the last.
    """
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
    blur = jnp.maximum(0.27 * (1 - 0.95 * sharpness), 0.005)
    return jax.nn.softmax((logits * (1 + sharpness) + noise) / blur)
