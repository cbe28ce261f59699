"""The dimension-wise head: the sub-codes of a token are drawn one after the other, each by its own step of a small transformer."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ar_jax.generators.rar import Placed
from ar_jax.heads.bitwise import alike, cross_entropy
from ar_jax.heads.categorical import draw
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import fold
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.mlp import norm, xavier
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, Layers, PRNGKey, Share, Tokens, typed


class Dimensions(Placed):
    """A `Placed` transformer with one norm more before the last, whose rows are the dimensions of one token."""

    def setup(self):
        super().setup()
        self.norm = norm(None, self.dtype)

    def before_last(self, x):
        return self.norm(x)


class ByDimension(nn.Module):
    """Sub-codes one after the other, in a fixed order: each is drawn given the hidden row and those before.

    The first row of the small transformer carries the hidden row, every other one the sub-code before it; a condition's
    vector that modulates all of them is the hidden row plus one of the dimension. Guidance acts on the hidden rows. The loss
    of a token is the mean cross entropy of its sub-codes in nats.

    Attributes:
      width, layers, heads: of the transformer.
      order: of the dimensions; () takes them as they come.
      plain_start: in training the first row is without its dimension's vector, which sampling adds to it: so the published
        weights were trained. Else both have it.
      dropout: rate in the transformer; active only when a "dropout" key is given to `apply`.
      codes: sizes of the sub-codes, all equal; () until the tokenizer is known (`complete`).
      dtype: of the matrix products; logits are float32.
      remat: what the backward pass computes again, see `Backbone`.
    Source: TokenBridge (arXiv:2503.16430).
    """

    width: int = 1024
    layers: Layers = 4
    heads: int = 8
    order: tuple[int, ...] = ()
    plain_start: bool = False
    dropout: Share = 0.0
    codes: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    remat: str = "none"

    no_decay = ("position", "embedding")

    def complete(self, spec: TokenSpec) -> "ByDimension":
        codes = alike(spec, "ByDimension")
        if self.order and sorted(self.order) != list(range(len(codes))):
            raise ValueError(
                f"head.order is {self.order}; it must have each of the tokenizer's {len(codes)} sub-codes once, or be ()"
            )
        return self.clone(codes=codes)

    def setup(self):
        k, v, table = len(self.codes), self.codes[0], nn.initializers.normal(0.02)
        self.condition = Linear(self.width, self.dtype, None, xavier, bias=True)
        self.net = Dimensions(
            self.layers, self.width, self.heads, self.dtype, self.remat, rows=k, dropout=self.dropout
        )  # fmt: skip
        self.position = self.param("position", table, (k, self.width))
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (max(k - 1, 1), v, self.width))
        each = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=(0,))
        self.kernel = self.param("kernel", each, (k, self.width, v))
        self.bias = self.param("bias", nn.initializers.zeros, (k, v))

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return *Dimensions(self.layers, self.width, self.heads).rules, (r"head/kernel$", P(None, "tp", None))

    @property
    def ordered(self) -> np.ndarray:
        """Which dimension is drawn when, int [k]."""
        return np.array(self.order or range(len(self.codes)))

    @typed
    def __call__(self, h: Float[Array, "b m d"], target: Int[Array, "b m k"]) -> Float[Array, "b m k v"]:
        """Logits of all sub-codes, float32, in the order they are drawn in, given those before as `target` has them."""
        b, m, k = target.shape
        c = constrain(self.condition(h).reshape(b * m, -1), BATCH)
        before = target.reshape(b * m, k)[:, self.ordered[:-1]]
        rows = jnp.concatenate([c[:, None], self.embedded(before, np.arange(k - 1)).astype(c.dtype)], axis=1)
        if not self.plain_start:
            rows = rows.at[:, 0].add(self.net.place[0].astype(c.dtype))
        y, _ = self.net((rows + self.position).astype(c.dtype), Rows(jnp.arange(k)), mod=c)
        y = jnp.einsum(
            "rkw,kwv->rkv", y, self.kernel.astype(y.dtype), preferred_element_type=jnp.float32
        )  # fmt: skip
        return (y + self.bias).reshape(b, m, k, -1)

    @typed
    def loss(
        self, h: Float[Array, "b m d"], target: Int[Array, "b m k"], *, key: PRNGKey | None = None
    ) -> Float[Array, "b m"]:
        """Cross entropy in nats, a mean over sub-codes; `key` is unused."""
        return cross_entropy(self(h, target), target[..., self.ordered]).mean(-1)

    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index, tokenizer: Any = None
    ) -> Tokens:
        """Draws all sub-codes of step `i`'s rows; guided rows (B = b * ways) are folded first.

        Raises:
          ValueError: mixtures of all codes are asked for.
        """
        if knobs.soften is not None:
            raise ValueError("sampling.soften is set, but ByDimension draws each sub-code by itself; leave it out")
        return self.decide(h, keys, knobs, i)[0]

    def decide(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index
    ) -> tuple[Int[Array, "b m k"], Float[Array, "b m"]]:
        """Draws all sub-codes of step `i`'s rows, and their log-probability among those that the filter leaves."""
        (b, m), k = keys.shape, len(self.codes)
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        c = constrain(self.condition(fold(h, len(h) // b, guidance)).reshape(b * m, -1), BATCH)

        @functools.partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
        def body(head, carry, j):
            x, cache = carry
            rows = Rows(j[None], first=j, keys=np.arange(k))
            y, cache = head.net((x + head.position[j])[:, None].astype(c.dtype), rows, mod=c, cache=cache)
            kernel = head.kernel[j].astype(y.dtype)
            logits = jnp.dot(y[:, 0], kernel, preferred_element_type=jnp.float32) + head.bias[j]
            logits = knobs.filter(logits / jnp.where(temperature > 0, temperature, 1)).reshape(b, m, -1)
            token = head.pick(logits, keys, j, temperature)
            x = head.embedded(token.reshape(b * m, 1), jnp.minimum(j, max(k - 2, 0))[None])[:, 0]
            return (x.astype(c.dtype), cache), (token, -cross_entropy(logits, token))

        start = c + self.net.place[0].astype(c.dtype)
        cache = self.net.empty_cache(b * m).grow(k)
        _, (tokens, likely) = body(self, (start, cache), jnp.arange(k))
        inverse = np.argsort(self.ordered)
        return jnp.moveaxis(tokens, 0, -1)[..., inverse], likely.sum(0)

    def pick(
        self, logits: Float[Array, "b m v"], keys: Key[Array, "b m"], j: Index, temperature: Float[Array, ""]
    ) -> Int[Array, "b m"]:
        """Draws the sub-code that comes j-th; its key is the token's with j folded in."""
        return draw(logits, jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, j)))(keys), temperature)

    def embedded(self, tokens: Int[Array, "r j"], which: Int[Array, "j"]) -> Float[Array, "r j w"]:
        """Vectors of sub-codes that come at these numbers."""
        table = self.embedding.reshape(-1, self.width)
        return look_up(table, tokens + which * self.codes[0])
