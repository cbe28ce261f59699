"""The bitwise head: all bits of a token are drawn at once, each from two logits of its own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ar_jax.heads.categorical import draw
from ar_jax.machine.sharding import Rules
from ar_jax.nets.conditioning import fold
from ar_jax.nets.linear import Linear
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, PRNGKey, Tokens, typed


class Bitwise(nn.Module):
    """A linear readout with float32 logits of every sub-code, which are drawn independently of each other.

    The loss of a token is the mean cross entropy of its sub-codes in nats.

    Attributes:
      codes: sizes of the sub-codes, all equal (2 for bits); () until the tokenizer is known (`complete`).
      dtype: of the matrix product's inputs.
      bias: the readout has one.
      std: of the readout at the start.
      single: one logit of every bit, that of a 1, where a 0 has the logit 0.
    Source: Infinity (arXiv:2412.04431); with single logits Instella-T2I (arXiv:2506.21022).
    """

    codes: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    bias: bool = True
    std: float = 0.02
    single: bool = False

    def complete(self, spec: TokenSpec) -> "Bitwise":
        codes = alike(spec, "Bitwise")
        if self.single and codes[0] != 2:
            raise ValueError(f"head.single is True, but the tokenizer gives codes {codes[:8]}; only bits have single logits")
        return self.clone(codes=codes)

    def setup(self):
        begin = nn.initializers.normal(self.std) if self.std else nn.initializers.zeros
        logits = len(self.codes) if self.single else sum(self.codes)
        self.readout = Linear(logits, self.dtype, jnp.float32, begin, bias=self.bias)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return ((r"/readout/kernel$", P(None, "tp")),)

    @typed
    def __call__(self, h: Float[Array, "B m d"]) -> Float[Array, "B m k v"]:
        """Logits, float32."""
        logits = self.readout(h).reshape(*h.shape[:2], len(self.codes), -1)
        return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1) if self.single else logits

    @typed
    def loss(
        self, h: Float[Array, "b m d"], target: Int[Array, "b m k"], *, key: PRNGKey | None = None
    ) -> Float[Array, "b m"]:
        """Cross entropy in nats, a mean over sub-codes; `key` is unused."""
        return cross_entropy(self(h), target).mean(-1)

    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index, tokenizer: Any = None
    ) -> Tokens:
        """Draws all sub-codes of step `i`'s rows; guided rows (B = b * ways) are folded first.

        Raises:
          ValueError: mixtures of all codes are asked for.
        """
        if knobs.soften is not None:
            raise ValueError(
                "sampling.soften is set, but Bitwise draws bits, of which nothing can be mixed; leave it out"
            )
        return self.draw(self.filtered(h, len(keys), knobs, i), keys, knobs, i)

    def decide(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index
    ) -> tuple[Int[Array, "b m k"], Float[Array, "b m"]]:
        """Draws all sub-codes of step `i`'s rows, and their log-probability among those that the filter leaves."""
        logits = self.filtered(h, len(keys), knobs, i)
        tokens = self.draw(logits, keys, knobs, i)
        return tokens, -cross_entropy(logits, tokens).sum(-1)

    def draw(self, logits: Float[Array, "b m k v"], keys: Key[Array, "b m"], knobs, i: Index) -> Int[Array, "b m k"]:
        """Draws from `filtered` logits; a sub-code's key is the token's with its number folded in."""
        each = jax.vmap(jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(self.codes)))))
        b, m, k, v = logits.shape
        drawn = draw(logits.reshape(b, m * k, v), each(keys).reshape(b, m * k), jnp.asarray(knobs.temperature)[i])
        return drawn.reshape(b, m, k)

    def filtered(self, h: Float[Array, "B m d"], images: int, knobs, i: Index) -> Float[Array, "b m k v"]:
        """Logits of step `i` that a draw is made from: guided, divided by the temperature (unless it is 0), filtered."""
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        logits = fold(self(h), h.shape[0] // images, guidance)
        logits = logits / jnp.where(temperature > 0, temperature, 1)
        b, m, k, v = logits.shape
        return knobs.filter(logits.reshape(b, m * k, v)).reshape(b, m, k, v)


def alike(spec: TokenSpec, head: str) -> tuple[int, ...]:
    """Sizes of the sub-codes.

    Raises:
      ValueError: tokens are continuous, or sub-codes differ in size.
    """
    if len(set(spec.codes)) != 1:
        raise ValueError(f"{head} needs tokens of sub-codes of one size, but the tokenizer gives codes {spec.codes}")
    return spec.codes


@typed
def cross_entropy(logits: Float[Array, "*b v"], target: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Of each sub-code, in nats."""
    # not a gather: logits may be divided over devices
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def by_scale(spec: TokenSpec) -> Float[Array, "n"]:
    """Weight of every slot in Infinity's training, with sum 1: slots of coarse scales, which are few, count more.

    Proportional to the root of (area of the last scale / area of the slot's own).
    """
    area = jnp.array([height * width for height, width in spec.scales], jnp.float32)
    weight = jnp.sqrt(area[-1] / area)[spec.coords[:, 0]]
    return weight / weight.sum()
