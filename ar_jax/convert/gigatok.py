"""GigaTok's released checkpoints: tokenizers S-S to XL-XXL, and the class-conditional transformers on their codes."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.mar import layers
from ar_jax.convert.names import CONV, CONV1, LINEAR, PLAIN, Layout, Rule, count, multiple
from ar_jax.data import Info
from ar_jax.decode.guidance import Staged
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Previous
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.queries import QFormer
from ar_jax.nets.transformer import Positioned
from ar_jax.orders import raster
from ar_jax.tokenizers.gigatok import GigaTok
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = {256: 4, 512: 8, 768: 12, 1024: 16, 1280: 20, 1536: 24}  # of all networks by width; not in the file
TAP = 3  # the layer that the teacher looked at; not in the file
FIXED = set()  # all parameters are trained

PLACES = Layout(lambda x: x[:, None], lambda x: x[:, 0])
SIDES = {"to_line": ("s2to1encoder", "encoder_net"), "to_map": ("s1to2decoder", "decoder_net")}


def tokenizer_rules(tokenizer: GigaTok) -> list[Rule]:
    last = len(tokenizer.mult) - 1

    def middle(match, key):  # theirs has no place for attention
        return f"{match[1]}.mid.{int(match[2]) // 2}.{match[3]}.{key}"

    def style(match, key):
        return f"decoder.adaptive.{last - int(match[2])}.{ {'spread': 'gamma', 'mean': 'beta'}[match[1]] }.{key}"

    rules = [
        ("to_line/last/kernel", "s2to1encoder.conv_out.weight", CONV1),
        ("to_map/last/kernel", "s1to2decoder.conv_out.weight", CONV),
        *layers("to_line/", "s2to1encoder.", (("embed", "encoder_embed"),)),
        *layers("to_map/", "s1to2decoder.", (("embed", "decoder_embed"),)),
        *layers("to_map/told/", "s1to2decoder.distill_mlp.", (("fc1", "0"), ("fc2", "2"), ("fc3", "4"))),
    ]
    for leaf, key, kind, dense in (
        ("kernel", "weight", CONV, LINEAR), ("scale", "weight", PLAIN, PLAIN), ("bias", "bias", PLAIN, PLAIN),
    ):  # fmt: skip
        rules += [
            (rf"(encoder|decoder)/mid_(\d)/(\w+)/{leaf}", lambda m, key=key: middle(m, key), kind),
            (rf"decoder/(spread|mean)_(\d+)/{leaf}", lambda m, key=key: style(m, key), dense),
            (rf"decoder/up_(\d+)/{leaf}", lambda m, key=key: f"decoder.conv_blocks.{last - int(m[1])}.upsample.conv1.{key}", kind),
        ]  # fmt: skip
    for ours, (theirs, net) in SIDES.items():
        block, layer = f"{net}/blocks/", f"{theirs}.transformer.{{}}."
        rules += [
            (f"{ours}/cells", f"{theirs}.positional_embedding", PLACES),
            (f"{ours}/slots", f"{theirs}.latent_token_positional_embedding", PLACES),
            (f"{ours}/last/bias", f"{theirs}.conv_out.bias", PLAIN),
            *layers(f"{ours}/", f"{theirs}.", (("before", "ln_pre"), ("first", "global_proj"))),
            *layers(f"{net}/", f"{theirs}.", (("norm", "ln_post"),)),
            *layers(
                block, layer,
                (
                    ("own_norm", "norm1"), ("cross_norm", "norm2"), ("mlp_norm", "norm3"), ("fc1", "linear1"),
                    ("fc2", "linear2"), ("own/out", "self_attn.out_proj"), ("cross/out", "multihead_attn.out_proj"),
                ),
            ),
        ]  # fmt: skip
        for our, their in (("own", "self_attn"), ("cross", "multihead_attn")):
            for i, name in enumerate(("query", "key", "value")):
                rules += [
                    (f"{block}{our}/{name}/kernel", f"{layer}{their}.in_proj_weight", LINEAR._replace(part=(i, 3))),
                    (f"{block}{our}/{name}/bias", f"{layer}{their}.in_proj_bias", PLAIN._replace(part=(i, 3))),
                ]
    return rules + llamagen.vqgan_rules(tokenizer)


def tokenizer(shapes: Shapes, size: int, heads: int = 0, groups: int = 0) -> GigaTok:
    """The tokenizer whose state dict has these keys and shapes.

    Args:
      shapes: by key.
      size: of the images in pixels; 0 takes the square that its places say.
      heads: of both networks on the line; 0 takes the published number for the width of each.
      groups: of the group norms; 0 takes the published number.
    """
    features = shapes["encoder.conv_in.weight"][0]

    def mult(side):
        levels = max(count(shapes, rf"{side}\.conv_blocks\.(\d+)\."), 1)
        return tuple(multiple(shapes, f"{side}.conv_blocks.{i}.res.0.conv1.weight", features) for i in range(levels))

    def net(side, tap=0):
        width = shapes[f"{side}.ln_post.weight"][0]
        if not (known := heads or HEADS.get(width, 0)):
            raise ValueError(
                f"the file does not hold the number of heads and width {width} is not published; give --heads"
            )
        depth, hidden = (
            count(shapes, side + r"\.transformer\.(\d+)\."),
            shapes[f"{side}.transformer.0.linear1.weight"][0],
        )
        return QFormer(depth, width, known, hidden=hidden, tap=min(tap, depth))

    encoder, decoder = mult("encoder"), mult("decoder")[::-1]
    target = shapes["s1to2decoder.distill_mlp.4.weight"][0] if "s1to2decoder.distill_mlp.4.weight" in shapes else 0
    side = round(shapes["s1to2decoder.positional_embedding"][0] ** 0.5) * 2 ** (len(encoder) - 1)
    codes, code_features = shapes["quantize.embedding.weight"]
    return GigaTok(
        size=(size or side,) * 2, tokens=shapes["s1to2decoder.latent_token_positional_embedding"][0], features=features,
        mult=encoder, decoder_mult=() if decoder == encoder else decoder,
        res_blocks=sum(bool(re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", key)) for key in shapes),
        latent=shapes["encoder.conv_out.weight"][0], encoder_net=net("s2to1encoder"),
        decoder_net=net("s1to2decoder", TAP if target else 0), target=target, codes=codes, code_features=code_features,
        groups=groups or 32, rotation=True, channels=shapes["encoder.conv_in.weight"][1],
    )  # fmt: skip


def generator_rules(generator: Causal) -> list[Rule]:
    return [("backbone/positions", "positional_embedding", PLAIN), *llamagen.gpt_rules(generator)]


def generator(shapes: Shapes, heads: int = 0) -> Causal:
    """The transformer whose state dict has these keys and shapes; its table of positions says how many tokens there are.

    Args:
      heads: 0 takes the published number for the width.
    """
    rows, width = shapes["positional_embedding"]
    if rows < 2:
        raise ValueError(f"positional_embedding has {rows} rows, which leaves none for a token")
    codes, _ = shapes["tok_embeddings.weight"]
    if not (heads := heads or HEADS.get(width, 0)):
        raise ValueError(f"the file does not hold the number of heads and width {width} is not published; give --heads")
    backbone = Positioned(
        count(shapes, r"layers\.(\d+)\."), width, heads, hidden=shapes["layers.0.feed_forward.w1.weight"][0],
        rows=rows, dropout=0.1,
    )  # fmt: skip
    info = Info(classes=shapes["cls_embedding.embedding_table.weight"][0] - 1)
    spec = TokenSpec(grid(1, rows - 1), codes=(codes,))
    return Causal(backbone, Label(width), dropout=0.1).complete(spec, info)


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files that are not GigaTok's, judged by a few keys; `build` may yet fail."""
    if any(key.startswith(("s2to1encoder.", "s1to2decoder.")) for key in shapes):
        return "tokenizer"
    return "generator" if {"positional_embedding", "tok_embeddings.weight"} <= shapes.keys() else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file.

    Args:
      kind: what `recognise` said.
      shapes: by key.
      size: of the images in pixels; 0 takes what the file says. A generator's file says how many tokens it has.
      heads, groups: 0 takes the published number.
      scales: unused.
    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    return tokenizer(shapes, size, heads, groups) if kind == "tokenizer" else generator(shapes, heads)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, GigaTok):
        height, width = module.size
        return f"{height}x{width} pixels to {module.tokens} codes out of {module.codes} on a line", Info(), {}
    net, info = module.backbone, Info(classes=module.conditioning.classes)
    words = (
        f"{net.layers} layers of width {net.width} with {net.heads} heads, {module.spec.n} tokens with "
        f"{module.spec.codes[0]} codes, {info.classes} classes"
    )
    return words, info, {"order": codec.encode(raster), "sampling": codec.encode(Sampling(Staged(1.75)))}


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A log of recent codes, no part of the function."""
    return {"quantize.codebook_used": (65536,)} if isinstance(module, GigaTok) else {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: GigaTok has no such network.
    """
    if type(module) is GigaTok:
        return tokenizer_rules(module)
    parts = (Positioned, Label, Categorical, Previous)
    if type(module) is Causal and parts == tuple(
        type(part) for part in (module.backbone, module.conditioning, module.head, module.inputs)
    ):
        return generator_rules(module)
    raise ValueError(f"GigaTok has no {type(module).__name__}")
