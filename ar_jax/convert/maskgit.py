"""Released checkpoints of TiTok's generators, which are MaskGITs: BERT's network (L-32, B-64) and the U-ViT (S-128)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.mar import layers
from ar_jax.convert.names import PLAIN, Layout, Rule, count, qkv_layout
from ar_jax.convert.rar import TABLE
from ar_jax.data import Info
from ar_jax.decode.guidance import Rising
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Fading
from ar_jax.files import codec
from ar_jax.generators.maskgit import MaskGIT
from ar_jax.generators.rar import PowerCosine
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.bert import Bert, UViT
from ar_jax.nets.conditioning import Label
from ar_jax.orders import Confident
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = 16  # of all released models
FIXED = set()  # all parameters are trained
BEFORE = "model."
SMOOTHING = 0.1  # of which a code's own part is its too: see `smoothing`
PUBLISHED = {  # by the number of tokens: steps, guidance, temperature
    32: (8, Rising(5.5, "lagging"), Fading(9.5, eased=True)),
    64: (8, Rising(4.0, "lagging"), Fading(11.0, eased=True)),
    128: (64, PowerCosine(6.9, 3.0), Fading(2.8, eased=True)),
}
BERT = (
    ("query", "attention.self.query"), ("key", "attention.self.key"), ("value", "attention.self.value"),
    ("out", "attention.output.dense"), ("attention_norm", "attention.output.LayerNorm"), ("fc1", "intermediate.dense"),
    ("fc2", "output.dense"), ("mlp_norm", "output.LayerNorm"),
)  # fmt: skip
BLOCK = (
    ("attention_norm", "norm1"), ("out", "attn.proj"), ("mlp_norm", "norm2"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"),
    ("join", "skip_linear"),
)  # fmt: skip


def smoothing(codes: int) -> float:
    """Label smoothing by a tenth, of which torch gives the right code its share as well."""
    return SMOOTHING * (codes - 1) / codes


def recognise(shapes: Shapes) -> str:
    """ "generator" or "" for files that are not TiTok's, judged by a few keys; `build` may yet fail."""
    bert = {"model.embeddings.word_embeddings.weight", "model.lm_head.weight"} <= shapes.keys()
    uvit = {"embeddings.weight", "pos_embed", "mid_block.attn.qkv.weight"} <= shapes.keys()
    return "generator" if bert or uvit else ""


def module(backbone: nn.Module, codes: int) -> MaskGIT:
    """A generator as TiTok trains and draws with it."""
    head = Categorical(bias=True, std=0.02, smoothing=smoothing(codes), sure="logit", dtype=backbone.dtype)
    return MaskGIT(
        backbone, Label(backbone.width), head, most=1.0, curve="arccos", noise="temperature", known_weight=0.1
    )  # fmt: skip


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> nn.Module:  # fmt: skip
    """The network of a file; the arguments are those of `llamagen.build`. The file says how many tokens it has.

    Raises:
      ValueError: the tables have too few rows.
      KeyError: a key is missing.
    """
    if "mid_block.attn.qkv.weight" in shapes:
        table, rows, head = "embeddings.weight", shapes["pos_embed"][1], "lm_head.weight"
        layers = count(shapes, r"in_blocks\.(\d+)\.") + count(shapes, r"out_blocks\.(\d+)\.")
        net, hidden = UViT, shapes["mid_block.mlp.fc1.weight"][0]
    else:
        table, head = "model.embeddings.word_embeddings.weight", "model.lm_head.weight"
        rows, layers = (
            shapes["model.embeddings.position_embeddings.weight"][0],
            count(shapes, r"model\.encoder\.layer\.(\d+)\."),
        )
        net, hidden = Bert, shapes["model.encoder.layer.0.intermediate.dense.weight"][0]
    codes, width = shapes[head]
    classes = shapes[table][0] - codes - 2
    if classes < 1 or rows < 2:
        raise ValueError(
            f"{table} has {shapes[table][0]} rows and the positions {rows}: too few for {codes} codes, a mask, classes and none"
        )
    dropped = {"dropout": 0.1, "attention_dropout": 0.1} if net is Bert else {}
    backbone = net(layers, width, heads or HEADS, hidden=hidden, rows=rows, **dropped)
    return module(backbone, codes).complete(TokenSpec(grid(1, rows - 1), codes=(codes,)), Info(classes=classes))


def describe(module: MaskGIT) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    net, n, info = module.backbone, module.spec.n, Info(classes=module.conditioning.classes)
    kind = "BERT" if isinstance(net, Bert) else "U-ViT"
    words = (
        f"{kind} of {net.layers} layers of width {net.width} with {net.heads} heads, {n} tokens with {module.spec.codes[0]} codes, "
        f"{info.classes} classes"
    )
    steps, guidance, temperature = PUBLISHED.get(n, (8, Rising(4.0, "lagging"), Fading(9.5, eased=True)))
    settings = Confident(steps, "arccos"), Sampling(guidance, temperature)
    return words, info, dict(zip(("order", "sampling"), map(codec.encode, settings)))


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: TiTok has no such generator.
    """
    if type(module) is not MaskGIT or type(module.backbone) not in (Bert, UViT) or type(module.head) is not Categorical:
        raise ValueError(f"TiTok has no generator {type(module).__name__} of these parts")
    codes, net = module.spec.codes[0], module.backbone
    ids = PLAIN._replace(part=(0, (codes + 1, module.conditioning.classes + 1)))
    bert = type(net) is Bert
    table = "model.embeddings.word_embeddings.weight" if bert else "embeddings.weight"
    both = [("embedding", table, ids), ("conditioning/embedding", table, ids._replace(part=(1, ids.part[1])))]
    if bert:
        return [
            *both,
            ("backbone/positions", "model.embeddings.position_embeddings.weight", PLAIN),
            ("backbone/kinds", "model.embeddings.token_type_embeddings.weight", PLAIN),
            *layers("", "model.", (("backbone/norm", "embeddings.LayerNorm"), ("head/readout", "lm_head"))),
            *layers("backbone/blocks/", "model.encoder.layer.{}.", BERT),
        ]
    joint: Layout = qkv_layout(net.heads)
    found = [
        *both,
        ("backbone/positions", "pos_embed", TABLE),
        *layers("", "", (("backbone/norm", "norm"), ("head/readout", "lm_head"))),
    ]
    for ours, theirs in (("down", "in_blocks.{}."), ("middle", "mid_block."), ("up", "out_blocks.{}.")):
        found += [
            (f"backbone/{ours}/qkv/kernel", f"{theirs}attn.qkv.weight", joint),
            *layers(f"backbone/{ours}/", theirs, BLOCK),
        ]
    return found
