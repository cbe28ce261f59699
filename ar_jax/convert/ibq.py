"""IBQ's released checkpoints: the tokenizers of 16,384 and of 2^18 codes, the generators B, L, XL and XXL."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import mar
from ar_jax.convert.names import LINEAR, PLAIN, Layout, Rule, count, multiple, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.modulated import Modulated
from ar_jax.orders import raster
from ar_jax.tokenizers.ibq import IBQ
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = {1024: 16, 1280: 20, 1536: 24, 1920: 30}  # by width; not in the file
GATES = {1536: 1e-4, 1920: 1e-5}  # initial size of the gates, by width; else 1e-3
SAMPLING = {  # published settings by width
    width: Sampling(Interval(weight), Constant(warm))
    for width, weight, warm in ((1024, 2.25, 1.1), (1280, 2.0, 1.0), (1536, 2.35, 1.15), (1920, 2.85, 1.2))
}
FIXED = set()  # all parameters are trained
BESIDE = ("loss.", "model_ema.", "first_stage_model.")
BEFORE = "transformer."
AVERAGED = ("tokenizer",)

FIRST = Layout(lambda x: x[0], lambda x: x[None])  # of a stack of one
FIRST_LINEAR = Layout(lambda x: x[0].T, lambda x: x.T[None])


def generator_rules(generator: Causal) -> list[Rule]:
    layer = "transformer.blocks.{}."
    return [
        ("inputs/embedding", "transformer.tok_emb.weight", PLAIN),
        ("conditioning/embedding", "transformer.class_emb.embedding_table.weight", PLAIN),
        ("backbone/blocks/attention_norm/scale", layer + "attention_norm.weight", PLAIN),
        ("backbone/blocks/mlp_norm/scale", layer + "ffn_norm.weight", PLAIN),
        ("backbone/blocks/qkv/kernel", layer + "attention.wqkv.weight", qkv_layout(generator.backbone.heads)),
        ("backbone/blocks/out/kernel", layer + "attention.wo.weight", LINEAR),
        ("backbone/blocks/gate/kernel", layer + "feed_forward.w1.weight", LINEAR),
        ("backbone/blocks/up/kernel", layer + "feed_forward.w3.weight", LINEAR),
        ("backbone/blocks/down/kernel", layer + "feed_forward.w2.weight", LINEAR),
        ("backbone/ada/kernel", layer + "ada_lin.1.weight", LINEAR),
        ("backbone/ada/bias", layer + "ada_lin.1.bias", PLAIN),
        ("backbone/norm/scale", "transformer.head_nm.rmsnorm.weight", PLAIN),
        ("backbone/ada_final/kernel", "transformer.head_nm.ada_lin.1.weight", FIRST_LINEAR),
        ("backbone/ada_final/bias", "transformer.head_nm.ada_lin.1.bias", FIRST),
        ("head/readout/kernel", "transformer.head.weight", LINEAR),
    ]


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files that are not IBQ's, judged by a few keys; `build` may yet fail.

    Other VQGANs have the same names; of them these have attention beside residual blocks, not in the middle only.
    """
    if "transformer.tok_emb.weight" in shapes and any(key.startswith("transformer.head_nm.") for key in shapes):
        return "generator"
    named = {"quantize.embedding.weight", "quant_conv.weight", "encoder.mid.attn_1.q.weight"} <= shapes.keys()
    beside = any(key.startswith("encoder.down.") and ".attn.0.q." in key for key in shapes)
    return "tokenizer" if named and beside else ""


def tokenizer(shapes: Shapes, size: int, groups: int = 32) -> IBQ:
    """The tokenizer whose state dict has these keys and shapes."""
    features, channels, *_ = shapes["encoder.conv_in.weight"]
    levels = max(count(shapes, r"encoder\.down\.(\d+)\."), 1)
    found = (level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in shapes)
    codes, code_features = shapes["quantize.embedding.weight"]
    return IBQ(
        size=(size, size), features=features,
        mult=tuple(multiple(shapes, f"encoder.down.{i}.block.0.conv1.weight", features) for i in range(levels)),
        res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."), latent=shapes["encoder.conv_out.weight"][0],
        codes=codes, code_features=code_features, groups=groups, channels=channels,
        attention=tuple(level if level < levels - 1 else -1 for level in found),
    )  # fmt: skip


def generator(shapes: Shapes, tokens: tuple[int, int], heads: int = 0) -> Causal:
    """The transformer whose state dict has these keys and shapes; the file holds neither its heads nor its tokens.

    Raises:
      ValueError: the number of heads is not published for the width.
    """
    codes, width = shapes["transformer.tok_emb.weight"]
    heads = heads or HEADS.get(width, 0)
    if not heads:
        raise ValueError(f"the file does not hold the number of heads and width {width} is not published; give --heads")
    backbone = Modulated(
        count(shapes, r"transformer\.blocks\.(\d+)\."), width, heads, dropout=0.1, gate_size=GATES.get(width, 1e-3),
        hidden=shapes["transformer.blocks.0.feed_forward.w1.weight"][0],
    )  # fmt: skip
    classes = shapes["transformer.class_emb.embedding_table.weight"][0] - 1
    return Causal(backbone, Label(width), Categorical(), dropout=0.1).complete(
        TokenSpec(grid(*tokens), codes=(codes,)), Info(classes=classes)
    )


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`. A tokenizer works at any size that is a multiple of its stride."""
    if kind == "tokenizer":
        return tokenizer(shapes, size or 256, groups or 32)
    if size % 16:
        raise ValueError(f"--size is {size}; it must be a multiple of 16 pixels, one token each")
    return generator(shapes, ((size or 256) // 16,) * 2, heads)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    _, rows, columns = module.spec.coords.max(0) + 1
    (codes,) = module.spec.codes
    if isinstance(module, IBQ):
        height, width = module.size
        # files of plain VQGANs with attention have the same names, and nothing in them tells how codes are chosen
        words = f"{height}x{width} pixels to {rows}x{columns} codes out of {codes}, chosen by inner product (plain VQGANs: not so)"
        return words, Info(), {}
    net, info = module.backbone, Info(classes=module.conditioning.classes)
    words = (
        f"{net.layers} layers of width {net.width} with {net.heads} heads, {rows}x{columns} tokens with {codes} codes, "
        f"{info.classes} classes"
    )
    sampling = SAMPLING.get(net.width, Sampling())
    return words, info, {"order": codec.encode(raster), "sampling": codec.encode(sampling)}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: IBQ has no such network.
    """
    if type(module) is IBQ:
        return [("codebook", "quantize.embedding.weight", PLAIN), *mar.tokenizer_rules(module)]
    if type(module) is Causal and type(module.backbone) is Modulated:
        return generator_rules(module)
    raise ValueError(f"IBQ has no {type(module).__name__}")
