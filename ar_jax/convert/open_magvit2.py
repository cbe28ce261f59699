"""Open-MAGVIT2's released checkpoints: the tokenizers for 128 and 256 pixels, the generators B, L and XL."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.names import CONV, LINEAR, PLAIN, Rule, count, multiple, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import BySubCode
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import BySubCode as Temperatures
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Previous
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.lookup_free import LookupFree
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

BITS = {18: (6, 12)}  # of the sub-codes that generators draw, by the number of latent channels; not in the file
HEADS = {1024: 16, 1280: 20, 1536: 24}  # by width; not in the file
SAMPLING = {  # published settings by width, of the first sub-code and of the second
    width: Sampling(BySubCode(first, (second,)), Temperatures(warm, (1.0,)))
    for width, first, second, warm in ((1024, 1.9, 2.0, 1.0), (1280, 1.9, 1.9, 1.1), (1536, 1.75, 1.85, 1.1))
}
FIXED = set()  # all parameters are trained
BESIDE = ("loss.", "model_ema.", "first_stage_model.")
BEFORE = "transformer."
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


def generator_rules(generator: Causal) -> list[Rule]:
    rules = [
        ("head/tables_0/embedding", "transformer.pre_emb.weight", PLAIN),
        ("head/tables_1/embedding", "transformer.post_emb.weight", PLAIN),
        ("conditioning/embedding", "transformer.class_emb.embedding_table.weight", PLAIN),
        ("head/net/norm/scale", "transformer.norm.weight", PLAIN),
        (r"head/readouts_(\d)/readout/kernel", r"transformer.head.\1.weight", LINEAR),
    ]
    for ours, theirs, net in (
        ("backbone", "spatial", generator.backbone),
        ("head/net", "factorized", generator.head.net),
    ):
        layer = f"transformer.{theirs}_blocks.{{}}."
        rules += [
            (f"{ours}/blocks/attention_norm/scale", layer + "attention_norm.weight", PLAIN),
            (f"{ours}/blocks/mlp_norm/scale", layer + "ffn_norm.weight", PLAIN),
            (f"{ours}/blocks/qkv/kernel", layer + "attention.wqkv.weight", qkv_layout(net.heads)),
            (f"{ours}/blocks/out/kernel", layer + "attention.wo.weight", LINEAR),
            (f"{ours}/blocks/gate/kernel", layer + "feed_forward.w1.weight", LINEAR),
            (f"{ours}/blocks/up/kernel", layer + "feed_forward.w3.weight", LINEAR),
            (f"{ours}/blocks/down/kernel", layer + "feed_forward.w2.weight", LINEAR),
        ]
    return rules


def generator(shapes: Shapes, tokens: tuple[int, int], heads: int = 0) -> Causal:
    """The transformer whose state dict has these keys and shapes; the file holds neither its heads nor its tokens.

    Raises:
      ValueError: the number of heads is not published for the width.
    """
    codes, width = zip(*(shapes[f"transformer.{part}_emb.weight"] for part in ("pre", "post")))
    width, heads = width[0], heads or HEADS.get(width[0], 0)
    if not heads:
        raise ValueError(f"the file does not hold the number of heads and width {width} is not published; give --heads")

    def layers(part):
        hidden = shapes[f"transformer.{part}_blocks.0.feed_forward.w1.weight"][0]
        return {"layers": count(shapes, rf"transformer\.{part}_blocks\.(\d+)\."), "hidden": hidden}

    net = {"width": width, "heads": heads, "dropout": 0.1}
    classes = shapes["transformer.class_emb.embedding_table.weight"][0] - 1
    return Causal(
        Transformer(**layers("spatial"), **net, final=False), Label(width),
        Factorised(Transformer(**layers("factorized"), **net), summed=True), Previous(shared=True), dropout=0.1,
    ).complete(TokenSpec(grid(*tokens), codes=codes), Info(classes=classes))  # fmt: skip


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files that are not Open-MAGVIT2's, judged by a few keys; `build` may yet fail."""
    if any(key.startswith("transformer.factorized_blocks.") for key in shapes):
        return "generator"
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
    if kind == "tokenizer":
        return tokenizer(shapes, size or 256, groups or 32)
    if size % 16:
        raise ValueError(f"--size is {size}; it must be a multiple of 16 pixels, one token each")
    return generator(shapes, ((size or 256) // 16,) * 2, heads)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    of = " x ".join(f"{codes}" for codes in module.spec.codes)
    _, rows, columns = module.spec.coords.max(0) + 1
    if isinstance(module, LookupFree):
        height, width = module.size
        return f"{height}x{width} pixels to {rows}x{columns} codes out of {of}", Info(), {}
    net, info = module.backbone, Info(classes=module.conditioning.classes)
    words = (
        f"{net.layers} layers and {module.head.net.layers} of its head of width {net.width} with {net.heads} heads, "
        f"{rows}x{columns} tokens with {of} codes, {info.classes} classes"
    )
    sampling = SAMPLING.get(net.width, Sampling())
    return words, info, {"order": codec.encode(raster), "sampling": codec.encode(sampling)}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: Open-MAGVIT2 has no such network.
    """
    if type(module) is LookupFree:
        return tokenizer_rules(module)
    if (
        type(module) is Causal
        and (type(module.head), type(module.inputs)) == (Factorised, Previous)
        and module.inputs.shared
    ):
        return generator_rules(module)
    raise ValueError(f"Open-MAGVIT2 has no {type(module).__name__}")
