"""The released next-scale transformers: VAR, FlexVAR and HMAR, whose files share one set of names."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ar_jax.convert import flexvar, var
from ar_jax.convert.names import LINEAR, PLAIN, Layout, Rule, count, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import KnownScales
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.hmar import Hmar
from ar_jax.generators.inputs import NextScale, Upsampled
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.orders import scales as scale_order
from ar_jax.tokens import TokenSpec, pyramid

FIXED = set()  # all parameters are trained
Shapes = Mapping[str, tuple[int, ...]]

LEADING = Layout(lambda x: x[None], lambda x: x[0])
FIRST = Layout(lambda x: x[0], lambda x: x[None])  # ours is a stack of one
HEADWISE = Layout(lambda x: x[None, :, None, None], lambda x: x[0, :, 0, 0])
ROWS6 = Layout(lambda x: x[None, None], lambda x: x[0, 0])
GRID = Layout(lambda x: x.transpose(2, 0, 1)[None], lambda x: x[0].transpose(1, 2, 0))
ONE = Layout(lambda x: LINEAR.to_torch(x[0]), lambda x: LINEAR.from_torch(x)[None])

# as evaluated: VAR and FlexVAR alike for all sizes, HMAR by depth
VAR_SAMPLING = Sampling(Ramp(1.5), filter=Filter(900, 0.96))
FLEXVAR_SAMPLING = Sampling(
    Ramp(2.5, reach=9, largest=16),
    KnownScales(largest=16, known=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32)),
    Filter(900, 0.95),
)
HMAR_SAMPLING = {
    depth: Sampling(Ramp(scale), filter=Filter(k, 0.99))
    for depth, (scale, k) in {16: (1.7, 1000), 20: (1.9, 950), 24: (2.1, 900), 30: (1.6, 650)}.items()
}
REFINE = ((1,), (1, 3), (1, 1, 2, 5), (16,), (25,), (36,), (64,), (100,), (169,), (256,))


def network_rules(ours: str, theirs: str, net: AdaLN) -> list[Rule]:
    """Of a stack of blocks: our field and their list."""
    block = f"{theirs}.{{}}."
    rules = [
        (f"{ours}/blocks/qkv/kernel", block + "attn.mat_qkv.weight", qkv_layout(net.heads)),
        (f"{ours}/blocks/q_bias", block + "attn.q_bias", PLAIN),
        (f"{ours}/blocks/v_bias", block + "attn.v_bias", PLAIN),
        (f"{ours}/blocks/log_scale", block + "attn.scale_mul_1H11", HEADWISE),
        (f"{ours}/table", block + "ada_gss", ROWS6),
    ]
    for name, key in (("out", "attn.proj"), ("up", "ffn.fc1"), ("down", "ffn.fc2")):
        rules.append((f"{ours}/blocks/{name}/kernel", f"{block}{key}.weight", LINEAR))
        rules.append((f"{ours}/blocks/{name}/bias", f"{block}{key}.bias", PLAIN))
    if net.shared:
        return [*rules, (f"{ours}/ada/kernel", "shared_ada_lin.1.weight", ONE),
                (f"{ours}/ada/bias", "shared_ada_lin.1.bias", FIRST)]  # fmt: skip
    return [*rules, (f"{ours}/ada/kernel", block + "ada_lin.1.weight", LINEAR),
            (f"{ours}/ada/bias", block + "ada_lin.1.bias", PLAIN)]  # fmt: skip


def end_rules(ours: str, head: str, prefix: str) -> list[Rule]:
    """Of a last norm and a readout."""
    return [
        (f"{ours}/ada_final/kernel", f"{prefix}head_nm.ada_lin.1.weight", ONE),
        (f"{ours}/ada_final/bias", f"{prefix}head_nm.ada_lin.1.bias", FIRST),
        (f"{head}/readout/kernel", f"{prefix}head.weight", LINEAR),
        (f"{head}/readout/bias", f"{prefix}head.bias", PLAIN),
    ]


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: the families have no such network.
    """
    inputs = getattr(module, "inputs", None)
    if type(module) not in (Causal, Hmar) or type(inputs) not in (NextScale, Upsampled):
        raise ValueError(f"no next-scale model is a {type(module).__name__} with {type(inputs).__name__}")
    joint = type(module) is Hmar
    found = [
        ("conditioning/embedding", "class_emb.weight", PLAIN),
        ("inputs/word/kernel", "word_embed.weight", LINEAR),
        ("inputs/word/bias", "word_embed_bias" if joint else "word_embed.bias", PLAIN),
        ("inputs/start", "pos_start", LEADING),
        ("inputs/level", "lvl_embed.weight", PLAIN),
        ("inputs/position", "pos_1LC", GRID if isinstance(inputs, Upsampled) else LEADING),
    ]
    if not joint:
        return [*found, *network_rules("backbone", "blocks", module.backbone), *end_rules("backbone", "head", "")]
    return [
        *found,
        ("mask_embed", "mask_embed.weight", LEADING),
        *network_rules("backbone", "base_blocks", module.backbone),
        *network_rules("tail", "ns_blocks", module.tail),
        *network_rules("masks", "mask_blocks", module.masks),
        *end_rules("tail", "head", "ns_"),
        *end_rules("masks", "mask_head", "mask_"),
    ]


