"""Open-MAGVIT2's released checkpoints: the tokenizers for 128 and 256 pixels."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.names import CONV, LINEAR, PLAIN, Rule, count, multiple
from ar_jax.data import Info
from ar_jax.tokenizers.lookup_free import LookupFree

Shapes = Mapping[str, tuple[int, ...]]

BITS = {18: (6, 12)}  # of the sub-codes that generators draw, by the number of latent channels; not in the file
FIXED = set()  # all parameters are trained
BESIDE = ("loss.", "model_ema.")
AVERAGED = ("tokenizer",)


def tokenizer_rules(tokenizer: LookupFree) -> list[Rule]:
    side, rules = "(encoder|decoder)", []
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind = CONV if leaf == "kernel" else PLAIN
        rules += [
            (rf"{side}/(conv_in|conv_out|norm_out)/{leaf}", rf"\1.\2.{key}", kind),
            (rf"{side}/mid_(\d+)/(\w+)/{leaf}", rf"\1.mid_block.\2.\3.{key}", kind),
            (rf"encoder/res_(\d+)_(\d+)/(\w+)/{leaf}", rf"encoder.down.\1.block.\2.\3.{key}", kind),
            (rf"encoder/down_(\d+)/{leaf}", rf"encoder.down.\1.downsample.{key}", kind),
            (rf"decoder/res_(\d+)_(\d+)/(\w+)/{leaf}", rf"decoder.up.\1.block.\2.\3.{key}", kind),
            (rf"decoder/up_(\d+)/{leaf}", rf"decoder.up.\1.upsample.conv1.{key}", kind),
            (
                rf"decoder/adaptive_(\d+)/(gamma|beta)/{leaf}",
                rf"decoder.adaptive.\1.\2.{key}",
                LINEAR if leaf == "kernel" else PLAIN,
            ),
        ]
    return rules


def recognise(shapes: Shapes) -> str:
    """ "tokenizer" or "" for files that are not Open-MAGVIT2's, judged by a few keys; `build` may yet fail."""
    return "tokenizer" if any(key.startswith("decoder.adaptive.") for key in shapes) else ""


def tokenizer(shapes: Shapes, size: int, groups: int = 32) -> LookupFree:
    """The tokenizer whose state dict has these keys and shapes."""
    features, channels, *_ = shapes["encoder.conv_in.weight"]
    bits = shapes["encoder.conv_out.weight"][0]
    levels = max(count(shapes, r"encoder\.down\.(\d+)\."), 1)
    return LookupFree(
        size=(size, size), features=features,
        mult=tuple(multiple(shapes, f"encoder.down.{i}.block.0.conv1.weight", features) for i in range(levels)),
        res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."), bits=BITS.get(bits, (bits,)), groups=groups,
        channels=channels,
    )  # fmt: skip


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`. A tokenizer works at any size that is a multiple of its stride."""
    return tokenizer(shapes, size or 256, groups or 32)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    (height, width), (rows, columns) = module.size, module.grid
    of = " x ".join(f"{codes}" for codes in module.spec.codes)
    return f"{height}x{width} pixels to {rows}x{columns} codes out of {of}", Info(), {}


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """There are none."""
    return {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: Open-MAGVIT2 has no such network.
    """
    if type(module) is LookupFree:
        return tokenizer_rules(module)
    raise ValueError(f"Open-MAGVIT2 has no {type(module).__name__}")
