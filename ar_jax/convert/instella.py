"""Instella-T2I's released tokenizer and generators."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.mar import layers
from ar_jax.convert.names import CONV, PLAIN, Layout, Rule, count
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.binary_diffusion import Denoised
from ar_jax.generators.bit_flips import BitFlips
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Bits
from ar_jax.heads.bitwise import Bitwise
from ar_jax.nets.head_rms import Doubling, Halving
from ar_jax.nets.reader import LayeredCaption, Reader, TimedReader
from ar_jax.orders import raster
from ar_jax.tokenizers.binary_line import BinaryLine
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

SPLIT = 8  # layers before the map changes its size; not in the file
SCALE = 1024  # of the places; not in the file
CAPTION = 128  # tokens of a prompt at most
ENCODER = "amd-olmo-1b"  # of which every layer's features are read
SAMPLING = Sampling(Interval(8.5))
STEPS = 20  # of the diffusion
FIXED = set()  # all parameters are trained

ROW = Layout(lambda x: x[None], lambda x: x[0])
ATTENTION = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj"))
HEAD_NORMS = (("query_norm", "norm_q"), ("key_norm", "norm_k"))


def tokenizer_rules(tokenizer: BinaryLine) -> list[Rule]:
    cell, channels = tokenizer.cell, tokenizer.channels
    patches = Layout(
        lambda x: x.T.reshape(-1, channels, cell, cell), lambda x: x.reshape(len(x), channels * cell * cell).T
    )
    rules = [
        ("queries", "encoder.latent_tokens", ROW),
        ("mask", "decoder.mask_tokens", ROW),
        ("embedding", "quantizer.embed", PLAIN),
        ("patches/kernel", "encoder.patch_embedder.weight", patches),
        ("encoder/conv/kernel", "encoder.down_layers.0.conv.weight", CONV),
        ("decoder/conv/kernel", "decoder.up_layers.0.conv.weight", CONV),
        *layers("", "", (
            ("patches", "encoder.patch_embedder"), ("told_norm", "encoder.norm_out"), ("told", "encoder.proj_out"),
            ("quant", "quantizer.proj.0"), ("code_norm", "decoder.input_layer.0"), ("from_code", "decoder.input_layer.1"),
            ("image_norm", "decoder.norm_out"), ("to_pixels", "to_pixel"), ("encoder/conv", "encoder.down_layers.0.conv"),
            ("decoder/conv", "decoder.up_layers.0.conv"),
        )),
    ]  # fmt: skip
    for side, net in (("encoder", tokenizer.encoder), ("decoder", tokenizer.decoder)):
        for part, first in (("before", 0), ("after", net.before)):
            ours, theirs = f"{side}/blocks_{part}/", f"{side}.transformer_blocks.{{}}."
            found = [
                *layers(f"{ours}attention/", f"{theirs}attn.", (*ATTENTION, *HEAD_NORMS)),
                *layers(ours, theirs, (
                    ("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"),
                    ("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"), ("down", "mlp.down_proj"),
                )),
            ]  # fmt: skip
            rules += [(pattern, key, layout._replace(first=first)) for pattern, key, layout in found]
    return rules


def tokenizer(shapes: Shapes, size: int = 0) -> BinaryLine:
    """The tokenizer whose state dict has these keys and shapes; it does not say where maps change their size."""

    def net(kind, side):
        found = count(shapes, rf"{side}\.transformer_blocks\.(\d+)\.")
        width, features = (
            shapes[f"{side}.transformer_blocks.0.{key}.weight"][0] for key in ("input_layernorm", "attn.norm_q")
        )
        hidden = shapes[f"{side}.transformer_blocks.0.mlp.gate_proj.weight"][0]
        return kind(
            found, width, width // features, before=min(SPLIT, found - 1), hidden=0 if hidden == 4 * width else hidden
        )

    _, channels, cell, _ = shapes["encoder.patch_embedder.weight"]
    return BinaryLine(
        size=(size or SCALE,) * 2, cell=cell, slots=shapes["encoder.latent_tokens"][1], bits=shapes["quantizer.embed"][0],
        encoder=net(Halving, "encoder"), decoder=net(Doubling, "decoder"), scale=SCALE, channels=channels,
    )  # fmt: skip


def generator_rules(generator: Causal | BitFlips) -> list[Rule]:
    blocks = "transformer_blocks.{}."
    perceptron = "mlp" if isinstance(generator, Causal) else "ff"
    return [
        ("conditioning/start_row", "split_token", ROW),
        ("backbone/blocks/positions", f"{blocks}pos_emb", ROW),
        *layers("backbone/blocks/attention/", f"{blocks}attn.", (*ATTENTION, *HEAD_NORMS)),
        *layers("backbone/blocks/", blocks, (
            ("told", "proj_cond"), ("fc1", f"{perceptron}.net.0.proj"), ("fc2", f"{perceptron}.net.2"),
            ("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"), ("modulation", "norm1.linear"),
        )),
        *layers("", "", (
            ("inputs/projection", "x_embedder"), ("token", "x_embedder"), ("head/readout", "proj_out"), ("flip", "proj_out"),
            ("backbone/norm", "norm_out"), ("backbone/modulation", "norm_out.linear"),
            ("backbone/time1", "time_embed.linear_1"), ("backbone/time2", "time_embed.linear_2"),
        )),
    ]  # fmt: skip


def generator(shapes: Shapes) -> Causal | BitFlips:
    """The generator whose state dict has these keys and shapes."""
    width, bits = shapes["x_embedder.weight"]
    found, features = count(shapes, r"transformer_blocks\.(\d+)\."), shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    causal = "split_token" in shapes
    hidden = shapes[f"transformer_blocks.0.{'mlp' if causal else 'ff'}.net.2.weight"][1]
    net = {"hidden": 0 if hidden == 4 * width else hidden}
    spec = TokenSpec(
        grid(1, shapes["transformer_blocks.0.pos_emb"][1] - causal), codes=(2,) * bits, placed=False
    )  # fmt: skip
    conditioning = LayeredCaption(width, parts=found, start=causal)
    if causal:
        module = Causal(Reader(found, width, width // features, **net), conditioning, Bitwise(single=True), Bits())
    else:
        module = BitFlips(TimedReader(found, width, width // features, **net), conditioning)
    told = found * shapes["transformer_blocks.0.proj_cond.weight"][1]
    return module.complete(spec, Info(captions=True, text=ENCODER, text_rows=CAPTION, text_width=told))


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files of others, judged by a few keys; `build` may yet fail."""
    if {"quantizer.embed", "encoder.latent_tokens"} <= shapes.keys():
        return "tokenizer"
    return "generator" if {"x_embedder.weight", "transformer_blocks.0.proj_cond.weight"} <= shapes.keys() else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`. Images are of 1024 pixels unless a size is given."""
    return tokenizer(shapes, size) if kind == "tokenizer" else generator(shapes)


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The embedding of a time that the autoregressive generator does not have."""
    if not isinstance(module, Causal):
        return {}
    width = module.backbone.width
    sizes = {"linear_1.weight": (width, 1), "linear_2.weight": (width, width)}
    sizes |= {"linear_1.bias": (width,), "linear_2.bias": (width,)}
    return {f"time_embed.{name}": shape for name, shape in sizes.items()}


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, BinaryLine):
        words = f"{'x'.join(map(str, module.size))} pixels to {module.slots} tokens of {module.bits} bits on a line"
        return words, Info(), {}
    net, condition = module.backbone, module.conditioning
    info = Info(captions=True, text=ENCODER, text_rows=condition.rows, text_width=condition.features)
    words = (
        f"{net.layers} layers of width {net.width} with {net.heads} heads, {module.spec.n} tokens of {len(module.spec.codes)} "
        f"bits, {info.text_rows} caption rows of {info.text_width}"
    )
    order = raster if isinstance(module, Causal) else Denoised(min(STEPS, module.spec.n))
    return words, info, {"order": codec.encode(order), "sampling": codec.encode(SAMPLING)}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: Instella-T2I has no such network.
    """
    if isinstance(module, BinaryLine):
        return tokenizer_rules(module)
    if isinstance(getattr(module, "backbone", None), Reader) and isinstance(module.conditioning, LayeredCaption):
        return generator_rules(module)
    raise ValueError(f"Instella-T2I has no {type(module).__name__}")