def recognise(shapes: Shapes) -> str:
    """ "generator", or "" for other files, judged by a few keys; `build` may yet fail."""
    return "generator" if {"pos_1LC", "word_embed.weight", "class_emb.weight"} <= shapes.keys() else ""


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> Causal:  # fmt: skip
    """The network of a file; the arguments are those of `var.build`. `size` is unused: the file's length says it.

    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    width, channels = shapes["word_embed.weight"]
    place = shapes["pos_1LC"]
    flexible = len(place) == 4
    length = 0 if flexible else place[1]
    scales = tuple(scales) or _published(length, flexible)
    if length and sum(side**2 for side in scales) != length:
        raise ValueError(f"pos_1LC has {length} positions, but scales {scales} have {sum(s**2 for s in scales)} tokens")
    lists = {name: count(shapes, rf"{name}\.(\d+)\.") for name in ("blocks", "base_blocks", "ns_blocks", "mask_blocks")}
    lists = {name: layers for name, layers in lists.items() if layers}
    joint = "mask_blocks" in lists
    if not joint and "mask_embed.weight" in shapes:
        raise ValueError(
            "these are the masked predictor's weights alone; give them with --masks beside the next-scale model's"
        )
    first = "base_blocks" if joint else "blocks"
    if first not in lists:
        raise KeyError(f"{first}.0.attn.mat_qkv.weight")
    sharp = shapes.get(f"{first}.0.attn.scale_mul_1H11")
    heads = heads or (sharp[1] if sharp else width // 64)
    hidden = shapes[f"{first}.0.ffn.fc1.weight"][0]
    depth = lists[first] + lists.get("ns_blocks", 0)
    drop = 0.1 * depth / 24

    def net(layers, start, **fields):
        path = tuple(drop * i / max(depth - 1, 1) for i in (start, start + layers - 1))
        return AdaLN(
            layers, width, heads, hidden=0 if hidden == 4 * width else hidden, shared="shared_ada_lin.1.weight" in shapes,
            l2_norm=sharp is not None, path_drop=path, depth=depth, gate=GATES.get(depth, 1e-3), **fields,
        )  # fmt: skip

    std = (3 * width) ** -0.5
    codes = shapes["ns_head.weight" if joint else "head.weight"][0]
    head = Categorical(bias=True, std=0.02 * std)
    inputs = Upsampled(channels, side=place[-1]) if flexible else NextScale(channels, "lvl_embed.weight" in shapes)
    conditioning = Label(width, std=std)
    if joint:
        module = Hmar(
            net(lists["base_blocks"], 0, sees="step", final=False), conditioning, head, inputs,
            tail=net(lists["ns_blocks"], lists["base_blocks"], sees="step"),
            masks=net(lists["mask_blocks"], lists["base_blocks"], sees="step"), mask_head=head.clone(),
            refine=REFINE if scales == var.SCALES[16] else (), emphasis="lognorm",
        )  # fmt: skip
    else:
        module = Causal(net(lists["blocks"], 0), conditioning, head, inputs)
    info = Info(classes=shapes["class_emb.weight"][0] - 1)
    return module.complete(TokenSpec(pyramid(scales), codes=(codes,)), info)


GATES = {16: 1e-3, 20: 1e-3, 24: 1e-4, 30: 1e-5, 36: 5e-6}  # initial size of the gates by depth


def _published(length, flexible):
    if flexible:
        return flexvar.SCALES[16]
    for scales in var.SCALES.values():
        if sum(side**2 for side in scales) == length:
            return scales
    raise ValueError(f"pos_1LC has {length} positions, which no published list of scales has; give --scales")


def buffers(module: Causal, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """What follows from the scales, and the bias of the keys, which is zero."""
    n = len(_masked_levels(module))
    kept = {"attn_bias_for_masking": (1, 1, n, n)}
    if module.inputs.levels:
        kept["lvl_1L"] = (1, n)
    for ours, theirs in _lists(module):
        net = getattr(module, ours)
        kept |= {f"{theirs}.{i}.attn.zero_k_bias": (net.width,) for i in range(net.layers)}
    if isinstance(module.inputs, Upsampled) and "attn_bias_for_masking" in shapes:
        kept["attn_bias_for_masking"] = shapes["attn_bias_for_masking"]  # of any list of scales
    return kept


def fills(module: Causal) -> dict[str, np.ndarray]:
    """Contents of the buffers that are not zero."""
    level = _masked_levels(module)
    seen = level[:, None] == level if module.backbone.sees == "step" else level[:, None] >= level
    found = {"attn_bias_for_masking": np.where(seen, 0, -np.inf).astype(np.float32)[None, None]}
    return found | ({"lvl_1L": level[None].astype(np.int64)} if module.inputs.levels else {})


def _masked_levels(module):
    """Scale of every position of the mask; FlexVAR's file has that of the usual list, whatever was trained on."""
    flexible = isinstance(module.inputs, Upsampled)
    return pyramid(flexvar.SCALES[16])[:, 0] if flexible else module.spec.coords[:, 0]


