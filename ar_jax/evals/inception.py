"""InceptionV3 as the Frechet Inception Distance uses it: the TensorFlow graph of 2015, which PyTorch's ports reproduce.

It differs from the network of the same name in torchvision: 1008 classes, average pooling that leaves the padding out,
and a maximum in place of the average in the last block. Batch norms are folded into the convolutions when weights are
read.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.typing import Array, Float, Params, typed

EPS = 1e-3  # of the batch norms
SPATIAL = 7  # channels of the spatial feature


class InceptionV3(nn.Module):
    """Features of images of about 299 pixels; float32 with full-precision products everywhere.

    Attributes:
      classes: rows of the classifier.
    Source: arXiv:1512.00567; used by arXiv:1706.08500 (FID).
    """

    classes: int = 1008

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _"]]:
        """Features of images in about [-1, 1], at least 75 pixels a side.

        Returns:
          "pool" [b 2048]; "spatial", the first 7 channels of a branch of the third of the four 17x17 blocks
          (TensorFlow's mixed_6/conv) over all its places [b 2023]; "logits" [b classes], without the bias as the
          Inception Score wants them.
        """
        x = _conv(x, "Conv2d_1a_3x3", 32, 3, stride=2, padding="VALID")
        x = _conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        x = _conv(x, "Conv2d_2b_3x3", 64, 3)
        x = _max(x)
        x = _conv(x, "Conv2d_3b_1x1", 80, 1, padding="VALID")
        x = _conv(x, "Conv2d_4a_3x3", 192, 3, padding="VALID")
        x = _max(x)
        for name, width in ("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64):
            x = _block_a(x, name, width)
        x = _block_b(x, "Mixed_6a")
        for name, width in ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192):
            x = _block_c(x, name, width)
            if name == "Mixed_6d":
                spatial = x[..., :SPATIAL].reshape(len(x), -1)  # its first branch comes first
        x = _block_d(x, "Mixed_7a")
        x = _block_e(x, "Mixed_7b", _average)
        x = _block_e(x, "Mixed_7c", lambda x: _max(x, 1, "SAME"))
        pool = x.mean((1, 2))
        logits = nn.Dense(self.classes, use_bias=False, precision=lax.Precision.HIGHEST, name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def _conv(x, name, width, kernel, stride=1, padding="SAME"):
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    conv = nn.Conv(width, size, stride, padding=padding, precision=lax.Precision.HIGHEST, name=name)
    return nn.relu(conv(x))


def _chain(x, name, *convs):
    """Convolutions `name_1`, `name_2`, ... one behind the other."""
    for i, (width, kernel, *stride) in enumerate(convs, 1):
        x = _conv(x, f"{name}_{i}", width, kernel, *stride, padding="VALID" if stride else "SAME")
    return x


def _max(x, stride=2, padding="VALID"):
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _average(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _block_a(x, name, pooled):
    parts = [
        _conv(x, f"{name}.branch1x1", 64, 1),
        _chain(x, f"{name}.branch5x5", (48, 1), (64, 5)),
        _chain(x, f"{name}.branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        _conv(_average(x), f"{name}.branch_pool", pooled, 1),
    ]
    return jnp.concatenate(parts, -1)


def _block_b(x, name):
    parts = [
        _conv(x, f"{name}.branch3x3", 384, 3, 2, "VALID"),
        _chain(x, f"{name}.branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)),
        _max(x),
    ]
    return jnp.concatenate(parts, -1)


def _block_c(x, name, c):
    row, column = (1, 7), (7, 1)
    parts = [
        _conv(x, f"{name}.branch1x1", 192, 1),
        _chain(x, f"{name}.branch7x7", (c, 1), (c, row), (192, column)),
        _chain(x, f"{name}.branch7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row)),
        _conv(_average(x), f"{name}.branch_pool", 192, 1),
    ]
    return jnp.concatenate(parts, -1)


def _block_d(x, name):
    parts = [
        _chain(x, f"{name}.branch3x3", (192, 1), (320, 3, 2)),
        _chain(x, f"{name}.branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
        _max(x),
    ]
    return jnp.concatenate(parts, -1)


def _block_e(x, name, pool):
    def fork(y, branch):
        return [_conv(y, f"{name}.{branch}a", 384, (1, 3)), _conv(y, f"{name}.{branch}b", 384, (3, 1))]

    parts = [
        _conv(x, f"{name}.branch1x1", 320, 1),
        *fork(_conv(x, f"{name}.branch3x3_1", 384, 1), "branch3x3_2"),
        *fork(_chain(x, f"{name}.branch3x3dbl", (448, 1), (384, 3)), "branch3x3dbl_3"),
        _conv(pool(x), f"{name}.branch_pool", 192, 1),
    ]
    return jnp.concatenate(parts, -1)


def inception_params(weights: Mapping[str, np.ndarray]) -> Params:
    """Parameters of `InceptionV3` from a state dict of pytorch-fid or torch-fidelity (they have the same names).

    Raises:
      ValueError: a key is missing or has another shape, or the file is of another network; the first is named.
    """
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    params = {
        name: {"kernel": take(weights, "fc.weight").T}
        if name == "fc"
        else folded(weights, f"{name}.conv.weight", f"{name}.bn", EPS)
        for name in shapes
    }
    return checked(params, shapes, weights)


def take(weights: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    if key not in weights:
        raise ValueError(f"{key} is missing; its entries begin with {', '.join(list(weights)[:3])}")
    return np.asarray(weights[key])


def folded(weights: Mapping[str, np.ndarray], conv: str, norm: str, eps: float) -> Params:
    """Kernel [h w in out] and bias of a torch convolution and the batch norm behind it, merged in float64."""
    kernel = take(weights, conv).astype(np.float64)
    scale, shift, mean, variance = (
        take(weights, f"{norm}.{part}").astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / np.sqrt(variance + eps)
    if kernel.ndim != 4 or factor.shape != kernel.shape[:1]:
        raise ValueError(f"{conv} has shape {kernel.shape} and the norm behind it {factor.shape}")
    kernel = (kernel * factor[:, None, None, None]).transpose(2, 3, 1, 0)
    return {"kernel": kernel.astype(np.float32), "bias": (shift - mean * factor).astype(np.float32)}


def checked(params: Params, shapes: Any, weights: Mapping[str, np.ndarray]) -> Params:
    for name, layer in shapes.items():
        for part, leaf in layer.items():
            if params[name][part].shape != leaf.shape:
                raise ValueError(f"{name} ({part}) has shape {params[name][part].shape}, expected {leaf.shape}")
            if not np.isfinite(params[name][part]).all():
                raise ValueError(f"{name} ({part}) holds NaN or infinity")
    return params
