"""LlamaGen's released checkpoints: VQ-16 and VQ-8 tokenizers, class- and text-conditional transformers."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.names import CONV, CONV1, LINEAR, PLAIN, Rule, count, multiple, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid

HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}  # by width; not in the file
GUIDANCE = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}  # published scales of the class models, by width
FIXED = {"cls_embedding.uncond_embedding"}  # held as a parameter but never trained


def gpt_rules(generator: Causal) -> list[Rule]:
    layer = "layers.{}."
    return [
        ("backbone/blocks/attention_norm/scale", layer + "attention_norm.weight", PLAIN),
        ("backbone/blocks/mlp_norm/scale", layer + "ffn_norm.weight", PLAIN),
        ("backbone/blocks/qkv/kernel", layer + "attention.wqkv.weight", qkv_layout(generator.backbone.heads)),
        ("backbone/blocks/out/kernel", layer + "attention.wo.weight", LINEAR),
        ("backbone/blocks/gate/kernel", layer + "feed_forward.w1.weight", LINEAR),
        ("backbone/blocks/up/kernel", layer + "feed_forward.w3.weight", LINEAR),
        ("backbone/blocks/down/kernel", layer + "feed_forward.w2.weight", LINEAR),
        ("backbone/norm/scale", "norm.weight", PLAIN),
        ("inputs/embedding", "tok_embeddings.weight", PLAIN),
        ("head/readout/kernel", "output.weight", LINEAR),
        ("conditioning/embedding", "cls_embedding.embedding_table.weight", PLAIN),
        (r"conditioning/(fc[12])/kernel", r"cls_embedding.cap_proj.\1.weight", LINEAR),
        ("conditioning/uncond", "cls_embedding.uncond_embedding", PLAIN),
    ]


def vqgan_rules(tokenizer: VQGAN) -> list[Rule]:
    last = len(tokenizer.mult) - 1

    def level(match, name):  # their decoder counts levels from the coarsest
        return f"{match[1]}.conv_blocks.{match[2] if match[1] == 'encoder' else last - int(match[2])}.{name}"

    side = "(encoder|decoder)"
    rules = [
        ("codebook", "quantize.embedding.weight", PLAIN),
        (r"(quant|post_quant)/kernel", r"\1_conv.weight", CONV1),
        (r"(quant|post_quant)/bias", r"\1_conv.bias", PLAIN),
    ]
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind = CONV if leaf == "kernel" else PLAIN
        point = CONV1 if leaf == "kernel" else PLAIN
        rules += [
            (rf"{side}/(conv_in|conv_out|norm_out)/{leaf}", rf"\1.\2.{key}", kind),
            (rf"{side}/mid_(\d)/(q|k|v|proj_out)/{leaf}", rf"\1.mid.\2.\3.{key}", point),
            (rf"{side}/mid_(\d)/(\w+)/{leaf}", rf"\1.mid.\2.\3.{key}", kind),
            (rf"{side}/down_(\d+)/{leaf}", lambda m, key=key: level(m, f"downsample.conv.{key}"), kind),
            (rf"{side}/up_(\d+)/{leaf}", lambda m, key=key: level(m, f"upsample.conv.{key}"), kind),
            (rf"{side}/res_(\d+)_(\d+)/(\w+)/{leaf}", lambda m, key=key: level(m, f"res.{m[3]}.{m[4]}.{key}"), kind),
            (
                rf"{side}/attn_(\d+)_(\d+)/(q|k|v|proj_out)/{leaf}",
                lambda m, key=key: level(m, f"attn.{m[3]}.{m[4]}.{key}"),
                point,
            ),
            (rf"{side}/attn_(\d+)_(\d+)/norm/{leaf}", lambda m, key=key: level(m, f"attn.{m[3]}.norm.{key}"), kind),
        ]
    return rules


def vqgan(shapes: dict[str, tuple[int, ...]], size: int, groups: int = 32) -> VQGAN:
    """The tokenizer whose state dict has these keys and shapes."""
    features = shapes["encoder.conv_in.weight"][0]

    def mult(side):
        levels = max(count(shapes, rf"{side}\.conv_blocks\.(\d+)\."), 1)
        return tuple(multiple(shapes, f"{side}.conv_blocks.{i}.res.0.conv1.weight", features) for i in range(levels))

    blocks = sum(bool(re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", key)) for key in shapes)
    codes, code_features = shapes["quantize.embedding.weight"]
    encoder, decoder = mult("encoder"), mult("decoder")[::-1]
    return VQGAN(
        size=(size, size), features=features, mult=encoder, decoder_mult=() if decoder == encoder else decoder,
        res_blocks=blocks, latent=shapes["encoder.conv_out.weight"][0], codes=codes, code_features=code_features,
        groups=groups, channels=shapes["encoder.conv_in.weight"][1],
    )  # fmt: skip


def gpt(shapes: dict[str, tuple[int, ...]], tokens: int, heads: int = 0) -> Causal:
    """The transformer whose state dict has these keys and shapes.

    Args:
      shapes: by key.
      tokens: tokens of an image, a square number; the file does not hold it.
      heads: attention heads; 0 takes the published number for the width.
    """
    codes, width = shapes["tok_embeddings.weight"]
    heads = heads or HEADS.get(width, 0)
    if not heads:
        raise ValueError(f"the file does not hold the number of heads and width {width} is not published; give --heads")
    side = round(tokens**0.5)
    backbone = Transformer(
        layers=count(shapes, r"layers\.(\d+)\."), width=width, heads=heads, hidden=shapes["layers.0.feed_forward.w1.weight"][0], dropout=0.1,
    )  # fmt: skip
    if "cls_embedding.uncond_embedding" in shapes:
        rows, features = shapes["cls_embedding.uncond_embedding"]
        conditioning, info = Caption(width), Info(captions=True, text="flan-t5-xl", text_rows=rows, text_width=features)
    else:
        conditioning, info = Label(width), Info(classes=shapes["cls_embedding.embedding_table.weight"][0] - 1)
    spec = TokenSpec(grid(side, side), codes=(codes,))
    return Causal(backbone, conditioning, dropout=0.1).complete(spec, info)


def recognise(shapes: dict[str, tuple[int, ...]]) -> str:
    """ "tokenizer", "generator" or "" for files that are not LlamaGen's, judged by a few keys; `build` may yet fail."""
    if any(key.startswith(("encoder.conv_blocks.", "decoder.conv_blocks.")) for key in shapes):
        return "tokenizer"
    if "tok_embeddings.weight" in shapes or any(key.endswith(".attention.wqkv.weight") for key in shapes):
        return "generator"
    return ""


