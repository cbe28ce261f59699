"""DetailFlow's released tokenizers and generators."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.mar import layers
from ar_jax.convert.names import PLAIN, Layout, Rule, count
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.detailflow import Grouped, Groups
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import Siglip
from ar_jax.tokenizers.detailflow import DetailFlow, Features
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = {768: 12, 1152: 16}  # of the towers by width; not in the file
GROUP, GROUPS = 8, 16  # tokens of a group, and groups that a generator draws; not in the file
GUIDANCE = {16: 1.45, 32: 1.5, 64: 1.32}  # published, by the number of groups
FIXED = set()  # all parameters are trained
BESIDE = ("repa_model.",)  # the frozen teacher
LOG, LOGGED = "quantize.codebook_used", 65536  # of how codes were used, and its length

FIRST = Layout(lambda x: x[None], lambda x: x[0])
PLACES = Layout(lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(math.isqrt(len(x)), -1, x.shape[-1]))


def numbers(cell: int, channels: int, into: bool) -> Layout:
    """Of patches, whose numbers are theirs by row, column, channel and ours by channel, row, column; `into` a network, or out."""

    def theirs(x):  # the last axis
        return x.reshape(*x.shape[:-1], channels, -1).swapaxes(-1, -2).reshape(x.shape)

    def ours(x):
        return x.reshape(*x.shape[:-1], cell**2, channels).swapaxes(-1, -2).reshape(x.shape)

    if into:
        return Layout(lambda x: theirs(x.T), lambda x: ours(x).T)
    return Layout(lambda x: theirs(x).T, lambda x: ours(x.T))


def tower(net: str, theirs: str) -> list[Rule]:
    """Names of a tower."""
    pairs = (
        *(("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")),
        *(("query", "self_attn.q_proj"), ("key", "self_attn.k_proj"), ("value", "self_attn.v_proj")),
        ("out", "self_attn.out_proj"),
    )
    return [
        *layers(f"{net}/blocks/", f"{theirs}encoder.layers.{{}}.", pairs),
        *layers(f"{net}/", theirs, (("norm", "post_layernorm"),)),
    ]


def patches(theirs: str, cell: int, channels: int) -> list[Rule]:
    """Names of what comes before a tower."""
    return [
        ("patches/patch/kernel", f"{theirs}embeddings.patch_embedding.weight", numbers(cell, channels, into=True)),
        ("patches/patch/bias", f"{theirs}embeddings.patch_embedding.bias", PLAIN),
        ("patches/places", f"{theirs}embeddings.position_embedding.weight", PLACES),
    ]


def teacher_rules(teacher: Features, channels: int = 3) -> list[Rule]:
    """Names of the teacher that lies beside a tokenizer."""
    where = f"{BESIDE[0]}visual_model."
    return [*patches(where, teacher.cell, channels), *tower("net", where)]


def tokenizer_rules(tokenizer: DetailFlow) -> list[Rule]:
    into, out, cell, channels = "encoder.visual_model.", "decoder.visual_model.", tokenizer.cell, tokenizer.channels
    return [
        *patches(into, cell, channels),
        *tower("encoder", into),
        *tower("decoder", out),
        ("queries", "encoder.latent_tokens", FIRST),
        ("after_mistake", "encoder.refined_tokens", FIRST),
        ("register_positions", "encoder.latent_pos_embed", FIRST),
        ("code_positions", "decoder.latent_pos_embed", FIRST),
        ("mask", "decoder.mask_token", FIRST),
        ("decoder_positions", f"{out}embeddings.position_embedding.weight", PLACES),
        ("to_pixels/kernel", "decoder.to_pixel.model.weight", numbers(cell, channels, into=False)),
        ("to_pixels/bias", "decoder.to_pixel.model.bias", numbers(cell, channels, into=False)),
        ("codebook", "quantize.embedding.weight", PLAIN),
        *layers("", "", (("to_code", "quant_conv"), ("from_code", "post_quant_conv"), ("mistaken", "refine_conv"))),
        *layers("", "global_token_proj.", (("told1", "0"), ("told2", "2"), ("told3", "4"))),
    ]


def siglip(shapes: Shapes, theirs: str, width: int, heads: int = 0) -> Siglip:
    """The tower whose keys begin with `theirs`; 0 heads are the published number for the width.

    Raises:
      ValueError: there is no such number.
    """
    if not (heads := heads or HEADS.get(width, 0)):
        raise ValueError(f"the file does not hold the number of heads and width {width} is not published; give --heads")
    depth = count(shapes, theirs.replace(".", r"\.") + r"encoder\.layers\.(\d+)\.")
    return Siglip(depth, width, heads, hidden=shapes[f"{theirs}encoder.layers.0.mlp.fc1.weight"][0])


def features(shapes: Shapes, heads: int = 0) -> Features:
    """The teacher that lies beside a tokenizer with these keys and shapes, of RGB images."""
    where = f"{BESIDE[0]}visual_model."
    width, inside = shapes[f"{where}embeddings.patch_embedding.weight"]
    side = math.isqrt(shapes[f"{where}embeddings.position_embedding.weight"][0])
    return Features(siglip(shapes, where, width, heads), cell=math.isqrt(inside // 3), table=side)


def tokenizer(shapes: Shapes, size: int, heads: int = 0, channels: int = 3) -> DetailFlow:
    """The tokenizer whose state dict has these keys and shapes, of RGB images.

    Args:
      size: of the images in pixels; 0 takes the square that its places say.
      heads: of both towers; 0 takes the published numbers.
    """
    into, out = "encoder.visual_model.", "decoder.visual_model."
    width, inside = shapes[f"{into}embeddings.patch_embedding.weight"]
    side = math.isqrt(shapes[f"{into}embeddings.position_embedding.weight"][0])
    codes, code_features = shapes["quantize.embedding.weight"]
    registers, cell = shapes["encoder.latent_tokens"][1], math.isqrt(inside // channels)
    if channels * cell**2 != inside:
        raise ValueError(f"patches of {inside} numbers are no squares of {channels} channels")
    hidden = shapes.get("global_token_proj.0.weight")
    group = math.gcd(registers, GROUP)
    return DetailFlow(
        (size or side * cell,) * 2, cell, registers, group, group, siglip(shapes, into, width, heads),
        siglip(shapes, out, shapes["decoder.mask_token"][2], heads), codes, code_features,
        table=0 if size in (0, side * cell) else side, channels=channels,
        aligned=(hidden[0], shapes["global_token_proj.4.weight"][0]) if hidden else (),
    )  # fmt: skip


def generator_rules(generator: Causal) -> list[Rule]:
    places = ("inputs/places", "spe_tok_embeddings.special_embeddings.weight", PLAIN)
    return [places, *llamagen.gpt_rules(generator)]


def generator(shapes: Shapes, groups: int, heads: int = 0) -> Causal:
    """The transformer whose state dict has these keys and shapes; tokens are `groups` times those of a group."""
    group = shapes["spe_tok_embeddings.special_embeddings.weight"][0] + 1
    module = llamagen.gpt(dict(shapes), 1, heads)
    if not isinstance(module.conditioning, Label):
        raise ValueError("it takes captions, and DetailFlow's generators take classes")
    spec, info = (
        TokenSpec(grid(groups, group), codes=module.spec.codes, placed=False),
        Info(classes=module.conditioning.classes),
    )
    net = module.backbone
    return Causal(net, Label(net.width), inputs=Grouped(group=group), dropout=0.1).complete(spec, info)


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files that are not DetailFlow's, judged by a few keys; `build` may yet fail."""
    if {"refine_conv.weight", "encoder.refined_tokens"} & shapes.keys():
        return "tokenizer"
    return "generator" if any(key.startswith("spe_tok_embeddings.") for key in shapes) else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file.

    Args:
      kind: what `recognise` said.
      shapes: by key.
      size: of the images in pixels; 0 takes what a tokenizer's file says.
      heads: 0 takes the published number.
      groups: of tokens, which a generator's file does not hold; 0 takes those of DetailFlow-16.
      scales: unused.
    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    return tokenizer(shapes, size, heads) if kind == "tokenizer" else generator(shapes, groups or GROUPS, heads)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, DetailFlow):
        height, width = module.size
        words = f"{height}x{width} pixels to {module.registers} tokens of {module.codes}, in groups of {module.group}"
        return words, Info(), {}
    net, classes, group = module.backbone, module.conditioning.classes, module.inputs.group
    words = (
        f"{net.layers} layers of width {net.width} with {net.heads} heads, {module.spec.n} tokens in groups of {group} with "
        f"{module.spec.codes[0]} codes, {classes} classes"
    )
    sampling = Sampling(Interval(GUIDANCE.get(module.spec.n // group, 1.5)))
    order = Groups(group, group)
    return words, Info(classes=classes), {"order": codec.encode(order), "sampling": codec.encode(sampling)}


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A log of recent codes, no part of the function."""
    return {LOG: (LOGGED,)} if isinstance(module, DetailFlow) else {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: DetailFlow has no such network.
    """
    if type(module) is DetailFlow:
        return tokenizer_rules(module)
    if type(module) is Causal and isinstance(module.inputs, Grouped) and isinstance(module.conditioning, Label):
        return generator_rules(module)
    raise ValueError(f"DetailFlow has no {type(module).__name__}")
