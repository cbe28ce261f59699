"""Binary Latent Diffusion's released autoencoders and denoisers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.mar import layers, qkv_bias
from ar_jax.convert.names import CONV, CONV1, PLAIN, Layout, Rule, count, multiple, qkv_layout
from ar_jax.data import Info
from ar_jax.files import codec
from ar_jax.generators.binary_diffusion import BinaryDiffusion, Denoised, Scaled, Shown
from ar_jax.nets.conditioning import Nothing
from ar_jax.tokenizers.binary_autoencoder import BinaryAutoencoder
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = 12  # of the denoisers; not in the file
FIXED = set()  # all parameters are trained
AVERAGED = ("tokenizer", "generator")  # the released files are averages


def places(side: str, module: BinaryAutoencoder) -> Iterator[str]:
    """Our names of a network's layers, in the order in which the file numbers them."""
    levels = list(range(len(module.mult)))
    attention = {level % len(levels) for level in module.attention}
    blocks = module.res_blocks if side == "encoder" else module.decoder_blocks or module.res_blocks

    def level_of(level):
        for i in range(blocks):
            yield f"{side}/res_{level}_{i}"
            if level in attention:
                yield f"{side}/attn_{level}_{i}"

    middle = [f"{side}/mid_{i}" for i in range(3)]
    if side == "encoder":
        yield "encoder/conv_in"
        for level in levels:
            yield from level_of(level)
            if level < levels[-1]:
                yield f"encoder/down_{level}"
        yield from middle
    else:
        if module.norm_first:
            yield "norm"
        yield "decoder/conv_in"
        yield from middle
        for level in levels[::-1]:
            yield from level_of(level)
            if level:
                yield f"decoder/up_{level}"
    yield from (f"{side}/norm_out", f"{side}/conv_out")


def tokenizer_rules(module: BinaryAutoencoder, prefix: str = "ae.") -> list[Rule]:
    rules = [
        ("embedding", f"{prefix}quantize.embed.weight", PLAIN),
        ("quant/kernel", f"{prefix}quantize.proj.0.weight", CONV1),
        ("quant/bias", f"{prefix}quantize.proj.0.bias", PLAIN),
    ]
    for ours, theirs in (("encoder", "encoder"), ("decoder", "generator")):
        for i, name in enumerate(places(ours, module)):
            key = f"{prefix}{theirs}.blocks.{i}"
            if re.search(r"/(down|up)_\d+$", name):
                key += ".conv"
            for leaf, end in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
                kind = CONV if leaf == "kernel" else PLAIN
                point = CONV1 if leaf == "kernel" else PLAIN
                rules += [
                    (f"{name}/{leaf}", f"{key}.{end}", kind),
                    (f"{name}/nin_shortcut/{leaf}", f"{key}.conv_out.{end}", kind),
                    (rf"{name}/(q|k|v|proj_out)/{leaf}", rf"{key}.\1.{end}", point),
                    (rf"{name}/(\w+)/{leaf}", rf"{key}.\1.{end}", kind),
                ]
    return rules


def generator_rules(generator: BinaryDiffusion, prefix: str = "") -> list[Rule]:
    heads, net = generator.backbone.heads, f"{prefix}_denoise_fn."
    blocks = net + "blocks.{}."
    pairs = (("attention_norm", "ln1"), ("mlp_norm", "ln2"), ("out", "attn.proj"), ("fc1", "mlp.0"), ("fc2", "mlp.2"))
    return [
        ("conditioning/embedding", f"{net}cls_embedding.weight", PLAIN),
        ("position", f"{net}pos_emb", Layout(lambda x: x[None], lambda x: x[0])),
        ("token/kernel", f"{net}tok_emb.weight", PLAIN),
        (r"backbone/blocks/gamma(\d)", net + r"blocks.{}.gamma_\1", PLAIN),
        ("backbone/blocks/qkv/kernel", f"{blocks}attn.qkv.weight", qkv_layout(heads)),
        ("backbone/blocks/qkv/bias", f"{blocks}attn.qkv.bias", qkv_bias(heads)),
        *layers("backbone/blocks/", blocks, pairs),
        *layers("", net, (
            ("backbone/norm", "ln_f"), ("flip", "head"), ("time1", "time_step_embedding.l0"),
            ("time2", "time_step_embedding.linear"),
        )),
    ]  # fmt: skip


def kinds(shapes: Shapes, where: str) -> list[str]:
    """What the numbered layers of a network are: "conv", "norm", "res", "attn", or "scale" for one that changes the size."""
    found = []
    while (start := f"{where}.{len(found)}.") + "weight" in shapes or any(
        f"{start}{rest}.weight" in shapes for rest in ("conv", "conv1", "q")
    ):
        names = {"scale": "conv.weight", "res": "conv1.weight", "attn": "q.weight"}
        own = next((kind for kind, rest in names.items() if start + rest in shapes), "")
        found.append(own or ("conv" if len(shapes[start + "weight"]) == 4 else "norm"))
    return found


