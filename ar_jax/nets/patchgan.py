"""PatchGAN discriminator and the adversarial losses of convolutional tokenizers."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import Rules
from ar_jax.typing import Array, Float, Params, typed


class PatchGan(nn.Module):
    """Judges overlapping patches of an image: 4x4 convolutions, batch norm, leaky ReLU.

    Batch statistics are an argument and a result: `{"norm1": {"mean": [c], "var": [c]}, ...}`, one entry for
    each convolution but the first and the last. Real and generated images are judged in separate calls, and
    published trainers carry the statistics through every call in training mode, the generator's too.

    Attributes:
      base_channels: of the first convolution; doubled by the next ones up to eightfold.
      num_layers: convolutions of stride 2.
      dtype: of the convolutions; batch norm and logits are float32.
    Source: pix2pix (arXiv:1611.07004) section 6.1.2, as in LlamaGen and FQGAN.
    """

    base_channels: int = 64
    num_layers: int = 3
    leaky_slope: float = 0.2
    batchnorm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`): outputs and inputs of pairs of convolutions.

        The first and the last stay whole: XLA (jaxlib 0.10) gives wrong gradients of them on meshes of three axes.
        """
        pairs = range(1, self.num_layers, 2)
        outputs, inputs = ("|".join(str(i + part) for i in pairs) for part in (0, 1))
        return (
            (
                (rf"discriminator/conv({outputs})/kernel$", P(None, "tp")),
                (rf"discriminator/conv({inputs})/kernel$", P("tp", None)),
            )
            if pairs
            else ()
        )

    def init_stats(self) -> Params:
        """Mean 0 and variance 1, before any training."""
        return {
            f"norm{i}": {"mean": jnp.zeros(self._width(i)), "var": jnp.ones(self._width(i))}
            for i in range(1, self.num_layers + 1)
        }

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b h w 3"], stats: Params, train: bool
    ) -> tuple[Float[Array, "b H W 1"], Params]:
        """Logits of patches, high for real ones.

        Args:
          x: images in [-1, 1].
          stats: running statistics, from `init_stats` or the call before.
          train: normalise by this batch and move the statistics towards it; otherwise use them as they are.
        """
        new_stats = {}
        x = nn.leaky_relu(self._conv(x, "conv0", self._width(0), 2, bias=True), self.leaky_slope)
        for i in range(1, self.num_layers + 1):
            x = self._conv(x, f"conv{i}", self._width(i), 2 if i < self.num_layers else 1)
            norm = BatchNorm(self.batchnorm_eps, name=f"norm{i}")
            x, new_stats[f"norm{i}"] = norm(x, stats[f"norm{i}"], train)
            x = nn.leaky_relu(x, self.leaky_slope)
        x = self._conv(x, f"conv{self.num_layers + 1}", 1, 1, bias=True)
        return x.astype(jnp.float32), new_stats

    def _width(self, i: int) -> int:
        return self.base_channels * min(2**i, 8)

    def _conv(self, x: Array, name: str, width: int, stride: int, bias: bool = False) -> Array:
        bound = (16 * x.shape[-1]) ** -0.5  # torch's initial biases
        return nn.Conv(
            width,
            (4, 4),
            stride,
            padding=1,
            use_bias=bias,
            dtype=self.dtype,
            name=name,
            kernel_init=nn.initializers.normal(0.02),
            bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
        )(x)


