"""TokenBridge's released checkpoints: masked transformers L and H over codes of KL-16's numbers, drawn number by number."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ar_jax.convert import mar
from ar_jax.convert.mar import layers, qkv_bias
from ar_jax.convert.names import LINEAR, PLAIN, Layout, Rule, count, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Linear
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.files import codec
from ar_jax.generators.masked import Masked
from ar_jax.heads.by_dimension import Dimensions
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.orders import Shuffled
from ar_jax.tokenizers.quantize_normal import normal_bins
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

FIXED = set()  # all parameters are trained
AVERAGED = ("generator",)  # whose figures are of the average
CHANNELS = (
    8,
    1,
    10,
    9,
    6,
    12,
    4,
    0,
    3,
    11,
    7,
    14,
    2,
    15,
    13,
    5,
)  # of KL-16 in the order they are drawn in; not in the file
HEADS = 8  # of the transformer over the numbers of a token
SAMPLING = {
    1024: (3.1, 0.96),
    1280: (3.45, 0.91),
}  # published guidance at the end of its rise and temperature, by width


def generator_rules(generator: Masked) -> list[Rule]:
    heads, row = generator.head.net.heads, Layout(lambda x: x[None], lambda x: x[0])
    pairs = (
        ("attention_norm", "norm1"), ("mlp_norm", "norm2"), ("q_norm", "attn.q_norm"), ("k_norm", "attn.k_norm"),
        ("out", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"), ("modulation", "adaLN_modulation.1"),
    )  # fmt: skip
    return [
        ("head_positions", "output_pos_embed", row),
        ("head/net/position", "channel_embed", row),
        ("head/net/place", "timesteps_embeddings", row),
        (r"head/tables_(\d+)/embedding", r"token_embeddings.\1.weight", PLAIN),
        (r"head/readouts_(\d+)/readout/kernel", r"channel_heads.\1.weight", LINEAR),
        (r"head/readouts_(\d+)/readout/bias", r"channel_heads.\1.bias", PLAIN),
        ("head/net/blocks/qkv/kernel", "channel_blocks.{}.attn.qkv.weight", qkv_layout(heads)),
        ("head/net/blocks/qkv/bias", "channel_blocks.{}.attn.qkv.bias", qkv_bias(heads)),
        *layers("head/net/blocks/", "channel_blocks.{}.", pairs),
        *layers("head/", "", (
            ("condition", "condition_proj"), ("net/norm", "channel_norm"), ("net/final", "channel_final.adaLN_modulation.1"),
        )),
        *mar.generator_rules(generator),
    ]  # fmt: skip


def generator(shapes: Shapes, heads: int = 0) -> Masked:
    """The transformer whose state dict has these keys and shapes.

    Args:
      heads: of all its networks; 0 takes the published numbers.
    """
    n, k, width = shapes["output_pos_embed"][1], *shapes["channel_embed"][1:]
    levels = shapes["channel_heads.0.weight"][0]
    depth = count(shapes, r"channel_blocks\.(\d+)\.")
    small = Dimensions(depth, width, heads or HEADS, dropout=0.1, plain_start=True)
    order = CHANNELS if k == len(CHANNELS) else ()
    head = Factorised(small, Categorical(bias=True, std=0.043), order, projected=True, guided="rows", std=1.0)
    encoder, decoder, buffer, side = mar.networks(shapes, n, heads)
    classes, wide = shapes["class_emb.weight"]
    return Masked(encoder, decoder, Label(wide, apart=True), head, buffer, vectors=k).complete(
        TokenSpec(grid(side, side), codes=(levels,) * k), Info(classes=classes)
    )


def recognise(shapes: Shapes) -> str:
    """ "generator", or "" for files that are not TokenBridge's, judged by a few keys; `build` may yet fail."""
    return "generator" if {"channel_embed", "condition_proj.weight", "output_pos_embed"} <= shapes.keys() else ""


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> nn.Module:  # fmt: skip
    """The network of a file; the arguments are those of `llamagen.build`. A file says how many tokens it has."""
    return generator(shapes, heads)


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The quantiser's tables, and who sees whom in the head."""
    return {key: value.shape for key, value in fills(module).items()}


def fills(module: nn.Module) -> dict[str, np.ndarray]:
    """Contents of the buffers; the released tables are computed in float32 and differ by up to 1e-5."""
    codes = module.head.codes
    edges, values = normal_bins(codes[0])
    return {
        "channel_mask": np.triu(np.full((len(codes), len(codes)), -np.inf, np.float32), 1),
        "boundaries": edges,
        "reconstruction_values": values,
    }


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    encoder, decoder, head, classes = module.encoder, module.decoder, module.head, module.conditioning.classes
    _, rows, columns = module.spec.coords.max(0) + 1
    words = (
        f"{encoder.layers}+{decoder.layers} layers of width {encoder.width} with {encoder.heads} heads, head of "
        f"{head.net.layers} layers of width {head.net.width}, {rows}x{columns} tokens of {len(head.codes)} numbers of "
        f"{head.codes[0]} levels, {classes} classes"
    )
    guidance, temperature = SAMPLING.get(encoder.width, (1.0, 1.0))
    sampling = codec.encode(Sampling(Linear(guidance), Constant(temperature)))
    return (
        words,
        Info(classes=classes),
        {"order": codec.encode(Shuffled(min(256, module.spec.n))), "sampling": sampling},
    )


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: TokenBridge has no such network.
    """
    found = type(module) is Masked and type(getattr(module.head, "net", None)) is Dimensions
    if found and getattr(module.conditioning, "apart", False):
        return generator_rules(module)
    raise ValueError(f"TokenBridge has no {type(module).__name__}")
