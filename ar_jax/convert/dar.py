"""D-AR's released tokenizer and generators. Names and shapes of the generators are LlamaGen's, so they have to be asked for."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.names import CONV1, LINEAR, PLAIN, Layout, Rule, count
from ar_jax.data import Info
from ar_jax.decode.guidance import Between
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.head_norm import HeadNorm, Painter
from ar_jax.orders import raster
from ar_jax.tokenizers.dar import SequentialDiffusion
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

FEATURES = 64  # of a head; not in the file
STEPS, REGISTERS = 8, 256  # of the flow, and tokens of an image; not in the file, whose tables have more rows
ALIGNED = 8  # layer of the painter that features for a teacher are taken before; not in the file
SAMPLING = Sampling(Between(1.2, 8.0))
FIXED = set()  # all parameters are trained
PAINTER = "diff_decoder.net."
LOG, LOGGED = "quantize.codebook_used", 65536  # of how codes were used, and its length


def layers(ours: str, theirs: str, pairs: tuple[tuple[str, str], ...]) -> list[Rule]:
    return [
        rule
        for own, key in pairs
        for rule in (
            (f"{ours}{own}/kernel", f"{theirs}{key}.weight", LINEAR),
            (f"{ours}{own}/scale", f"{theirs}{key}.weight", PLAIN),
            (f"{ours}{own}/bias", f"{theirs}{key}.bias", PLAIN),
        )
    ]


def attention(ours: str, theirs: str) -> tuple[tuple[str, str], ...]:
    names = (
        ("query", "q"),
        ("key", "k"),
        ("value", "v"),
        ("query_norm", "q_norm"),
        ("key_norm", "k_norm"),
        ("out", "proj"),
    )
    return tuple((f"{ours}/{own}", f"{theirs}.{key}") for own, key in names)


def tokenizer_rules(tokenizer: SequentialDiffusion) -> list[Rule]:
    height, width = (cell, cell) if isinstance(cell := tokenizer.cell, int) else cell
    shape = (tokenizer.channels, height, width)
    patches = Layout(lambda x: x.T.reshape(-1, *shape), lambda x: x.reshape(len(x), -1).T)
    perceptron = (("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"))
    norms = (("attention_norm", "norm1"), ("mlp_norm", "norm2"))
    return [
        ("patches/kernel", "patchify.weight", patches),
        ("patches/bias", "patchify.bias", PLAIN),
        ("queries", "query_embedding.weight", PLAIN),
        *layers("", "", (("query", "query_linear"),)),
        ("to_code/kernel", "quant_in_conv.weight", CONV1),
        ("codebook", "quantize.embedding.weight", PLAIN),
        ("from_code/kernel", "quant_out_conv.weight", CONV1),
        ("positions", "decoder_embedding.weight", PLAIN),
        *(
            rule
            for tower in ("encoder", "decoder")
            for rule in (
                *layers(f"{tower}/blocks/", tower + "_layers.{}.", (*attention("attention", "attention"), *norms, *perceptron)),
                (rf"{tower}/blocks/(gate[12])", tower + r"_layers.{}.\1", PLAIN),
            )
        ),
        ("noisy/kernel", f"{PAINTER}conv_in.weight", CONV1),
        ("noisy/bias", f"{PAINTER}conv_in.bias", PLAIN),
        ("to_velocity/kernel", f"{PAINTER}conv_out.weight", CONV1),
        ("to_velocity/bias", f"{PAINTER}conv_out.bias", PLAIN),
        *layers("painter/", PAINTER, (("told", "cond_mlp"),)),
        *layers("painter/blocks/", PAINTER + "blocks.{}.", (
            *attention("attention", "attention"), *attention("across", "cross_attn"), *perceptron,
            ("modulation", "adaLN_modulation.1"), ("time/fc1", "time_embed.mlp.0"), ("time/fc2", "time_embed.mlp.2"),
            ("told1", "cond_embed.0"), ("told2", "cond_embed.2"),
        )),
        *layers("", PAINTER, tuple((f"aligned{i + 1}", f"repa_out.{2 * i}") for i in range(3))),
    ]  # fmt: skip


def tokenizer(shapes: Shapes, size: int, heads: int = 0) -> SequentialDiffusion:
    """The tokenizer whose state dict has these keys and shapes.

    Args:
      heads: of the encoder; 0 are heads of 64 channels, as published. The other networks have heads of as many.
    Raises:
      ValueError: sizes that no such network has.
    """
    width, channels, cell, columns = shapes["patchify.weight"]
    rows, rank = shapes["query_embedding.weight"]
    codes, code_features = shapes["quantize.embedding.weight"]
    features = width // heads if heads else FEATURES

    def tower(kind, where, width, hidden):
        if width % features:
            raise ValueError(f"width {width} is no multiple of {features}, the channels of a head; give --heads")
        depth = count(shapes, where.replace(".", r"\.") + r"\.(\d+)\.")
        return kind(depth, width, width // features, hidden=shapes[f"{where}.0.mlp.fc1.weight"][0] if hidden else 0)

    numbers = shapes[f"{PAINTER}conv_in.weight"][1]
    brush = round((numbers / channels) ** 0.5)
    if cell != columns or channels * brush**2 != numbers:
        raise ValueError(
            f"patches of {cell}x{columns} pixels and of {numbers} numbers of {channels} channels are no squares"
        )
    registers = min(rows, REGISTERS)
    painter = tower(Painter, f"{PAINTER}blocks", shapes[f"{PAINTER}conv_in.weight"][0], True)
    aligned = ()
    if f"{PAINTER}repa_out.0.weight" in shapes:
        hidden, told = shapes[f"{PAINTER}repa_out.0.weight"][0], shapes[f"{PAINTER}repa_out.4.weight"][0]
        aligned = (min(ALIGNED, painter.layers - 1), hidden, told)
    return SequentialDiffusion(
        (size, size), cell, brush, registers, tower(HeadNorm, "encoder_layers", width, True),
        tower(HeadNorm, "decoder_layers", shapes["decoder_embedding.weight"][1], True), painter, codes, code_features,
        min(STEPS, registers), max(registers // STEPS, 1), rank=rank if "query_linear.weight" in shapes else 0,
        rows=0 if rows == registers else rows, aligned=aligned, channels=channels,
    )  # fmt: skip


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files of others, judged by a few keys; `build` may yet fail.

    LlamaGen, which comes before, takes all generators where nobody asks for this family.
    """
    if {"query_embedding.weight", f"{PAINTER}cond_mlp.weight"} <= shapes.keys():
        return "tokenizer"
    return "generator" if llamagen.recognise(shapes) == "generator" else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`."""
    if kind == "tokenizer":
        return tokenizer(shapes, size or 256, heads)
    module = llamagen.gpt(dict(shapes), REGISTERS, heads)
    spec = TokenSpec(grid(1, REGISTERS), codes=module.spec.codes)
    info = Info(classes=module.conditioning.classes) if isinstance(module.conditioning, Label) else None
    if info is None:
        raise ValueError("it takes captions, and D-AR's generators take classes")
    net = module.backbone.clone(line=True)
    return Causal(net, Label(net.width), dropout=0.1).complete(spec, info)


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A log of how codes were used, and empty caches: nothing is computed with them."""
    found = {key: tuple(shape) for key, shape in shapes.items() if key == LOG or ".kv_cache." in key}
    return ({LOG: (LOGGED,)} if isinstance(module, SequentialDiffusion) else {}) | found


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, SequentialDiffusion):
        height, width = module.size
        words = f"{height}x{width} pixels to {module.registers} tokens of {module.codes}, {module.group} for each of "
        return words + f"{module.steps} steps", Info(), {}
    net, classes = module.backbone, module.conditioning.classes
    words = f"{net.layers} layers of width {net.width} with {net.heads} heads, {module.spec.n} tokens on a line, {classes} classes"
    return words, Info(classes=classes), {"order": codec.encode(raster), "sampling": codec.encode(SAMPLING)}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: D-AR has no such network.
    """
    if type(module) is SequentialDiffusion:
        return tokenizer_rules(module)
    if type(module) is Causal and getattr(module.backbone, "line", False) and isinstance(module.conditioning, Label):
        return llamagen.gpt_rules(module)
    raise ValueError(f"D-AR has no {type(module).__name__}")
