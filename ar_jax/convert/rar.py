"""RAR's released checkpoints: the MaskGIT-VQGAN tokenizer, and the transformers B, L, XL and XXL."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.mar import layers, qkv_bias
from ar_jax.convert.names import CONV, PLAIN, Layout, Rule, count, multiple, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.rar import Aimed, Placed, PowerCosine, StartLabel
from ar_jax.heads.categorical import Categorical
from ar_jax.orders import raster
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = 16  # of all released models
MORE_POSITIONS, MORE_PLACES = 1024, 100  # rows of the released tables beyond the number of tokens
FIXED = set()  # all parameters are trained
SAMPLING = {  # published settings by width
    width: Sampling(PowerCosine(weight, power), Constant(temperature))
    for width, weight, power, temperature in (
        (768, 16.0, 2.75, 1.0), (1024, 15.5, 2.5, 1.02), (1280, 6.9, 1.5, 1.02), (1408, 8.0, 1.2, 1.02)
    )
}  # fmt: skip

ONE = Layout(lambda x: x[None, None], lambda x: x[0, 0])  # a vector
TABLE = Layout(lambda x: x[None], lambda x: x[0], axis=1)


def tokenizer_rules(tokenizer: MaskgitVQGAN) -> list[Rule]:
    side = "(encoder|decoder)"
    rules = [("codebook", "quantize.embedding.weight", PLAIN)]
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind = CONV if leaf == "kernel" else PLAIN
        rules += [
            (rf"{side}/(conv_in|conv_out|norm_out)/{leaf}", rf"\1.\2.{key}", kind),
            (rf"{side}/mid_(\d+)/(\w+)/{leaf}", rf"\1.mid.\2.\3.{key}", kind),
            (rf"encoder/res_(\d+)_(\d+)/(\w+)/{leaf}", rf"encoder.down.\1.block.\2.\3.{key}", kind),
            (rf"decoder/res_(\d+)_(\d+)/(\w+)/{leaf}", rf"decoder.up.\1.block.\2.\3.{key}", kind),
            (rf"decoder/up_(\d+)/{leaf}", rf"decoder.up.\1.upsample_conv.{key}", kind),
        ]
    return rules


def generator_rules(generator: Causal) -> list[Rule]:
    heads, codes = generator.backbone.heads, generator.spec.codes[0]
    ids = PLAIN._replace(part=(0, (codes, generator.conditioning.classes + 2)))
    positions = TABLE._replace(part=(0, (2, generator.inputs.rows or generator.spec.n)))
    pairs = (
        ("attention_norm", "norm1"), ("mlp_norm", "norm2"), ("q_norm", "attn.q_norm"), ("k_norm", "attn.k_norm"),
        ("out", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"), ("modulation", "adaLN_modulation.1"),
    )  # fmt: skip
    return [
        ("inputs/embedding", "embeddings.weight", ids),
        ("conditioning/embedding", "embeddings.weight", ids._replace(part=(1, ids.part[1]))),
        ("conditioning/cls", "cls_token", ONE),
        ("conditioning/position", "pos_embed", positions),
        ("inputs/position", "pos_embed", positions._replace(part=(1, positions.part[1]))),
        ("inputs/aim", "target_aware_pos_embed", TABLE),
        ("backbone/place", "timesteps_embeddings", TABLE),
        ("backbone/blocks/qkv/kernel", "blocks.{}.attn.qkv.weight", qkv_layout(heads)),
        ("backbone/blocks/qkv/bias", "blocks.{}.attn.qkv.bias", qkv_bias(heads)),
        *layers("backbone/blocks/", "blocks.{}.", pairs),
        *layers("", "", (("backbone/final", "adaln_before_head.adaLN_modulation.1"), ("head/readout", "lm_head"))),
    ]


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files that are not RAR's, judged by a few keys; `build` may yet fail."""
    if {"decoder.up.1.upsample_conv.weight", "quantize.embedding.weight"} <= shapes.keys():
        return "tokenizer"
    return "generator" if "target_aware_pos_embed" in shapes else ""


def tokenizer(shapes: Shapes, size: int, groups: int = 32) -> MaskgitVQGAN:
    """The tokenizer whose state dict has these keys and shapes."""
    features = shapes["encoder.conv_in.weight"][0]

    def mult(side):
        levels = max(count(shapes, rf"{side}\.(\d+)\."), 1)
        return tuple(multiple(shapes, f"{side}.{i}.block.0.conv1.weight", features) for i in range(levels))

    encoder, decoder = mult("encoder.down"), mult("decoder.up")
    codes, code_features = shapes["quantize.embedding.weight"]
    return MaskgitVQGAN(
        size=(size, size), features=features, mult=encoder, decoder_mult=() if decoder == encoder else decoder,
        res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."), codes=codes, code_features=code_features,
        groups=groups, channels=shapes["encoder.conv_in.weight"][1],
    )  # fmt: skip


def generator(shapes: Shapes, heads: int = HEADS) -> Causal:
    """The transformer whose state dict has these keys and shapes; its table of positions says how many tokens there are.

    Raises:
      ValueError: they fill no square.
    """
    codes, width = shapes["lm_head.weight"]
    positions, places = (shapes[key][1] for key in ("pos_embed", "timesteps_embeddings"))
    side = round(max(positions - MORE_POSITIONS, 0) ** 0.5)
    if not side or side**2 + MORE_POSITIONS != positions:
        raise ValueError(
            f"pos_embed has {positions} rows, which is not {MORE_POSITIONS} more than the tokens of a square image"
        )
    backbone = Placed(
        count(shapes, r"blocks\.(\d+)\."), width, heads, hidden=shapes["blocks.0.mlp.fc1.weight"][0], rows=places,
        dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    module = Causal(backbone, StartLabel(width), Categorical(bias=True, std=0.02), Aimed(rows=positions - 2))
    info = Info(classes=shapes["embeddings.weight"][0] - codes - 2)
    return module.complete(TokenSpec(grid(side, side), codes=(codes,)), info)


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> nn.Module:  # fmt: skip
    """The network of a file; the arguments are those of `llamagen.build`. A generator's file says how many tokens it has.

    Raises:
      ValueError: no network has such a table of positions.
      KeyError: a key is missing.
    """
    return tokenizer(shapes, size or 256, groups or 32) if kind == "tokenizer" else generator(shapes, heads or HEADS)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, MaskgitVQGAN):
        (height, width), (rows, columns) = module.size, module.grid
        return f"{height}x{width} pixels to {rows}x{columns} codes out of {module.codes}", Info(), {}
    net, info = module.backbone, Info(classes=module.conditioning.classes)
    _, rows, columns = module.spec.coords.max(0) + 1
    words = (
        f"{net.layers} layers of width {net.width} with {net.heads} heads, {rows}x{columns} tokens with "
        f"{module.spec.codes[0]} codes, {info.classes} classes"
    )
    sampling = SAMPLING.get(net.width, Sampling())
    return words, info, {"order": codec.encode(raster), "sampling": codec.encode(sampling)}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: RAR has no such network.
    """
    if type(module) is MaskgitVQGAN:
        return tokenizer_rules(module)
    if type(module) is Causal and type(module.backbone) is Placed and type(module.inputs) is Aimed:
        return generator_rules(module)
    raise ValueError(f"RAR has no {type(module).__name__}")
