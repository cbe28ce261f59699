"""The network of per-token heads: what moves a noisy token, given a hidden row and the time."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.linear import Linear
from ar_jax.typing import Array, Float, typed

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros
FREQUENCIES = 256  # numbers of the time's embedding


@typed
def sinusoids(t: Float[Array, "*b"], features: int = FREQUENCIES, base: float = 10000.0) -> Float[Array, "*b f"]:
    """Cosines, then sines, of a time in [0, 1000] at geometric frequencies 1..1/base, float32."""
    half = features // 2
    angle = t[..., None] * np.exp(-np.log(base) * np.arange(half, dtype=np.float32) / half).astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time through a two-layer perceptron; `features` of them, down to a frequency of 1/base."""

    width: int
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.normal(0.02)
    features: int = FREQUENCIES
    base: float = 10000.0

    @nn.compact
    @typed
    def __call__(self, t: Float[Array, "*b"]) -> Float[Array, "*b w"]:
        y = constrain(sinusoids(t, self.features, self.base), BATCH).astype(self.dtype)
        for name in ("fc1", "fc2"):
            y = nn.silu(y) if name == "fc2" else y
            y = Linear(self.width, self.dtype, None, self.kernel_init, bias=True, name=name)(y)
        return y


class ModulatedBlock(nn.Module):
    """Norm, shift and scale from the condition, two linear layers, gate; plus the input."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x, y):
        def dense(features, kernel_init, name):
            return Linear(features, self.dtype, None, kernel_init, bias=True, name=name)

        shift, scale, gate = jnp.split(dense(3 * self.width, zeros, "modulation")(nn.silu(y)), 3, axis=-1)
        h = norm("norm", self.dtype)(x) * (1 + scale) + shift
        h = dense(self.width, xavier, "fc2")(nn.silu(dense(self.width, xavier, "fc1")(h)))
        return constrain(x + gate * h, BATCH), None


class ModulatedMLP(nn.Module):
    """Residual blocks modulated by a condition and a time; gives zeros at the start.

    Attributes:
      width, depth: of the blocks.
      out: numbers of the result.
      dtype: of the matrix products; the result is float32.
      remat: "full" computes the blocks again in the backward pass, "none" keeps what it needs.
    Source: MAR (arXiv:2406.11838).
    """

    width: int
    depth: int
    out: int
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b *m c"], t: Float[Array, "b *m"], h: Float[Array, "b *#m d"]
    ) -> Float[Array, "b *m o"]:
        """For noisy tokens x of b images, their time in [0, 1000], and hidden rows h.

        Images come first so that gradients of weights are sums over the devices' own: with another axis before, the compiler
        gathers all rows on every device.
        """

        def dense(features, kernel_init, name, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, kernel_init, bias=True, name=name)

        y = TimeEmbedding(self.width, self.dtype, name="time")(t) + dense(self.width, xavier, "condition")(h)
        x, y = constrain(dense(self.width, xavier, "input")(x), BATCH), constrain(y, BATCH)
        block = nn.remat(ModulatedBlock, prevent_cse=False) if self.remat == "full" else ModulatedBlock
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
        )
        x, _ = blocks(self.width, self.dtype, name="blocks")(x, y)
        shift, scale = jnp.split(dense(2 * self.width, zeros, "modulation")(nn.silu(y)), 2, axis=-1)
        x = norm(None, self.dtype, affine=False)(x) * (1 + scale) + shift
        # a diffusion's noisiest levels count an error of the noise up to 20,000 times
        return dense(self.out, zeros, "output", jnp.float32)(x)


def norm(name: str | None, dtype: Any, affine: bool = True) -> nn.LayerNorm:
    # use_fast_variance loses digits where the mean is large against the spread
    return nn.LayerNorm(
        epsilon=1e-6, use_bias=affine, use_scale=affine, dtype=dtype, use_fast_variance=False, name=name
    )
