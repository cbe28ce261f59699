"""Hita's released checkpoints: tokenizers V and U, without their frozen DINOv2, and the class-conditional transformers."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.mar import layers
from ar_jax.convert.names import CONV1, LINEAR, PLAIN, Layout, Rule, count, multiple
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.hita import ByLevel, Holistic, TwoTables
from ar_jax.nets.conditioning import Label
from ar_jax.orders import raster
from ar_jax.tokenizers.hita import Hita
from ar_jax.tokens import TokenSpec, pyramid
from ar_jax.train.exported import Exported

Shapes = Mapping[str, tuple[int, ...]]

HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 1920: 32}  # of the generators by width; not in the file
TOKENIZER_HEADS = 8  # not in the file
TEACHER = Exported("teachers/dinov2_l_reg.export")  # which encoding needs, and files hold beside the network
FIXED = set()  # all parameters are trained
AVERAGED = ("tokenizer", "generator")
BESIDE = ("encode_transformer.backbone.",)

ROW = Layout(lambda x: x[None], lambda x: x[0])


def tokenizer_rules(tokenizer: Hita) -> list[Rule]:
    into, back = "encode_transformer.", "decode_transformer."
    rules = [
        ("codebook", "quantize.embedding.weight", PLAIN),
        ("carrier_codebook", "slot_quantize.embedding.weight", PLAIN),
        ("mixed/carriers", f"{into}carrier_tokens", ROW),
        ("mixed/places", f"{into}pos_embed", ROW),
        ("spread/slots", f"{back}slot_position_embedding", ROW),
        ("spread/places", f"{back}position_embedding", ROW),
        ("spread/ask", f"{back}mask_embedding", ROW),
        *layers("mixed/told/", f"{into}proj.mlp.", (("fc1", "0"), ("norm1", "1"), ("fc2", "3"), ("norm2", "4"))),
        *layers("mixed/", into, (("first_norm", "norm_pre1"), ("second_norm", "norm_pre2"))),
        *layers("spread/", back, (("norm", "norm"), ("ask_norm", "norm_vfm"), ("tell", "proj"))),
        *layers("", "", (("carrier_quant", "pre_slots_quant"), ("carrier_post_quant", "post_slots_quant"))),
        *((f"{ours}/kernel", f"{ours}_conv.weight", CONV1) for ours in ("quant", "post_quant")),
        *((f"{ours}/bias", f"{ours}_conv.bias", PLAIN) for ours in ("quant", "post_quant")),
    ]
    plain = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj"))
    first = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0"))
    for ours, theirs, attention in (
        ("mixed/first", f"{into}transformer1", first), ("mixed/second", f"{into}transformer2", plain),
        ("spread/net", f"{back}transformer", plain),
    ):  # fmt: skip
        block, layer = f"{ours}/blocks/", f"{theirs}.layers.{{}}."
        rules += layers(block, f"{layer}attn1.", attention)
        rules += layers(block, layer, (("attention_norm", "norm1"), ("mlp_norm", "norm2"), ("down", "ffnet.w3")))
        for i, name in enumerate(("gate", "up")):
            rules += [
                (f"{block}{name}/kernel", f"{layer}ffnet.w12.weight", LINEAR._replace(part=(i, 2))),
                (f"{block}{name}/bias", f"{layer}ffnet.w12.bias", PLAIN._replace(part=(i, 2))),
            ]
    return rules + llamagen.vqgan_rules(tokenizer)


def tokenizer(shapes: Shapes, size: int, heads: int = 0, groups: int = 0) -> Hita:
    """The tokenizer whose state dict has these keys and shapes.

    Args:
      shapes: by key.
      size: of the images in pixels; 0 takes the square that its places say.
      heads: of all its transformers; 0 takes the published number.
      groups: of the group norms; 0 takes the published number.
    Raises:
      ValueError: the widths of the first transformer's layers are no whole number of heads.
    """
    into, back, heads = "encode_transformer.", "decode_transformer.", heads or TOKENIZER_HEADS
    features = shapes["encoder.conv_in.weight"][0]

    def mult(side):
        levels = max(count(shapes, rf"{side}\.conv_blocks\.(\d+)\."), 1)
        return tuple(multiple(shapes, f"{side}.conv_blocks.{i}.res.0.conv1.weight", features) for i in range(levels))

    codes, code_features = shapes["quantize.embedding.weight"]
    _, places, _ = shapes[f"{into}pos_embed"]
    target = shapes.get(f"{back}proj.weight")
    key = f"{into}transformer1.layers.0.attn1.to_q.weight"
    if shapes[key][0] % heads:
        raise ValueError(
            f"{key} has shape {tuple(shapes[key])}, whose first axis is no multiple of {heads} heads; give --heads"
        )
    side = round(places**0.5) * 2 ** (len(mult("encoder")) - 1)
    return Hita(
        size=(size or side,) * 2, carriers=shapes[f"{into}carrier_tokens"][1], features=features, mult=mult("encoder"),
        res_blocks=count(shapes, r"encoder\.conv_blocks\.0\.res\.(\d+)\.conv1\.weight"),
        latent=shapes["encoder.conv_out.weight"][0], layers=count(shapes, r"encode_transformer\.transformer1\.layers\.(\d+)\."),
        heads=heads, head_features=shapes[key][0] // heads,
        hidden=shapes[f"{into}transformer1.layers.0.ffnet.w3.weight"][1], codes=codes, code_features=code_features,
        carrier_features=shapes["slot_quantize.embedding.weight"][1], groups=groups or 32, teacher=TEACHER,
        feature_width=shapes[f"{into}proj.mlp.0.weight"][1], tell=float(target is not None),
        channels=shapes["encoder.conv_in.weight"][1],
    )  # fmt: skip


def generator_rules(generator: Causal) -> list[Rule]:
    return [
        ("inputs/level_0", "slot_embeddings.weight", PLAIN),
        ("inputs/level_1", "tok_embeddings.weight", PLAIN),
        ("backbone/slots", "slot_pos.weight", PLAIN),
        *llamagen.gpt_rules(generator),
    ]


def generator(shapes: Shapes, patches: int, heads: int = 0) -> Causal:
    """The transformer whose state dict has these keys and shapes.

    Args:
      shapes: by key.
      patches: of an image, a square number; the file does not hold it.
      heads: 0 takes the published number for the width.
    """
    slots, width = shapes["slot_pos.weight"]
    if not (heads := heads or HEADS.get(width, 0)):
        raise ValueError(f"the file does not hold the number of heads and width {width} is not published; give --heads")
    backbone = Holistic(
        count(shapes, r"layers\.(\d+)\."),
        width,
        heads,
        hidden=shapes["layers.0.feed_forward.w1.weight"][0],
        dropout=0.1,
    )
    info = Info(classes=shapes["cls_embedding.embedding_table.weight"][0] - 1)
    side = round(patches**0.5)
    spec = TokenSpec(pyramid(((1, slots), side)), codes=(shapes["tok_embeddings.weight"][0],))
    module = Causal(backbone, Label(width), ByLevel(), TwoTables(), dropout=0.1, emphasis="levels")
    return module.complete(spec, info)


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files that are not Hita's, judged by a few keys; `build` may yet fail."""
    if any(key.startswith("encode_transformer.") for key in shapes) and "pre_slots_quant.weight" in shapes:
        return "tokenizer"
    return "generator" if "slot_pos.weight" in shapes else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file.

    Args:
      kind: what `recognise` said.
      shapes: by key.
      size: of the images in pixels; 0 takes what a tokenizer's file says, and 336 for a generator, with a patch of 16.
      heads, groups: 0 takes the published number.
      scales: unused.
    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    if kind == "tokenizer":
        return tokenizer(shapes, size, heads, groups)
    if size % 16:
        raise ValueError(f"--size is {size}; it must be a multiple of 16 pixels, one patch each")
    return generator(shapes, ((size or 336) // 16) ** 2, heads)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, Hita):
        (height, width), (rows, columns) = module.size, module.grid
        words = f"{height}x{width} pixels to {module.carriers} codes and {rows}x{columns}, out of {module.codes} each"
        return words, Info(), {}
    net, info = module.backbone, Info(classes=module.conditioning.classes)
    (_, slots), (rows, columns) = module.spec.scales
    words = (
        f"{net.layers} layers of width {net.width} with {net.heads} heads, {slots} tokens and {rows}x{columns} with "
        f"{module.spec.codes[0]} codes, {info.classes} classes"
    )
    return words, info, {"order": codec.encode(raster), "sampling": codec.encode(Sampling(Interval(1.0)))}


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Logs of recent codes, no part of the function."""
    if not isinstance(module, Hita):
        return {}
    return {f"{name}.codebook_used": (65536,) for name in ("quantize", "slot_quantize")}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: Hita has no such network.
    """
    if type(module) is Hita:
        return tokenizer_rules(module)
    if type(module) is Causal and (type(module.backbone), type(module.inputs)) == (Holistic, TwoTables):
        return generator_rules(module)
    raise ValueError(f"Hita has no {type(module).__name__}")
