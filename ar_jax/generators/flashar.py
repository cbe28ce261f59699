"""FlashAR: a trained raster model that learns to draw by diagonals, as NAR does, in a short second training.

`Neighbouring(Branched(..., ahead=1), Label(...), Fused())`, begun as a run of `Causal` with a `Transformer` (`--generator.start`): the
branch begins as the last layers of the trunk, its norm and readout as those of the trunk (`alike`). A gate decides for every token
how much the neighbour beside it and how much the one above says.

Source: FlashAR (arXiv:2605.09430).
"""

from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ar_jax.generators.nar import ByAxis
from ar_jax.nets.linear import Linear
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Blocks, Float, Int, PRNGKey, Share, Within, typed

Weight = Annotated[float, Within(0, 2**16)]


class Fused(ByAxis):
    """As `ByAxis`, but of two neighbours the one beside has a learned part in a token's logits, the one above the rest.

    Attributes:
      mix: the part is found for every token by a small network from both logits ("gate"), or one number ("scalar").
      hidden: width of that network; 0 is 1/512 of the codebook, at least 32.
      collapse: weight in the loss of 1 - entropy of the part in bits, for tokens with two neighbours.
      apart: both neighbours learn the token by themselves, the one beside with this weight, the one above with the rest;
        None trains what they say together.
      column: with `apart`, what the tokens of the first column but its first weigh more.
      others: see `ByAxis`.
    """

    mix: Literal["gate", "scalar"] = "gate"
    hidden: Blocks = 0
    collapse: Weight = 0.0
    apart: Share | None = None
    column: Weight = 0.0

    def complete(self, spec: TokenSpec) -> "Fused":
        if self.mix not in ("gate", "scalar"):
            raise ValueError(f"head.mix is {self.mix!r}; it must be gate or scalar")
        if self.column and self.apart is None:
            raise ValueError(f"head.column is {self.column}, but head.apart is None; give both")
        if self.chunk or self.smoothing or self.z_loss:
            raise ValueError(
                f"head has chunk {self.chunk}, smoothing {self.smoothing} and z_loss {self.z_loss}, which Fused has not; give 0"
            )
        found = super().complete(spec)
        if found.axes != 2:
            raise ValueError(f"Fused has two neighbours beside and above, but tokens of {found.axes} axes have more")
        return found

    def setup(self):
        super().setup()
        if self.mix == "scalar":
            self.part = self.param("part", nn.initializers.zeros, ())
            return
        begin = nn.initializers.normal((2 * self.codes) ** -0.5)
        self.gate_in = Linear(self.hidden or max(32, self.codes // 512), kernel_init=begin)
        self.gate_out = Linear(1, kernel_init=nn.initializers.zeros, bias=True)

    def shares(self, logits: Float[Array, "B m 2 v"], there: Float[Array, "B m 2"]) -> Float[Array, "B m 2"]:
        part = jnp.where(there.all(-1), self.beside(logits), there[..., 0])
        return jnp.stack([part, 1 - part], axis=-1)

    def beside(self, logits: Float[Array, "B m 2 v"]) -> Float[Array, "B m"]:
        """The part of the neighbour beside, where there are both; no gradient reaches the logits through it."""
        if self.mix == "scalar":
            return jnp.broadcast_to(nn.sigmoid(self.part.astype(jnp.float32)), logits.shape[:2])
        x = jnp.clip(lax.stop_gradient(logits.reshape(*logits.shape[:2], -1)), -30, 30)
        x = x - x.mean(-1, keepdims=True)
        x = jnp.clip(x * lax.rsqrt(jnp.maximum(jnp.square(x).mean(-1, keepdims=True), 1e-6)), -6, 6)
        return nn.sigmoid(self.gate_out(nn.silu(self.gate_in(x)))[..., 0])

    @typed
    def loss(
        self, h: Float[Array, "b m f"], target: Int[Array, "b m 1"], *, key: PRNGKey | None = None
    ) -> Float[Array, "b m"]:
        """Cross entropy in nats, of both together or of each (`apart`), and `collapse`; `key` is unused."""
        logits, there = self.by_axis(h)
        if self.apart is None:
            loss = self.cross_entropy((logits * self.shares(logits, there)[..., None]).sum(-2), target)
        else:
            each = self.cross_entropy(logits, target[..., None, :])
            loss = self.separate(each, there, jnp.ones(target.shape[:2]))
        return loss + self.collapse * self.collapsed(logits, there) if self.collapse else loss

    def separate(
        self, each: Float[Array, "b m 2"], there: Float[Array, "b m 2"], valid: Float[Array, "b m"]
    ) -> Float[Array, "b m"]:
        """What has the mean, over valid tokens, that the means over the tokens of each neighbour have together."""
        there = there * valid[..., None]
        first = (there[..., 1] > 0) & (there[..., 0] == 0)
        weight = jnp.array([self.apart, 1 - self.apart]) * there / there.sum((0, 1))
        weight = weight.at[..., 1].add(self.column * first / jnp.maximum(first.sum(), 1))
        return valid.sum() * (weight * each).sum(-1)

    def collapsed(self, logits: Float[Array, "b m 2 v"], there: Float[Array, "b m 2"]) -> Float[Array, ""]:
        """1 - mean entropy, in bits, of the part; of tokens with two neighbours, which the first one has not."""
        part = jnp.clip(self.beside(logits), 1e-6, 1 - 1e-6)
        bits = -(part * jnp.log2(part) + (1 - part) * jnp.log2(1 - part))
        inside = there.all(-1) & (jnp.arange(there.shape[1]) > 0)
        return 1 - (bits * inside).sum() / jnp.maximum(inside.sum(), 1)

    def cross_entropy(self, logits: Float[Array, "*b v"], target: Int[Array, "*#b 1"]) -> Float[Array, "*b"]:
        chosen = jnp.where(jnp.arange(self.codes) == target, logits, 0).sum(-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen
