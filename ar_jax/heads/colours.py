"""The head of single pixels: their values one after the other."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.heads.categorical import Categorical, draw
from ar_jax.heads.factorised import Factorised
from ar_jax.machine.sharding import Rules
from ar_jax.nets.conditioning import fold
from ar_jax.nets.fractal import Enclosed
from ar_jax.nets.linear import Linear, look_up, product
from ar_jax.nets.mlp import xavier
from ar_jax.nets.transformer import init
from ar_jax.tokenizers.pixels import patch_of
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, Many, PRNGKey, Share, typed

# What a place hands on: its hidden row alone, [B m d], or beside its neighbours', [B m r d].
Handed = Float[Array, "B m d"] | Float[Array, "B m r d"]


class Tied(Categorical):
    """A readout by the table that codes are looked up in, and an offset of every code.

    Attributes:
      width: of the table.
      others: see `Categorical`.
    """

    width: Many = 0

    no_decay = ("offset",)

    def setup(self):
        self.embedding = self.param("embedding", init, (self.codes, self.width))
        self.offset = self.param("offset", nn.initializers.zeros, (self.codes,))

    @typed
    def __call__(self, h: Float[Array, "B m d"]) -> Float[Array, "B m v"]:
        return product(h.astype(self.dtype), jnp.asarray(self.embedding).T, jnp.float32) + self.offset


class Colours(Factorised):
    """The values of a pixel one after the other, red, green, blue: a small causal network whose tables are its readouts too.

    Guided, a value whose conditional probability is below `threshold` gets at least that share of the likeliest one without the
    condition as well, so that guidance never raises it.

    Attributes:
      net: the network.
      red: what the first value weighs in the training's loss, beside the others' 1.
      threshold: see above.
      others: see `Factorised`.
    Source: FractalGen (arXiv:2502.17437).
    """

    net: Enclosed
    projected: bool = True
    red: float = 5.0
    threshold: Share = 1e-4

    adjustable = ("threshold",)

    def complete(self, spec: TokenSpec) -> "Colours":
        if (side := patch_of(spec.codes)[1]) != 1:
            raise ValueError(f"Colours draws single pixels, but tokens are patches of {side}x{side}; use Inside")
        return super().complete(spec)

    @property
    def dtype(self) -> Any:
        return self.net.dtype

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.net.rules

    def setup(self):
        self.readouts = [Tied(size, self.net.dtype, width=self.net.width) for size in self.codes]
        self.condition = Linear(self.net.width, self.net.dtype, None, xavier, bias=True)

    @typed
    def loss(
        self, h: Handed, target: Int[Array, "b m k"], *, key: PRNGKey | None = None, weight: Array | None = None
    ) -> Float[Array, "b m"]:
        """Cross entropy in nats, a weighted mean over the values; `key` and `weight` are unused."""
        first, *others = self.each(h, target)
        return (self.red * first + sum(others)) / (self.red + len(others))

    def nats(self, h: Handed, target: Int[Array, "b m k"], *, key: PRNGKey | None = None) -> Float[Array, "b m"]:
        """Minus the log-probability of every pixel."""
        return sum(self.each(h, target))

    def each(self, h: Handed, target: Int[Array, "b m k"]) -> list[Float[Array, "b m"]]:
        """Cross entropy of every value."""
        each = zip(self.readouts, self._forced(h, target), self.ordered)
        return [readout.loss(x, target[..., i : i + 1]) for readout, x, i in each]

    def draw(
        self, j: int, y: Float[Array, "B m w"], keys: Key[Array, "b m"], knobs, i: Index
    ) -> tuple[Int[Array, "b m 1"], Float[Array, "b m"]]:
        logits, temperature = self.readouts[j](y), jnp.asarray(knobs.temperature)[i]
        logits, ways = logits / jnp.where(temperature > 0, temperature, 1), len(y) // len(keys)
        if ways > 1:
            cond, uncond = logits[::2], logits[1::2]
            floor = cond + (uncond.max(-1, keepdims=True) - cond.max(-1, keepdims=True))
            rare = jax.nn.softmax(cond) < self.threshold
            uncond = jnp.where(rare, jnp.maximum(uncond, floor), uncond)
            logits = fold(jnp.stack([cond, uncond], 1).reshape(logits.shape), ways, jnp.asarray(knobs.guidance)[i])
        logits = knobs.filter(logits)
        token = self.pick(logits, keys, temperature)[..., None]
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token, axis=-1)[..., 0]

    def pick(
        self, logits: Float[Array, "b m v"], keys: Key[Array, "b m"], temperature: Float[Array, ""]
    ) -> Int[Array, "b m"]:
        """A draw from logits."""
        return draw(logits, keys, temperature)

    def _first(self, h):
        return super()._first(h[:, :, 0] if h.ndim == 4 else h)

    def _vector(self, j, index):
        return look_up(self.readouts[j].embedding, index)
