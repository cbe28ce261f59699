"""The convolutional encoder and decoder of the VQGAN family, NHWC."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import Rules
from ar_jax.typing import Array, Float, Params, PRNGKey, typed

init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # the +-1/sqrt(fan_in) these networks start from


# Inside a block the first product divides its outputs, the last one its inputs; between blocks all channels are whole.
RESIDUAL: Rules = (  # of networks without attention
    (r"coder/\w+/conv1/kernel$", P(None, "tp")),
    (r"coder/\w+/(conv1/bias|norm2/(scale|bias))$", P("tp")),
    (r"coder/\w+/conv2/kernel$", P("tp", None)),
)
RULES: Rules = (
    *RESIDUAL,
    (r"coder/\w+/[qkv]/kernel$", P(None, "tp")),
    (r"coder/\w+/proj_out/kernel$", P("tp", None)),
)


class Convolutional:
    """What tokenizers around `Encoder` and `Decoder` share; for modules with fields `size`, `mult` and `channels`."""

    last_layer = "decoder/conv_out/kernel"

    @property
    def downsample(self) -> int:
        """Pixels of an image for one of the latent, a side."""
        return 2 ** (len(self.mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latent."""
        if any(side % self.downsample for side in self.size):
            raise ValueError(f"tokenizer.size must be multiples of {self.downsample} pixels, got {self.size}")
        return self.size[0] // self.downsample, self.size[1] // self.downsample

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return RULES

    def init_params(self, key: PRNGKey) -> Params:
        return self.init(key, jnp.zeros((1, *self.size, self.channels)), method="autoencode")["params"]


class ResBlock(nn.Module):
    """norm, swish, 3x3 convolution, twice, plus the (projected) input; `bias` is of the convolutions."""

    features: int
    groups: int
    dtype: Any
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        y, net = x, {"kernel_init": init, "dtype": self.dtype, "use_bias": self.bias}
        for i in (1, 2):
            y = nn.silu(norm(self.groups, self.dtype, name=f"norm{i}")(y))
            y = nn.Conv(self.features, (3, 3), **net, name=f"conv{i}")(y)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), **net, name="nin_shortcut")(x)
        return x + y


class AttnBlock(nn.Module):
    """Single-head attention over all pixels, plus the input."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = norm(self.groups, self.dtype, name="norm")(x)
        q, k, v = (nn.Dense(x.shape[-1], kernel_init=init, dtype=self.dtype, name=name)(y) for name in "qkv")
        logits = jnp.einsum("bhwc,byxc->bhwyx", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits, axis=(-2, -1)).astype(self.dtype)
        y = jnp.einsum("bhwyx,byxc->bhwc", weights, v)
        return x + nn.Dense(x.shape[-1], kernel_init=init, dtype=self.dtype, name="proj_out")(y)


class Encoder(nn.Module):
    """Image to latent grid, one stride-2 convolution between levels.

    Attributes:
      features: channels of the finest level.
      mult: channel multiplier of each level, fine to coarse; the image shrinks by 2^(levels-1).
      res_blocks: residual blocks per level.
      out: channels of the result; 0 leaves out the last norm and convolution, and gives what the middle blocks make.
      groups: of the group norms.
      attention: levels with an attention block after each residual block, 0 the finest, -1 the coarsest.
      middle: whether the middle has one too.
      last_silu: whether swish comes between the last norm and the last convolution.
    """

    features: int
    mult: tuple[int, ...]
    res_blocks: int
    out: int
    groups: int = 32
    dtype: Any = jnp.float32
    attention: tuple[int, ...] = (-1,)
    middle: bool = True
    last_silu: bool = True

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w z"]:
        x = conv3(self.features, self.dtype, name="conv_in")(x)
        for level, mult in enumerate(self.mult):
            x = blocks(self, x, level, mult, self.res_blocks)
            if level < len(self.mult) - 1:
                x = down(self, x, level)
        x = middle(self, x)
        return last(self, x, self.out) if self.out else x


class Decoder(nn.Module):
    """Latent grid to image; the mirror of `Encoder`, with one residual block more per level.

    Attributes: as `Encoder`; `mult` is fine to coarse here too.
    """

    features: int
    mult: tuple[int, ...]
    res_blocks: int
    out: int
    groups: int = 32
    dtype: Any = jnp.float32
    attention: tuple[int, ...] = (-1,)
    middle: bool = True
    last_silu: bool = True

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        x = conv3(self.features * self.mult[-1], self.dtype, name="conv_in")(x)
        x = middle(self, x)
        for level, mult in reversed(list(enumerate(self.mult))):
            x = blocks(self, x, level, mult, self.res_blocks + 1)
            if level > 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = conv3(x.shape[-1], self.dtype, name=f"up_{level}")(x)
        return last(self, x, self.out)


def norm(groups, dtype, name):
    # use_fast_variance loses digits where the mean is large against the spread
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def conv3(features, dtype, name, **options):
    return nn.Conv(features, (3, 3), kernel_init=init, dtype=dtype, name=name, **options)


# Pieces of an encoder or decoder `net`, for others that are put together of them in their `nn.compact` methods


def blocks(net: nn.Module, x: Array, level: int, mult: int, count: int) -> Array:
    """The residual blocks of a level, with its attention."""
    levels = len(net.mult)
    if any(not -levels <= i < levels for i in net.attention):
        raise ValueError(f"attention is {net.attention}; it must be levels, of which there are {levels}")
    attention = level in [i % levels for i in net.attention]
    for i in range(count):
        x = ResBlock(net.features * mult, net.groups, net.dtype, name=f"res_{level}_{i}")(x)
        if attention:
            x = AttnBlock(net.groups, net.dtype, name=f"attn_{level}_{i}")(x)
    return x


def down(net: nn.Module, x: Array, level: int) -> Array:
    """Half the size; what the convolution misses is added below and to the right only."""
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    return conv3(x.shape[-1], net.dtype, name=f"down_{level}", strides=2, padding="VALID")(x)


def middle(net: nn.Module, x: Array, end: str = "") -> Array:
    """The middle blocks; `end` tells apart those of several ends."""
    x = ResBlock(x.shape[-1], net.groups, net.dtype, name=f"mid{end}_0")(x)
    x = AttnBlock(net.groups, net.dtype, name=f"mid{end}_1")(x) if net.middle else x
    return ResBlock(x.shape[-1], net.groups, net.dtype, name=f"mid{end}_2")(x)


def last(net: nn.Module, x: Array, features: int, end: str = "") -> Array:
    """The last norm and convolution, float32; `end` as of `middle`."""
    x = norm(net.groups, net.dtype, name=f"norm_out{end}")(x)
    return conv3(features, net.dtype, name=f"conv_out{end}")(nn.silu(x) if net.last_silu else x).astype(jnp.float32)
