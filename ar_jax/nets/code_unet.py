"""The convolutional U-Net of VQ-DDM, on a grid of codes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.nets.conditioning import Cond
from ar_jax.nets.positions import waves
from ar_jax.tokenizers.conv import init as conv_init
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Int, Many, Steps, typed


def mish(x: Array) -> Array:
    return x * jnp.tanh(jax.nn.softplus(x))


class ResBlock(nn.Module):
    """A convolution, a norm and Mish, twice, with the time in between, plus the (projected) input."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], time: Float[Array, "b d"]) -> Float[Array, "b h w f"]:
        y = Part(self.features, self.groups, self.dtype, name="part1")(x)
        told = nn.Dense(self.features, kernel_init=conv_init, dtype=self.dtype, name="time")(mish(time))
        y = Part(self.features, self.groups, self.dtype, name="part2")(y + told[:, None, None])
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, kernel_init=conv_init, dtype=self.dtype, name="project")(x)
        return x + y


class Part(nn.Module):
    """A convolution, a norm and Mish."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = conv(self.features, self.dtype, "conv")(x)
        norm = nn.GroupNorm(self.groups, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")
        return mish(norm(x))


class LinearAttention(nn.Module):
    """Attention whose weights are of places alone: what every head gathers from the grid, each place takes by its query.

    It begins as nothing, by the factor `gain`.
    """

    heads: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        inner = self.heads * self.features
        y = nn.Dense(3 * inner, use_bias=False, kernel_init=conv_init, dtype=self.dtype, name="qkv")(x)
        y = y.reshape(len(x), -1, 3, self.heads, self.features)
        q, k, v = jnp.moveaxis(y, 2, 0)
        weights = jax.nn.softmax(k.astype(jnp.float32), axis=1).astype(self.dtype)
        gathered = jnp.einsum("bphd,bphe->bhde", weights, v)
        y = jnp.einsum("bhde,bphd->bphe", gathered, q).reshape(*x.shape[:3], inner)
        y = nn.Dense(x.shape[-1], kernel_init=conv_init, dtype=self.dtype, name="out")(y)
        return x + (self.param("gain", nn.initializers.zeros, (1,)) * y).astype(x.dtype)


def conv(features: int, dtype: Any, name: str, **options: Any) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, kernel_init=conv_init, dtype=dtype, name=name, **options)


class CodeUNet(nn.Module):
    """Predicts clean codes from spoilt ones.

    Attributes:
      width: of the tokens' vectors and of the finest level.
      mult: channels of each level, in units of `width`; the first is 1, and every level after it has half the sides.
      groups: of the norms.
      heads, features: of the linear attention.
      times, states, codes, grid: filled in by the generator.
      dtype: of the products' inputs; parameters stay float32.
    Source: VQ-DDM (arXiv:2112.01799). Classes are ours: a class's vector (`Label`) is added to that of the time.
    """

    width: int = 128
    mult: tuple[int, ...] = (1, 2, 4, 8)
    groups: int = 8
    heads: int = 4
    features: int = 32
    dtype: Any = jnp.float32
    times: Steps = 1
    states: Many = 0
    codes: Many = 0
    grid: tuple[Many, Many] = (0, 0)

    rules: Rules = ()  # its products are too small to be divided

    def complete(self, spec: TokenSpec) -> "CodeUNet":
        grid, shrink = spec.scales[0], 2 ** (len(self.mult) - 1)
        if self.mult[0] != 1:
            raise ValueError(f"backbone.mult is {self.mult}; it must begin with 1")
        if any(side % shrink for side in grid):
            raise ValueError(
                f"backbone.mult has {len(self.mult)} levels, but the grid of {grid[0]}x{grid[1]} tokens cannot be halved "
                f"{len(self.mult) - 1} times; give fewer"
            )
        return self.clone(codes=spec.codes[0], grid=grid)

    def modulate(self, vector: Array | None) -> Array | None:
        return vector

    @nn.compact
    @typed
    def predict(self, noisy: Int[Array, "B n"], t: Int[Array, "B"], cond: Cond) -> Float[Array, "B n v"]:
        """Logits of the clean codes, float32."""

        def dense(features, name):
            return nn.Dense(features, kernel_init=conv_init, dtype=self.dtype, name=name)

        def level(x, features, name):
            x = ResBlock(features, self.groups, self.dtype, name=f"{name}_res1")(x, time)
            x = ResBlock(features, self.groups, self.dtype, name=f"{name}_res2")(x, time)
            return LinearAttention(self.heads, self.features, self.dtype, name=f"{name}_attention")(x)

        last = len(self.mult) - 1
        time = dense(4 * self.width, "time1")(waves(t / self.times * 4000, self.width))
        time = dense(self.width, "time2")(mish(time))
        if cond.mod is not None:
            time = time + cond.mod.astype(time.dtype)
        table = self.param("embedding", nn.initializers.normal(1.0), (self.states, self.width))
        x = table[noisy].reshape(len(noisy), *self.grid, -1).astype(self.dtype)
        skips = []
        for i, mult in enumerate(self.mult):
            x = level(x, mult * self.width, f"down{i}")
            skips.append(x)
            if i < last:
                x = conv(x.shape[-1], self.dtype, f"down{i}_half", strides=2)(x)
        wide = x.shape[-1]
        x = ResBlock(wide, self.groups, self.dtype, name="middle_res1")(x, time)
        x = LinearAttention(self.heads, self.features, self.dtype, name="middle_attention")(x)
        x = ResBlock(wide, self.groups, self.dtype, name="middle_res2")(x, time)
        for i in range(last, 0, -1):  # the finest level's rows are not used again, as published
            x = level(jnp.concatenate([x, skips[i]], axis=-1), self.mult[i - 1] * self.width, f"up{i}")
            double = nn.ConvTranspose(
                x.shape[-1], (4, 4), strides=(2, 2), padding="SAME", kernel_init=conv_init, dtype=self.dtype,
                name=f"up{i}_double",
            )  # fmt: skip
            x = double(x)
        x = Part(self.width, self.groups, self.dtype, name="last")(x)
        return dense(self.codes, "readout")(x).astype(jnp.float32).reshape(*noisy.shape, -1)
