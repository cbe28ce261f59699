"""LightGen's released generator: MAR's names, and those of the text."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import mar
from ar_jax.convert.names import Layout, Rule, count, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.lightgen import Aligned, Crossed, LightGen
from ar_jax.heads.diffusion import Diffusion
from ar_jax.nets.vit import ViT
from ar_jax.orders import Shuffled
from ar_jax.tokens import TokenSpec, grid

FIXED = set()  # all parameters are trained
AVERAGED = ()  # the published pipeline loads what was trained
ROWS = 128  # of the text; not in the file
PIXELS = 16  # a token's side

Shapes = Mapping[str, tuple[int, ...]]


def rules(module: nn.Module) -> list[Rule]:
    """Names of the network's parameters in the released file.

    Raises:
      ValueError: LightGen has no such network.
    """
    if type(module) is not LightGen or not isinstance(module.head, Diffusion):
        raise ValueError(f"LightGen has no {type(module).__name__}")
    heads, cross, text = module.cross.heads, "cross_attn_blocks.{}.", "text_emb.text_aligner"
    return [
        ("conditioning/none", "fake_latent", Layout(lambda x: x[None], lambda x: x[0])),
        ("head_positions", "last_pos_embed_learned", Layout(lambda x: x[None], lambda x: x[0])),
        ("cross/blocks/memory/kernel", f"{cross}attn.kv.weight", qkv_layout(heads, 2)),
        ("cross/blocks/memory/bias", f"{cross}attn.kv.bias", mar.qkv_bias(heads, 2)),
        *mar.layers("cross/blocks/", cross, (
            ("query_norm", "normq"), ("memory_norm", "normkv"), ("mlp_norm", "norm2"), ("query", "attn.query_linear"),
            ("out", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"),
        )),
        *mar.layer_rules("conditioning/net/blocks", text, module.conditioning.net.heads),
        *mar.layers("", "", (
            ("cross/norm", "cross_norm"), ("cross_input", "last_embed"), ("conditioning/net/norm", f"{text}_norm"),
            ("conditioning/fc1", "text_emb.text_proj.linear_1"), ("conditioning/fc2", "text_emb.text_proj.linear_2"),
        )),
        *mar.generator_rules(module),
    ]  # fmt: skip


def recognise(shapes: Shapes) -> str:
    """ "generator" or "" for files of others, judged by a few keys; `build` may yet fail."""
    return "generator" if {"last_pos_embed_learned", "encoder_pos_embed_learned"} <= shapes.keys() else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file for images of a size, 0 is 256; the other arguments are those of `llamagen.build`."""
    n = shapes["last_pos_embed_learned"][1]
    encoder, decoder, buffer, side = mar.networks(shapes, n, heads)
    if buffer:
        raise ValueError(f"the encoder has places for {buffer} more rows than the {n} tokens")

    def net(name, found):
        hidden, width = shapes[f"{name}.0.mlp.fc1.weight"]
        layers = count(shapes, rf"{name.replace('.', '[.]')}\.(\d+)\.")
        return found(layers, width, heads or mar.HEADS[width], hidden=hidden, dropout=0.1, attention_dropout=0.1)

    conditioning = Aligned(net("text_emb.text_aligner", ViT), ROWS, shapes["text_emb.text_proj.linear_1.weight"][1])
    head = Diffusion(shapes["diffloss.net.input_proj.weight"][0], count(shapes, r"diffloss\.net\.res_blocks\.(\d+)\."))
    module = LightGen(encoder, decoder, conditioning, head, cross=net("cross_attn_blocks", Crossed), places=side)
    rows, rest = divmod(size or PIXELS * side, PIXELS)
    if rest or not rows:
        raise ValueError(f"--size is {size}; LightGen needs a multiple of {PIXELS} pixels")
    return module.on(TokenSpec(grid(rows, rows), channels=shapes["z_proj.weight"][1]))


def describe(module: LightGen) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    encoder, text, head = module.encoder, module.conditioning, module.head
    _, rows, columns = module.spec.coords.max(0) + 1
    words = (
        f"{encoder.layers}+{module.decoder.layers}+{module.cross.layers} layers of width {encoder.width} with {encoder.heads} "
        f"heads, diffusion head of {head.depth} layers of width {head.width}, {rows}x{columns} tokens of {head.channels} "
        f"numbers, {text.rows} rows of text of {text.features} numbers"
    )
    info = Info(captions=True, text_rows=text.rows, text_width=text.features)
    sampling = codec.encode(Sampling(Interval(4.0)))
    return words, info, {"order": codec.encode(Shuffled(min(64, module.spec.n))), "sampling": sampling}
