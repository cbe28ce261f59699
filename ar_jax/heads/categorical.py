"""The categorical head: one softmax over a codebook."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.decode.guidance import fold
from ar_jax.decode.logits import draw
from ar_jax.nets.linear import Linear
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, typed


class Categorical(nn.Module):
    """A linear readout without bias, zero at the start, with float32 logits.

    Attributes:
      codes: size of the codebook; 0 until the tokenizer is known (`complete`).
      dtype: of the matrix product's inputs.
      output_major: layout of the readout for decoding (see `linear.output_major`).
    """

    codes: int = 0
    dtype: Any = jnp.float32
    output_major: bool = False

    def complete(self, spec: TokenSpec) -> "Categorical":
        if len(spec.codes) != 1:
            raise ValueError(
                f"Categorical needs tokens of one discrete code, but the tokenizer gives codes {spec.codes}"
            )
        return self.clone(codes=spec.codes[0])

    def setup(self):
        self.readout = Linear(self.codes, self.dtype, jnp.float32, nn.initializers.zeros, self.output_major)

    @typed
    def __call__(self, h: Float[Array, "B m d"]) -> Float[Array, "B m v"]:
        """Logits, float32."""
        return self.readout(h)

    def loss(self, h: Float[Array, "b m d"], target: Int[Array, "b m 1"]) -> Float[Array, "b m"]:
        """Cross entropy in nats."""
        logits = self(h)
        chosen = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    def sample(self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index) -> Int[Array, "b m 1"]:
        """Draws a code per row of step `i`; guided rows (B = b * ways) are folded first."""
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]
        logits = fold(self(h), h.shape[0] // keys.shape[0], guidance) / jnp.maximum(temperature, 1e-5)
        return draw(knobs.logits_fn(logits), keys, temperature)[..., None]
