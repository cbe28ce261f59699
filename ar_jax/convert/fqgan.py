"""FQGAN's released checkpoints: tokenizers with two and three codebooks; and the names of its generator, FAR."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.mar import layers, qkv_bias
from ar_jax.convert.names import CONV, CONV1, LINEAR, PLAIN, Rule, count, multiple, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Joined
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.fqgan import FQGAN
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

GENERATOR_HEADS = {1024: 16, 1280: 20}  # by width; not in the file
HEADS = 8  # of all adapters and feature heads of the tokenizers; not in the file
FIXED = set()  # all parameters are trained

# by the number of codebooks: what streams, their adapters and their feature heads are called
STREAMS = {2: ("vis", "sem"), 3: ("vis", "sem_mid", "sem_high")}
ADAPTERS = {2: ("visual_head", "semantic_head"), 3: ("visual_head", "semantic_head_mid", "semantic_head_high")}
FEATURES = {2: ("feat_pred_head",), 3: ("mid_sem_feat_pred", "high_sem_feat_pred")}


def tokenizer_rules(tokenizer: FQGAN) -> list[Rule]:
    k = tokenizer.streams
    if k not in STREAMS:
        raise ValueError(f"FQGAN has two or three streams, not {k}")
    rules = llamagen.vqgan_rules(tokenizer)
    for i, (stream, adapter) in enumerate(zip(STREAMS[k], ADAPTERS[k])):
        rules += [
            (f"codebook_{i}", f"quantize_{stream}.embedding.weight", PLAIN),
            (f"stream_{i}/quant/kernel", f"quant_conv_{stream}.weight", CONV1),
            (f"stream_{i}/quant/bias", f"quant_conv_{stream}.bias", PLAIN),
            (f"stream_{i}/conv_out/kernel", f"encoder.conv_out_{stream}.weight", CONV),
            (f"stream_{i}/conv_out/bias", f"encoder.conv_out_{stream}.bias", PLAIN),
            (f"stream_{i}/norm_out/scale", f"encoder.norm_out_{stream}.weight", PLAIN),
            (f"stream_{i}/norm_out/bias", f"encoder.norm_out_{stream}.bias", PLAIN),
            *_adapter(f"stream_{i}/adapter/", f"encoder.{adapter}.0.", tokenizer.heads),
        ]
    for i, name in enumerate(FEATURES[k]):
        rules += [
            (f"features_{i}/image", f"{name}.class_embedding", PLAIN),
            *layers(f"features_{i}/", f"{name}.", (("fc1", "upscale.0"), ("fc2", "upscale.2"))),
            *_adapter(f"features_{i}/adapter/", f"{name}.", tokenizer.feature_heads),
        ]
    return rules


def _adapter(ours, theirs, heads):
    block = ours + "vit/blocks/"
    pairs = (
        ("attention_norm", "ln_1"), ("mlp_norm", "ln_2"), ("out", "attn.out_proj"), ("fc1", "mlp.c_fc"),
        ("fc2", "mlp.c_proj"),
    )  # fmt: skip
    return [
        (f"{ours}positions", f"{theirs}positional_embedding", PLAIN),
        *layers(ours, theirs, (("first", "ln_pre"), ("vit/norm", "ln_post"))),
        (f"{block}qkv/kernel", f"{theirs}transformer.{{}}.attn.in_proj_weight", qkv_layout(heads)),
        (f"{block}qkv/bias", f"{theirs}transformer.{{}}.attn.in_proj_bias", qkv_bias(heads)),
        *layers(block, f"{theirs}transformer.{{}}.", pairs),
    ]


def tokenizer(shapes: Shapes, heads: int = 0, groups: int = 0) -> FQGAN:
    """The tokenizer whose state dict has these keys and shapes.

    Args:
      shapes: by key.
      heads: of adapters and feature heads; 0 takes the published number.
      groups: of the group norms; 0 takes the published number.
    """
    k = 3 if any(key.startswith("encoder.semantic_head_mid.") for key in shapes) else 2
    features = shapes["encoder.conv_in.weight"][0]

    def mult(side):
        levels = max(count(shapes, rf"{side}\.conv_blocks\.(\d+)\."), 1)
        return tuple(multiple(shapes, f"{side}.conv_blocks.{i}.res.0.conv1.weight", features) for i in range(levels))

    encoder, decoder = mult("encoder"), mult("decoder")[::-1]
    places, _ = shapes["encoder.visual_head.0.positional_embedding"]
    size = round(places**0.5) * 2 ** (len(encoder) - 1)
    codes, code_features = shapes["quantize_vis.embedding.weight"]
    present = [name for name in FEATURES[k] if f"{name}.class_embedding" in shapes]
    if present and len(present) < len(FEATURES[k]):
        raise ValueError(f"the feature head {(set(FEATURES[k]) - set(present)).pop()} is missing beside {present[0]}")
    return FQGAN(
        size=(size, size), features=features, mult=encoder, decoder_mult=() if decoder == encoder else decoder,
        res_blocks=count(shapes, r"encoder\.conv_blocks\.0\.res\.(\d+)\.conv1\.weight"),
        latent=shapes["encoder.conv_out_vis.weight"][0], codes=codes, code_features=code_features,
        groups=groups or 32, channels=shapes["encoder.conv_in.weight"][1], streams=k,
        layers=count(shapes, r"encoder\.visual_head\.0\.transformer\.(\d+)\."), heads=heads or HEADS,
        feature_widths=tuple(shapes[f"{name}.class_embedding"][1] for name in present),
        feature_layers=count(shapes, rf"{FEATURES[k][0]}\.transformer\.(\d+)\."), feature_heads=heads or HEADS,
    )  # fmt: skip


def generator_rules(generator: Causal) -> list[Rule]:
    def numbered(match, name):  # they count from 1
        return f"{name}_{int(match[1]) + 1}.weight"

    rules = llamagen.gpt_rules(generator)
    blocks = [
        (ours.replace("backbone", "head/net"), theirs.replace("layers.", "ar_head."), layout)
        for ours, theirs, layout in llamagen.gpt_rules(generator)
        if ours.startswith("backbone/blocks/") and "qkv" not in ours
    ]
    return [
        *(rule for rule in rules if rule[0].startswith(("backbone/blocks/", "conditioning/embedding"))),
        *blocks,
        ("head/net/blocks/qkv/kernel", "ar_head.{}.attention.wqkv.weight", qkv_layout(generator.head.net.heads)),
        ("head/net/norm/scale", "norm.weight", PLAIN),
        (r"head/tables_(\d+)/embedding", lambda m: numbered(m, "tok_embeddings"), PLAIN),
        (r"head/readouts_(\d+)/readout/kernel", lambda m: numbered(m, "output"), LINEAR),
        *layers("", "", (("inputs/projection", "aggregation_layer"),)),
    ]


def generator(shapes: Shapes, tokens: int, heads: int = 0) -> Causal:
    """The generator whose state dict has these keys and shapes.

    Args:
      shapes: by key.
      tokens: places of an image, a square number; the file does not hold it.
      heads: attention heads; 0 takes the published number for the width.
    """
    streams = max(int(m[1]) for key in shapes if (m := re.fullmatch(r"tok_embeddings_(\d+)\.weight", key)))
    codes, width = zip(*(shapes[f"tok_embeddings_{k + 1}.weight"] for k in range(streams)))
    heads = heads or GENERATOR_HEADS.get(width[0], 0)
    if not heads:
        raise ValueError(
            f"the file does not hold the number of heads and width {width[0]} is not published; give --heads"
        )

    def net(prefix, **options):
        depth, hidden = count(shapes, prefix + r"\.(\d+)\."), shapes[f"{prefix}.0.feed_forward.w1.weight"][0]
        return Transformer(depth, width[0], heads, hidden=hidden, dropout=0.1, **options)

    info = Info(classes=shapes["cls_embedding.embedding_table.weight"][0] - 1)
    spec = TokenSpec(grid(round(tokens**0.5), round(tokens**0.5)), codes=codes)
    module = Causal(net("layers", final=False), Label(width[0]), Factorised(net("ar_head")), Joined(), dropout=0.1)
    return module.complete(spec, info)


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files that are not FQGAN's, judged by a few keys; `build` may yet fail."""
    if any(key.startswith("encoder.visual_head.") for key in shapes):
        return "tokenizer"
    return "generator" if {"aggregation_layer.weight", "tok_embeddings_1.weight"} <= shapes.keys() else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file.

    Args:
      kind: what `recognise` said.
      shapes: by key.
      size: of the images in pixels; 0 if unknown, which is 256 for a generator, with a place for every 16 pixels.
      heads, groups: 0 takes the published number.
      scales: unused.
    Raises:
      ValueError: the size is not that of the file, or no multiple of 16.
      KeyError: a key is missing.
    """
    if kind == "generator":
        if size % 16:
            raise ValueError(f"--size is {size}; it must be a multiple of 16 pixels, one token each")
        return generator(shapes, ((size or 256) // 16) ** 2, heads)
    found = tokenizer(shapes, heads, groups)
    if size not in (0, found.size[0]):
        raise ValueError(f"--size is {size}, but its positions are of images of {found.size[0]} pixels; leave it out")
    return found


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, Causal):
        net, head, info = module.backbone, module.head.net, Info(classes=module.conditioning.classes)
        _, rows, columns = module.spec.coords.max(0) + 1
        words = (
            f"{net.layers} layers of width {net.width} with {net.heads} heads and {head.layers} of the head, "
            f"{rows}x{columns} tokens with {len(module.spec.codes)} codes of {module.spec.codes[0]}, {info.classes} classes"
        )
        return words, info, {"order": codec.encode(raster), "sampling": codec.encode(Sampling(Interval(2.0)))}
    (height, width), (rows, columns) = module.size, module.grid
    words = f"{height}x{width} pixels to {rows}x{columns} places with {module.streams} codes out of {module.codes} each"
    return words, Info(), {}


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A log of recent codes, no part of the function."""
    if isinstance(module, Causal):
        return {}
    return {f"quantize_{stream}.codebook_used": (65536,) for stream in STREAMS.get(module.streams, ())}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: FQGAN has no such network.
    """
    if isinstance(module, FQGAN):
        return tokenizer_rules(module)
    parts = (Factorised, Joined, Label)
    if type(module) is Causal and (type(module.head), type(module.inputs), type(module.conditioning)) == parts:
        return generator_rules(module)
    raise ValueError(f"FQGAN has no {type(module).__name__}")
