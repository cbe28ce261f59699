"""VAR's released checkpoints: the multi-scale residual tokenizer vae_ch160v4096z32."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.names import CONV, CONV1, PLAIN, Layout, Rule, count, multiple
from ar_jax.data import Info
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid

SCALES = {  # by the side of the latent
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    64: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
FIXED = set()  # all parameters are trained
HITS = "quantize.ema_vocab_hit_SV"  # how often each scale used each code, no part of the function


def single(kind: Layout) -> Layout:
    """Our array has one row, theirs is that row."""
    return Layout(lambda x: kind.to_torch(x[0]), lambda x: kind.from_torch(x)[None])


def tokenizer_rules(tokenizer: ResidualPyramid) -> list[Rule]:
    side, middle = "(encoder|decoder)", ("block_1", "attn_1", "block_2")

    def place(match, rest):  # both sides count levels from the finest
        return f"{match[1]}.{'down' if match[1] == 'encoder' else 'up'}.{match[2]}.{rest}"

    smoother = {0: "{}", 1: "qresi"}.get(tokenizer.smoothers, "qresi_ls.{}")
    rules = [("codebook", "quantize.embedding.weight", PLAIN)]
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind, point = (CONV, CONV1) if leaf == "kernel" else (PLAIN, PLAIN)
        for i, name in enumerate("qkv"):
            part = point._replace(part=(i, 3))
            rules += [
                (rf"{side}/mid_1/{name}/{leaf}", rf"\1.mid.attn_1.qkv.{key}", part),
                (
                    rf"{side}/attn_(\d+)_(\d+)/{name}/{leaf}",
                    lambda m, key=key: place(m, f"attn.{m[3]}.qkv.{key}"),
                    part,
                ),
            ]
        rules += [
            (
                rf"smooth/{leaf}",
                f"quantize.quant_resi.{smoother}.{key}",
                single(kind) if "{}" not in smoother else kind,
            ),
            (rf"(quant|post_quant)/{leaf}", rf"\1_conv.{key}", kind),
            (rf"{side}/(conv_in|conv_out|norm_out)/{leaf}", rf"\1.\2.{key}", kind),
            (rf"{side}/mid_1/proj_out/{leaf}", rf"\1.mid.attn_1.proj_out.{key}", point),
            (
                rf"{side}/mid_(\d)/(\w+)/{leaf}",
                lambda m, key=key: f"{m[1]}.mid.{middle[int(m[2])]}.{m[3]}.{key}",
                kind,
            ),
            (rf"{side}/down_(\d+)/{leaf}", lambda m, key=key: place(m, f"downsample.conv.{key}"), kind),
            (rf"{side}/up_(\d+)/{leaf}", lambda m, key=key: place(m, f"upsample.conv.{key}"), kind),
            (rf"{side}/res_(\d+)_(\d+)/(\w+)/{leaf}", lambda m, key=key: place(m, f"block.{m[3]}.{m[4]}.{key}"), kind),
            (
                rf"{side}/attn_(\d+)_(\d+)/proj_out/{leaf}",
                lambda m, key=key: place(m, f"attn.{m[3]}.proj_out.{key}"),
                point,
            ),
            (rf"{side}/attn_(\d+)_(\d+)/norm/{leaf}", lambda m, key=key: place(m, f"attn.{m[3]}.norm.{key}"), kind),
        ]
    return rules


def smoothers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many convolutions scales share; 0 if every scale has its own."""
    if any(re.match(r"quantize\.quant_resi\.\d", key) for key in shapes):
        return 0
    return max(1, sum(bool(re.fullmatch(r"quantize\.quant_resi\.qresi_ls\.\d+\.weight", key)) for key in shapes))


def tokenizer(
    shapes: Mapping[str, tuple[int, ...]], size: int, groups: int = 32, scales: tuple[int, ...] = ()
) -> ResidualPyramid:
    """The tokenizer whose state dict has these keys and shapes.

    Raises:
      ValueError: the scales of this size are not published.
    """
    features = shapes["encoder.conv_in.weight"][0]
    levels = max(count(shapes, r"encoder\.down\.(\d+)\."), 1)
    side = size // 2 ** (levels - 1)
    scales = scales or SCALES.get(side, ())
    if not scales:
        raise ValueError(
            f"the file does not hold the scales, and a latent of {side}x{side} is not published; give --scales"
        )
    codes, code_features = shapes["quantize.embedding.weight"]
    return ResidualPyramid(
        size=(size, size), scales=scales, features=features, groups=groups, codes=codes, code_features=code_features,
        mult=tuple(multiple(shapes, f"encoder.down.{i}.block.0.conv1.weight", features) for i in range(levels)),
        res_blocks=sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", key)) for key in shapes),
        kernel=shapes["quant_conv.weight"][-1],
        smoothers=smoothers(shapes),
        channels=shapes["encoder.conv_in.weight"][1],
    )  # fmt: skip


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """ "tokenizer", or "" for files that are not VAR's, judged by a few keys; `build` may yet fail."""
    return "tokenizer" if any(key.startswith("quantize.quant_resi.") for key in shapes) else ""


def build(
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    size: int,
    heads: int,
    groups: int,
    scales: tuple[int, ...],
) -> nn.Module:
    """The network of a file.

    Args:
      kind: what `recognise` said.
      shapes: by key.
      size: of the images in pixels; 0 takes 256.
      heads: unused.
      groups: 0 takes the published number.
      scales: () takes the published ones of the size.
    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    return tokenizer(shapes, size or 256, groups or 32, scales)


def buffers(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The count of hits, of as many scales as the file's maker had: with other ones it means nothing."""
    rows = shapes[HITS][0] if HITS in shapes else len(module.scales)
    return {HITS: (rows, module.codes)}


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    (height, width), scales = module.size, " ".join(map(str, module.scales))
    return f"{height}x{width} pixels to scales {scales} of codes out of {module.codes}", Info(), {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: VAR has no such network.
    """
    if type(module) is ResidualPyramid:
        return tokenizer_rules(module)
    raise ValueError(f"VAR has no {type(module).__name__}")
