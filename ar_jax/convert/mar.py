"""MAR's released checkpoints: the tokenizer KL-16 and the masked transformers."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.names import CONV, CONV1, PLAIN, Rule
from ar_jax.data import Info
from ar_jax.tokenizers.kl_vae import KLVAE

FIXED = set()  # all parameters are trained
SCALE = 0.2325  # what the published generators multiply latents with


def tokenizer_rules(tokenizer: KLVAE) -> list[Rule]:
    """LDM's names."""
    side, middle = "(encoder|decoder)", ("block_1", "attn_1", "block_2")

    def level(match, rest):  # both sides count levels from the finest
        return f"{match[1]}.{'down' if match[1] == 'encoder' else 'up'}.{match[2]}.{rest}"

    rules = []
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind, point = (CONV, CONV1) if leaf == "kernel" else (PLAIN, PLAIN)
        rules += [
            (rf"(quant|post_quant)/{leaf}", rf"\1_conv.{key}", point),
            (rf"{side}/(conv_in|conv_out|norm_out)/{leaf}", rf"\1.\2.{key}", kind),
            (rf"{side}/mid_1/(q|k|v|proj_out)/{leaf}", rf"\1.mid.attn_1.\2.{key}", point),
            (
                rf"{side}/mid_(\d)/(\w+)/{leaf}",
                lambda m, key=key: f"{m[1]}.mid.{middle[int(m[2])]}.{m[3]}.{key}",
                kind,
            ),
            (rf"{side}/down_(\d+)/{leaf}", lambda m, key=key: level(m, f"downsample.conv.{key}"), kind),
            (rf"{side}/up_(\d+)/{leaf}", lambda m, key=key: level(m, f"upsample.conv.{key}"), kind),
            (rf"{side}/res_(\d+)_(\d+)/(\w+)/{leaf}", lambda m, key=key: level(m, f"block.{m[3]}.{m[4]}.{key}"), kind),
            (
                rf"{side}/attn_(\d+)_(\d+)/(q|k|v|proj_out)/{leaf}",
                lambda m, key=key: level(m, f"attn.{m[3]}.{m[4]}.{key}"),
                point,
            ),
            (rf"{side}/attn_(\d+)_(\d+)/norm/{leaf}", lambda m, key=key: level(m, f"attn.{m[3]}.norm.{key}"), kind),
        ]
    return rules


def tokenizer(shapes: Mapping[str, tuple[int, ...]], size: int, groups: int = 32) -> KLVAE:
    """The tokenizer whose state dict has these keys and shapes, with the published scale."""
    features = shapes["encoder.conv_in.weight"][0]
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    return KLVAE(
        size=(size, size), features=features, groups=groups, latent=shapes["post_quant_conv.weight"][0],
        mult=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // features for i in range(levels)),
        res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        channels=shapes["encoder.conv_in.weight"][1], shift=(0.0,), scale=(SCALE,),
    )  # fmt: skip


def count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the largest number that a pattern finds in the keys; 0 if it finds none."""
    return 1 + max((int(m[1]) for m in (re.match(pattern, key) for key in shapes) if m), default=-1)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """ "tokenizer", "generator" or "" for files that are not MAR's, judged by a few keys; `build` may yet fail."""
    if any(key.startswith("encoder.down.") for key in shapes) and not any(k.startswith("quantize") for k in shapes):
        return "tokenizer"
    return ""


def build(
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    size: int,
    heads: int,
    groups: int,
    scales: tuple[int, ...],
) -> nn.Module:
    """The network of a file; the arguments are those of `llamagen.build`."""
    return tokenizer(shapes, size or 256, groups or 32)


def buffers(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Entries of the file that are no part of the network: none."""
    return {}


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    (height, width), (rows, columns) = module.size, module.grid
    return f"{height}x{width} pixels to {rows}x{columns} tokens of {module.spec.channels} numbers", Info(), {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: MAR has no such network.
    """
    if type(module) is KLVAE:
        return tokenizer_rules(module)
    raise ValueError(f"MAR has no {type(module).__name__}")