def _lists(module):
    if type(module) is Hmar:
        return (("backbone", "base_blocks"), ("tail", "ns_blocks"), ("masks", "mask_blocks"))
    return (("backbone", "blocks"),)


def describe(module: Causal) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    net, scales = module.backbone, " ".join(str(height) for height, _ in module.spec.scales)
    layers, sampling = f"{net.layers}", VAR_SAMPLING
    if type(module) is Hmar:
        layers = f"{net.layers} + {module.tail.layers} (scales) and {module.masks.layers} (masks)"
        sampling = HMAR_SAMPLING.get(net.layers + module.tail.layers, VAR_SAMPLING)
    elif isinstance(module.inputs, Upsampled):
        sampling = FLEXVAR_SAMPLING
    words = (
        f"{layers} layers of width {net.width} with {net.heads} heads, scales {scales} of {module.spec.codes[0]} codes, "
        f"{module.conditioning.classes} classes"
    )
    return (
        words,
        Info(classes=module.conditioning.classes),
        {"order": codec.encode(scale_order), "sampling": codec.encode(sampling)},
    )


def merge(scales: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], last: int = 8) -> dict[str, np.ndarray]:
    """The joint HMAR state dict from those of its next-scale and its masked predictor, which were trained one after the other.

    Of the masked predictor only its last blocks, its ends and its mask vector were trained.

    Args:
      last: how many blocks.
    Raises:
      ValueError: they are no such pair.
    """
    depth = [count(x, r"blocks\.(\d+)\.") for x in (scales, masks)]
    if depth[0] <= last or depth[0] != depth[1] or "mask_embed.weight" not in masks or "word_embed.bias" not in scales:
        raise ValueError(
            f"these are no next-scale and masked predictor of one HMAR, which have equally many blocks, more than {last}; "
            f"got {depth[0]} and {depth[1]}, of which the latter {'has' if 'mask_embed.weight' in masks else 'lacks'} mask_embed.weight"
        )
    joint = {key: value for key, value in scales.items() if not key.startswith(("blocks.", "head", "word_embed.bias"))}
    joint |= {"word_embed_bias": scales["word_embed.bias"], "mask_embed.weight": masks["mask_embed.weight"]}
    for prefix, weights in (("ns_", scales), ("mask_", masks)):
        joint |= {prefix + key: value for key, value in weights.items() if key.startswith("head")}
    for name, weights in (("ns", scales), ("mask", masks)):
        for key, value in weights.items():
            if match := re.match(r"blocks\.(\d+)\.(.*)", key):
                i = int(match[1])
                if i >= depth[0] - last:
                    joint[f"{name}_blocks.{i - depth[0] + last}.{match[2]}"] = value
                elif name == "ns":
                    joint[f"base_blocks.{i}.{match[2]}"] = value
    return joint
