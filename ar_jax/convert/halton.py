"""Halton-MaskGIT's released generators."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ar_jax.convert.mar import layers
from ar_jax.convert.names import PLAIN, Rule, count
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.halton_maskgit import HaltonMaskGIT, Registered
from ar_jax.nets.conditioning import Label
from ar_jax.orders import Halton
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = {384: 6, 512: 6, 768: 12, 1024: 16}  # by width; not in the file
GUIDANCE = {384: 2.5, 512: 2.0, 768: 1.7, 1024: 1.5}  # published weights and 1, by width
FIXED = set()  # all parameters are trained
TWICE = {"head.weight": "tok_emb.weight"}  # the readout is the table of codes
PAIRS = (
    ("modulation", "mlp.1"), ("attention_norm", "ln1"), ("mlp_norm", "ln2"), ("query", "attn.wq"), ("key", "attn.wk"),
    ("value", "attn.wv"), ("out", "attn.wo"), ("gate", "ff.w1"), ("down", "ff.w2"), ("up", "ff.w3"),
)  # fmt: skip


def recognise(shapes: Shapes) -> str:
    """ "generator" or "" for files of others, judged by a few keys; `build` may yet fail."""
    return "generator" if {"reg_tokens.weight", "last_norm.norm_final.weight"} <= shapes.keys() else ""


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> nn.Module:  # fmt: skip
    """The network of a file; the arguments are those of `llamagen.build`.

    Raises:
      ValueError: its tokens make no square, or the published models have no such width.
      KeyError: a key is missing.
    """
    (rows, width), (n, _) = shapes["tok_emb.weight"], shapes["pos_emb.weight"]
    side = round(n**0.5)
    if side**2 != n:
        raise ValueError(f"the file has places for {n} tokens, which make no square")
    if not heads and width not in HEADS:
        raise ValueError(f"its width is {width}, and published models have {', '.join(map(str, HEADS))}: give --heads")
    net = Registered(
        count(shapes, r"transformer\.layers\.(\d+)\."), width, heads or HEADS[width],
        hidden=shapes["transformer.layers.0.ff.w1.weight"][0], registers=shapes["reg_tokens.weight"][0], dropout=0.1,
    )  # fmt: skip
    module, classes = HaltonMaskGIT(net, Label(width)), shapes["cls_emb.weight"][0] - 1
    return module.complete(TokenSpec(grid(side, side), codes=(rows - 1,)), Info(classes=classes))


def buffers(module: HaltonMaskGIT, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The readout, which is the table of codes."""
    return {"head.weight": (module.spec.codes[0] + 1, module.backbone.width)}


def spelled(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Raises a ValueError if the readout is another table than that of the codes."""
    for key, same in TWICE.items():
        pair = weights.get(key), weights.get(same)
        if all(isinstance(x, np.ndarray) for x in pair) and not np.array_equal(*pair):
            raise ValueError(f"{key} and {same} differ, but are the same parameters in Halton-MaskGIT")
    return dict(weights)


def describe(module: HaltonMaskGIT) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    net, (rows, columns), classes = module.backbone, module.spec.scales[0], module.conditioning.classes
    sizes = f"{net.layers} layers of width {net.width} with {net.heads} heads"
    words = f"{sizes}, {rows}x{columns} tokens of {module.spec.codes[0]} codes, {classes} classes"
    sampling = Sampling(Interval(GUIDANCE.get(net.width, 2.0)))
    order = Halton(min(32, module.spec.n))
    return words, Info(classes=classes), {"order": codec.encode(order), "sampling": codec.encode(sampling)}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: Halton-MaskGIT has no such network.
    """
    if type(module) is not HaltonMaskGIT or type(module.backbone) is not Registered:
        raise ValueError(f"Halton-MaskGIT has no such {type(module).__name__}")
    return [
        ("conditioning/embedding", "cls_emb.weight", PLAIN),
        ("embedding", "tok_emb.weight", PLAIN),
        ("bias", "head.bias", PLAIN),
        ("backbone/places", "pos_emb.weight", PLAIN),
        ("backbone/registers", "reg_tokens.weight", PLAIN),
        ("backbone/bias", "last_norm.norm_final.bias", PLAIN),
        *layers("backbone/", "", (("norm", "last_norm.norm_final"), ("modulation", "last_norm.mlp.1"))),
        *layers("backbone/blocks/", "transformer.layers.{}.", PAIRS),
    ]
