"""Infinity's released checkpoints: its tokenizers of 16, 24, 32 and 64 bits, and the one whose tokens are patches."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ar_jax.convert.names import CONV, PLAIN, Rule, count, multiple
from ar_jax.data import Info
from ar_jax.tokenizers.bit_pyramid import BitPyramid, published_scales
from ar_jax.tokens import sides

Shapes = Mapping[str, tuple[int, ...]]

FIXED = set()  # all parameters are trained
PLACES = ("quantizer.lfq.mask", "quantize.lfq.mask")  # what each bit counts in an index; one array under two names


def tokenizer_rules(tokenizer: BitPyramid) -> list[Rule]:
    side = "(encoder|decoder)"

    def level(match, rest):  # both sides count levels from the finest
        return f"{match[1]}.{'down' if match[1] == 'encoder' else 'up'}.{match[2]}.{rest}"

    def middle(match, key):
        return f"{match[1]}.mid.block_{1 + int(match[2]) // 2}.{match[3]}.{_kind(match[3])}.{key}"

    rules = []
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind = CONV if leaf == "kernel" else PLAIN
        rules += [
            (
                rf"{side}/(conv_in|conv_out|norm_out)/{leaf}",
                lambda m, key=key: f"{m[1]}.{m[2]}.{_kind(m[2])}.{key}",
                kind,
            ),
            (rf"{side}/mid_([02])/(\w+)/{leaf}", lambda m, key=key: middle(m, key), kind),
            (rf"{side}/down_(\d+)/{leaf}", lambda m, key=key: level(m, f"downsample.conv.conv.{key}"), kind),
            (rf"{side}/up_(\d+)/{leaf}", lambda m, key=key: level(m, f"upsample.conv.conv.{key}"), kind),
            (
                rf"{side}/res_(\d+)_(\d+)/(\w+)/{leaf}",
                lambda m, key=key: level(m, f"block.{m[3]}.{m[4]}.{_kind(m[4])}.{key}"),
                kind,
            ),
        ]
    return rules


def _kind(name):
    """What a layer is wrapped as."""
    return "norm" if name.startswith("norm") else "conv"


def tokenizer(shapes: Shapes, size: int, groups: int = 32, scales: tuple[int, ...] = ()) -> BitPyramid:
    """The tokenizer whose state dict has these keys and shapes. At a stride of 8 its tokens are patches of 2x2 places.

    Raises:
      ValueError: the scales of this size are not published.
    """
    features = shapes["encoder.conv_in.conv.weight"][0]
    levels = max(count(shapes, r"encoder\.down\.(\d+)\."), 1)
    mult = tuple(multiple(shapes, f"encoder.down.{i}.block.0.conv1.conv.weight", features) for i in range(levels))
    patch = 2 if levels == 4 else 1
    scales = scales or published_scales((size, size))
    if not scales:
        raise ValueError(
            f"the file does not hold the scales, and of {size} pixels none are published (256, 512, 1024 are); give --scales"
        )
    return BitPyramid(
        size=(size, size), scales=scales, features=features, mult=mult, groups=groups, patch=patch,
        res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."), bits=shapes["encoder.conv_out.conv.weight"][0],
        channels=shapes["encoder.conv_in.conv.weight"][1],
    )  # fmt: skip


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", or "" for files that are not Infinity's, judged by a few keys; `build` may yet fail."""
    known = any(f"encoder.conv_in.{rest}" in shapes for rest in ("conv.weight", "weight"))
    return "tokenizer" if known and any(key in shapes for key in PLACES) else ""


def spelled(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a file of Infinity's under the usual names: some leave out what every layer is wrapped as."""
    if not recognise(weights) or "encoder.conv_in.conv.weight" in weights:
        return dict(weights)
    plain = re.compile(r"((?:\w+\.)*(\w+))\.(weight|bias)")
    found = {key: plain.fullmatch(key) for key in weights}
    return {
        f"{match[1]}.{_kind(match[2])}.{match[3]}" if (match := found[key]) else key: value
        for key, value in weights.items()
    }


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> nn.Module:  # fmt: skip
    """The network of a file; the arguments are those of `var.build`."""
    return tokenizer(shapes, size or 256, groups or 32, scales)


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """What each bit counts, under the names that a file has."""
    return {key: (module.bits,) for key in PLACES if not shapes or key in shapes}


def fills(module: nn.Module) -> dict[str, np.ndarray]:
    """The powers of two, the first bit's the largest; of 64 bits it overflows, as in the released file."""
    places = (np.uint64(1) << np.arange(module.bits, dtype=np.uint64)[::-1]).astype(np.int64)
    return dict.fromkeys(PLACES, places)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    (height, width), k = module.size, len(module.spec.codes)
    scales = " ".join("x".join(map(str, sides(scale))) for scale in module.scales)
    return f"{height}x{width} pixels to scales {scales} of tokens of {k} bits", Info(), {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: Infinity has no such network.
    """
    if type(module) is BitPyramid:
        return tokenizer_rules(module)
    raise ValueError(f"Infinity has no {type(module).__name__}")