def tokenizer(shapes: Shapes, size: int, groups: int = 32) -> BinaryAutoencoder:
    """The autoencoder whose state dict has these keys and shapes."""
    encoder, decoder = kinds(shapes, "ae.encoder.blocks"), kinds(shapes, "ae.generator.blocks")
    features, channels = shapes["ae.encoder.blocks.0.weight"][:2]
    bits, latent = shapes["ae.quantize.embed.weight"]
    levels = " ".join(encoder[1:]).split("scale")
    *finer, last = [level.split() for level in levels]
    each = [*finer, last[:-5]]  # without the middle, norm and convolution
    first = [1 + sum(len(level) + 1 for level in finer[:i]) for i in range(len(each))]
    return BinaryAutoencoder(
        size=(size, size), features=features, latent=latent, bits=bits, groups=groups, channels=channels,
        mult=tuple(multiple(shapes, f"ae.encoder.blocks.{i}.conv1.weight", features) for i in first),
        res_blocks=each[0].count("res"), decoder_blocks=" ".join(decoder).split("scale")[-1].split().count("res"),
        attention=tuple(i for i, level in enumerate(each) if "attn" in level), norm_first=decoder[0] == "norm",
        unit=bits in (16, 20, 24),  # ELM's released files have these, BLD's 64 and 128; nothing else in a file tells them apart
    )  # fmt: skip


def generator(shapes: Shapes, heads: int = 0) -> BinaryDiffusion:
    """The denoiser whose state dict has these keys and shapes.

    Raises:
      ValueError: its tokens make no square.
    """
    (bits, width), n = shapes["_denoise_fn.tok_emb.weight"], shapes["_denoise_fn.pos_emb"][1]
    side = round(n**0.5)
    if side**2 != n:
        raise ValueError(f"the file has places for {n} tokens, which make no square")
    layers, hidden = count(shapes, r"_denoise_fn\.blocks\.(\d+)\."), shapes["_denoise_fn.blocks.0.mlp.0.weight"][0]
    times = shapes["scheduler.beta"][0] - 1 if "scheduler.beta" in shapes else 64
    classes = shapes.get("_denoise_fn.cls_embedding.weight", (0,))[0]
    conditioning = Shown(width) if classes else Nothing(width)
    module = BinaryDiffusion(Scaled(layers, width, heads or HEADS, hidden=hidden), conditioning, times)
    return module.complete(TokenSpec(grid(side, side), codes=(2,) * bits), Info(classes=classes))


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files of others, judged by a few keys; `build` may yet fail."""
    if {"ae.quantize.embed.weight", "ae.encoder.blocks.0.weight"} <= shapes.keys():
        return "tokenizer"
    return "generator" if {"_denoise_fn.tok_emb.weight", "_denoise_fn.pos_emb"} <= shapes.keys() else ""


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> nn.Module:  # fmt: skip
    """The network of a file; the arguments are those of `llamagen.build`."""
    return tokenizer(shapes, size or 256, groups or 32) if kind == "tokenizer" else generator(shapes, heads)


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Entries that nothing is computed with: a branch of the decoder's, projections of blocks that keep their channels,
    tables."""
    unused = re.compile(
        r"ae\.generator\.logsigma\..*|ae\.\w+\.blocks\.\d+\.conv_out\..*|scheduler\..*|embedding_weight"
    )
    found = {key: tuple(shape) for key, shape in shapes.items() if unused.fullmatch(key)}
    return {key: shape for key, shape in found.items() if not _projects(shapes, key)}


def _projects(shapes, key):
    """Whether a block's projection changes the channels, and so is used."""
    return ".conv_out." in key and len(set(shapes[re.sub(r"conv_out\.\w+$", "conv_out.weight", key)][:2])) > 1


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, BinaryAutoencoder):
        (height, width), (rows, columns) = module.size, module.grid
        return f"{height}x{width} pixels to {rows}x{columns} tokens of {module.bits} bits", Info(), {}
    net, classes = module.backbone, getattr(module.conditioning, "classes", 0)
    words = f"{net.layers} layers of width {net.width}, {module.spec.n} tokens of {len(module.spec.codes)} bits"
    return f"{words}, {classes or 'no'} classes", Info(classes=classes), {"order": codec.encode(Denoised(min(module.times, module.spec.n)))}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: Binary Latent Diffusion has no such network.
    """
    if type(module) is BinaryAutoencoder:
        return tokenizer_rules(module)
    if isinstance(module, BinaryDiffusion) and isinstance(module.conditioning, Shown | Nothing):
        return generator_rules(module)
    raise ValueError(f"Binary Latent Diffusion has no {type(module).__name__}")