def build(
    kind: str, shapes: dict[str, tuple[int, ...]], *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> nn.Module:
    """The network of a file.

    Args:
      kind: what `recognise` said.
      shapes: by key.
      size: of the images in pixels; 0 if unknown.
      heads, groups: 0 takes the published number.
      scales: unused.
    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    if kind == "tokenizer":
        return vqgan(shapes, size or 256, groups or 32)
    if not size:
        raise ValueError("the image size is not in the file; give its pixels, such as --size 256 or --size 384")
    if size % 16:
        raise ValueError(f"--size is {size}; it must be a multiple of 16 pixels, one token each")
    return gpt(shapes, (size // 16) ** 2, heads)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, VQGAN):
        (height, width), (rows, columns) = module.size, module.grid
        return f"{height}x{width} pixels to {rows}x{columns} codes out of {module.codes}", Info(), {}
    backbone, conditioning = module.backbone, module.conditioning
    if isinstance(conditioning, Caption):
        encoder = "flan-t5-xl" if conditioning.features == 2048 else ""
        info = Info(captions=True, text=encoder, text_rows=conditioning.rows, text_width=conditioning.features)
        condition = f"{info.text_rows} caption rows of {info.text_width}"
        sampling = Sampling(Interval(7.5), filter=Filter(1000))
    else:
        info = Info(classes=conditioning.classes)
        condition, sampling = f"{info.classes} classes", Sampling(Interval(GUIDANCE.get(backbone.width, 1.0)))
    _, rows, columns = module.spec.coords.max(0) + 1
    words = (
        f"{backbone.layers} layers of width {backbone.width} with {backbone.heads} heads, {rows}x{columns} tokens with "
        f"{module.spec.codes[0]} codes, {condition}"
    )
    return words, info, {"order": codec.encode(raster), "sampling": codec.encode(sampling)}


def buffers(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A log of recent codes, no part of the function."""
    return {"quantize.codebook_used": (65536,)} if isinstance(module, VQGAN) else {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: LlamaGen has no such network.
    """
    if type(module) is VQGAN:
        return vqgan_rules(module)
    if type(module) is Causal and isinstance(module.conditioning, Caption | Label):
        return gpt_rules(module)
    raise ValueError(f"LlamaGen has no {type(module).__name__}")
