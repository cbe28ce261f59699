"""Diffusion of bits over continuous times: Instella-T2I's second generator."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.base import Conditioning, Frozen, image_weight
from ar_jax.generators.binary_diffusion import TossedBits, ratio
from ar_jax.heads.bitwise import cross_entropy
from ar_jax.machine import shares
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.head_rms import init
from ar_jax.nets.linear import Linear
from ar_jax.nets.reader import TimedReader
from ar_jax.orders import Order
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Int, Metrics, PRNGKey, Within, typed


class BitFlips(TossedBits):
    """Which bits are wrong is predicted, for all tokens at once, of bits of which a part t was tossed anew, t in [0, 1].

    Sampling goes from coin tosses, t = 1, through as many times as the order has steps (`Denoised`).

    Attributes:
      backbone: the network.
      conditioning: what it reads (`LayeredCaption` without a start, `Label`).
      rule: bits of the next time u are tossed anew from those that are predicted ("anew"), or kept from those of now unless a part
        t - u of them was tossed since ("kept").
      bend: step i of N is at the time (1 - i / N) to this power.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: Instella-T2I (arXiv:2506.21022).
    """

    backbone: TimedReader
    conditioning: Conditioning
    rule: Literal["anew", "kept"] = "anew"
    bend: Annotated[float, Within(1e-3, 1e3)] = 1.0
    spec: TokenSpec | None = None

    adjustable = ("rule", "bend")

    def setup(self):
        if self.rule not in ("anew", "kept"):
            raise ValueError(f"generator.rule is {self.rule!r}; it must be anew or kept")
        dtype = self.backbone.dtype
        self.token = Linear(self.backbone.width, dtype, None, init, bias=True)
        self.flip = Linear(len(self.spec.codes), dtype, jnp.float32, init, bias=True)

    @typed
    def loss(
        self, tokens: Int[Array, "b n k"], batch: Batch, order: Order, *, drop: Bool[Array, "b"], key: PRNGKey,
        tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:  # fmt: skip
        """Cross entropy of the bits at a time drawn for every image: the logistic function of a normal number.

        Args: as of `BinaryDiffusion`.
        """
        time_key, toss_key = jax.random.split(key)
        t = jax.nn.sigmoid(shares.draw(jax.random.normal, time_key, (len(tokens),)))
        noisy = self.noised(tokens, t, shares.draw(jax.random.uniform, toss_key, tokens.shape))
        logits = self.logits(noisy, t, self.condition(batch, drop))
        weight = image_weight(batch, len(tokens))[:, None] * jnp.ones(tokens.shape[:2])
        return self.errors(tokens, noisy, logits), weight, {"wrong": ((logits > 0) != (noisy != tokens)).mean()}

    def noised(
        self, tokens: Int[Array, "b n k"], t: Float[Array, "b"], uniform: Float[Array, "b n k"]
    ) -> Int[Array, "b n k"]:
        """Bits at times, from uniform numbers."""
        return (uniform < tossed(tokens, t[:, None, None])).astype(jnp.int32)

    def logits(self, noisy: Int[Array, "b n k"], t: Float[Array, "b"], cond: Cond) -> Float[Array, "B n k"]:
        ways = len(cond.rows) // len(noisy)
        x = self.token(widen(noisy.astype(jnp.float32), ways))
        return self.flip(self.backbone(x, widen(t, ways), mod=cond.mod))

    def errors(
        self, tokens: Int[Array, "b n k"], noisy: Int[Array, "b n k"], logits: Float[Array, "b n k"]
    ) -> Float[Array, "b n"]:
        """Loss of every token: mean cross entropy of which of its bits are wrong, which is that of the bits."""
        both = jnp.stack([jnp.zeros_like(logits), logits], axis=-1)
        return cross_entropy(both, (tokens != noisy).astype(jnp.int32)).mean(-1)

    def visited(self, steps: int) -> np.ndarray:
        return ((1 - np.arange(steps) / steps) ** self.bend).astype(np.float32)

    def earlier(self, p: Float[Array, "b n k"], noisy: Int[Array, "b n k"], t: Array, u: Array) -> Float[Array, "b n k"]:
        if self.rule == "anew":
            return tossed(p, u)
        return ratio(p, noisy, 1 - u, 1 - (t - u), 0.0)


def tossed(p: Array, t: Array) -> Array:
    """Probability of a 1 at time t, given that at time 0."""
    return (1 - t) * p + t / 2