class BatchNorm(nn.Module):
    """Batch norm by torch's conventions: biased variance to normalise, unbiased in the running average."""

    eps: float

    @nn.compact
    def __call__(self, x: Array, stats: Params, train: bool) -> tuple[Array, Params]:
        scale = self.param("scale", lambda *a: 1 + nn.initializers.normal(0.02)(*a), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        mean, var = stats["mean"], stats["var"]
        if train:
            # Under jit the batch axis may be sharded; these are the means of the global batch all the same.
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            count = x.size // x.shape[-1]
            new = {"mean": mean, "var": var * count / max(count - 1, 1)}
            stats = jax.tree.map(lambda old, value: 0.9 * old + 0.1 * value, dict(stats), new)
        return (x - mean) * jax.lax.rsqrt(var + self.eps) * scale + bias, stats


def patchgan_params(weights: dict[str, np.ndarray]) -> tuple[Params, Params]:
    """Parameters and batch statistics of `PatchGan` from a torch state dict with keys `main.{i}.*`."""
    layers: dict[int, dict[str, np.ndarray]] = {}
    for key, value in weights.items():
        if match := re.fullmatch(r"main\.(\d+)\.(\w+)", key):
            layers.setdefault(int(match[1]), {})[match[2]] = np.asarray(value, np.float32)
    ordered = [layers[i] for i in sorted(layers)]
    convs = [layer for layer in ordered if layer["weight"].ndim == 4]
    norms = [layer for layer in ordered if "running_mean" in layer]
    if len(convs) < 3 or len(norms) != len(convs) - 2:
        raise ValueError(
            f"PatchGAN weights need keys main.* of convolutions and the batch norms between; got {sorted(weights)[:5]}"
        )
    params, stats = {}, {}
    for i, layer in enumerate(convs):
        params[f"conv{i}"] = {"kernel": layer["weight"].transpose(2, 3, 1, 0)}
        params[f"conv{i}"] |= {"bias": layer["bias"]} if "bias" in layer else {}
    for i, layer in enumerate(norms, 1):
        params[f"norm{i}"] = {"scale": layer["weight"], "bias": layer["bias"]}
        stats[f"norm{i}"] = {"mean": layer["running_mean"], "var": layer["running_var"]}
    return {"params": params}, stats


@typed
def hinge_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Pushes logits of real images above 1 and those of generated ones below -1."""
    return 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean())


@typed
def hinge_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Raises the logits of generated images."""
    return -fake.mean()


@typed
def vanilla_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Half the cross entropy of real against generated."""
    return 0.5 * (nn.softplus(-real).mean() + nn.softplus(fake).mean())


@typed
def non_saturating_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """LlamaGen's option of that name, to reproduce it only: `fake` has no influence on it."""
    return 0.5 * (_swapped(1.0, real) + _swapped(0.0, fake))


@typed
def non_saturating_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """LlamaGen's option of that name."""
    return _swapped(1.0, fake)


@typed
def averaged_discriminator(real: Float[Array, "b ..."], fake: Float[Array, "b ..."]) -> Float[Array, ""]:
    """Cross entropy of real against generated, of logits averaged over each image."""
    return (nn.softplus(-_by_image(real)) + nn.softplus(_by_image(fake))).mean()


@typed
def averaged_generator(fake: Float[Array, "b ..."]) -> Float[Array, ""]:
    """Cross entropy of generated images against real, of logits averaged over each image: Open-MAGVIT2 (arXiv:2409.04410)."""
    return nn.softplus(-_by_image(fake)).mean()


@typed
def lecam(
    real: Float[Array, "..."], fake: Float[Array, "..."], average: Float[Array, "2"], decay: float = 0.999
) -> tuple[Float[Array, ""], Float[Array, "2"]]:
    """Keeps logits near what the other kind got on average, which regularises a discriminator; and the averages after these.

    Args:
      average: of the logits of real and of generated images so far, from zeros on; it counts these before it is used.
    Source: LeCAM (arXiv:2104.03310), in the form of Open-MAGVIT2 (arXiv:2409.04410).
    """
    now = jax.lax.stop_gradient(jnp.stack([real.mean(), fake.mean()]))
    average = decay * average + (1 - decay) * now
    apart = nn.relu(real - average[1]), nn.relu(average[0] - fake)
    return sum(jnp.square(x).mean() for x in apart), average


@typed
def lecam_of_means(
    real: Float[Array, "..."], fake: Float[Array, "..."], average: Float[Array, "2"], decay: float = 0.999
) -> tuple[Float[Array, ""], Float[Array, "2"]]:
    """As `lecam`, of the mean logits of a batch, which the averages count only afterwards.

    Source: TiTok (arXiv:2406.07550), its released training.
    """
    real, fake = real.mean(), fake.mean()
    apart = jnp.square(nn.relu(real - average[1])) + jnp.square(nn.relu(average[0] - fake))
    return apart, decay * average + (1 - decay) * jax.lax.stop_gradient(jnp.stack([real, fake]))


def _by_image(logits: Array) -> Array:
    return logits.reshape(len(logits), -1).mean(1)


def _swapped(label: float, logits: Array) -> Array:
    """Cross entropy with its arguments swapped: the label is the logit, the logits are the target."""
    return nn.softplus(label) - label * logits.mean()
