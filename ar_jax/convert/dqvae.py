"""DQ-VAE's released checkpoints: tokenizers with either router, and the transformers of contents and positions."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ar_jax.convert import mar
from ar_jax.convert.mar import layers
from ar_jax.convert.names import CONV, CONV1, PLAIN, Layout, Rule, count, multiple
from ar_jax.data import Info
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.dq_transformer import DQTransformer, Items, StartClass, grids
from ar_jax.nets.vit import Successive
from ar_jax.tokenizers.dqvae import DQVAE
from ar_jax.tokens import TokenSpec, pyramid

Shapes = Mapping[str, tuple[int, ...]]

CODES = "quantize.codebook."
FIXED = {CODES + "weight"}  # follows averages
BESIDE = ("loss.", "first_stage_model.")  # networks of training, and of another stage, in the same set
BEFORE = "transformer."
HEADS = 8  # of the released generator; not in the file
ROW = Layout(lambda x: x[None], lambda x: x[0])


def tokenizer_rules(tokenizer: DQVAE) -> list[Rule]:
    table = PLAIN._replace(part=(0, (tokenizer.codes, 1)))
    ends, middle = "(_coarse|_fine)", ("block_1", "attn_1", "block_2")
    rules = [
        ("codebook", CODES + "weight", table),
        ("nothing", CODES + "weight", table._replace(part=(1, table.part[1]))),
        ("place/(row|column)", lambda m: f"decoder.position_bias_learned.{m[1][:3]}_embed.weight", PLAIN),
    ]
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind, point = (CONV, CONV1) if leaf == "kernel" else (PLAIN, PLAIN)
        rules += [
            (f"encoder/(conv_out|norm_out){ends}/{leaf}", rf"encoder.\1\2.{key}", kind),
            (f"encoder/mid{ends}_1/(q|k|v|proj_out)/{leaf}", rf"encoder.mid\1.attn_1.\2.{key}", point),
            (
                rf"encoder/mid{ends}_(\d)/(\w+)/{leaf}",
                lambda m, key=key: f"encoder.mid{m[1]}.{middle[int(m[2])]}.{m[3]}.{key}",
                kind,
            ),
            (f"place/fourier/{leaf}", f"decoder.position_bias_fourier.lff.ffm.conv.{key}", point),
        ]
    router = (
        ("norm_coarse", "feature_norm_coarse"), ("norm_fine", "feature_norm_fine"), ("hidden", "gate.0"), ("out", "gate.2"),
    )  # fmt: skip
    return [*rules, *layers("gate/", "encoder.router.", router), *mar.tokenizer_rules(tokenizer)]


def generator_rules(generator: DQTransformer) -> list[Rule]:
    (cells, places), classes = grids(generator.spec), generator.conditioning.classes
    rules = [("order", BEFORE + "pos_emb", ROW), ("segment", BEFORE + "seg_emb.weight", PLAIN)]
    for ours, key, entries in (
        ("content", "content_emb", generator.codes), ("coarse", "content_coarse_pos_emb", cells),
        ("fine", "content_fine_pos_emb", places),
    ):  # fmt: skip
        table = PLAIN._replace(part=(0, (entries + 2, classes)))
        rules += [
            (ours, f"{BEFORE}{key}.weight", table),
            (f"conditioning/{ours}", f"{BEFORE}{key}.weight", table._replace(part=(1, table.part[1]))),
        ]
    pairs = (
        ("attention_norm", "ln1"), ("mlp_norm", "ln2"), ("query", "attn.query"), ("key", "attn.key"), ("value", "attn.value"),
        ("out", "attn.proj"), ("fc1", "mlp.0"), ("fc2", "mlp.2"),
    )  # fmt: skip
    for net, one in (("places", "position"), ("contents", "content")):
        rules += layers(f"{net}/blocks/", f"{BEFORE}{one}_transformer.{{}}.", pairs)
        head = ((f"{net[:-1]}_norm", f"{one}_head.0"), (f"{net[:-1]}_readout", f"{one}_head.1"))
        rules += layers("", BEFORE, head)
    return rules


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files that are not DQ-VAE's, judged by a key; `build` may yet fail."""
    if "transformer.content_coarse_pos_emb.weight" in shapes:
        return "generator"
    return "tokenizer" if "encoder.norm_out_coarse.weight" in shapes else ""


def tokenizer(shapes: Shapes, size: int, groups: int = 32) -> DQVAE:
    """The tokenizer whose state dict has these keys and shapes."""
    features = shapes["encoder.conv_in.weight"][0]

    def mult(side):
        levels = max(count(shapes, rf"{side}\.(\d+)\."), 1)
        return tuple(multiple(shapes, f"{side}.{i}.block.0.conv1.weight", features) for i in range(levels))

    encoder, decoder = mult("encoder.down"), mult("decoder.up")
    levels = len(encoder)

    def attention(side):
        return [level for level in range(levels) if f"{side}.{level}.attn.0.q.weight" in shapes]

    found = attention("encoder.down")
    if [level for level in found if level < levels - 1] != attention("decoder.up"):
        raise ValueError(
            f"its encoder has attention on levels {found}, its decoder on {attention('decoder.up')}; it must be the same, "
            "but for the encoder's last"
        )
    rows, code_features = shapes[CODES + "weight"]
    rate = 2 ** (levels - 1)
    places = tuple(shapes[f"decoder.position_bias_learned.{side}_embed.weight"][0] for side in ("row", "col"))
    own = tuple(rate * side // 2 for side in places)
    if size and (size, size) != own:
        raise ValueError(f"--size is {size}, but it has positions of {places[0]}x{places[1]} places: {own[0]} pixels")
    return DQVAE(
        size=own, features=features, mult=encoder, decoder_mult=() if decoder == encoder[:-1] else decoder,
        res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."), latent=shapes["post_quant_conv.weight"][0],
        codes=rows - 1, code_features=code_features, groups=groups, channels=shapes["encoder.conv_in.weight"][1],
        attention=tuple(level - levels for level in found),
        router="features" if "encoder.router.gate.0.weight" in shapes else "entropy",
    )  # fmt: skip


def generator(shapes: Shapes, heads: int = 0) -> DQTransformer:
    """The transformers whose state dict has these keys and shapes."""
    entries = {name: shapes[f"{BEFORE}{name}.weight"][0] for name in (
        "content_emb", "content_coarse_pos_emb", "content_fine_pos_emb"
    )}  # fmt: skip
    coarse, fine = entries["content_coarse_pos_emb"], entries["content_fine_pos_emb"]
    side = round((max(fine - coarse, 0) / 3) ** 0.5)  # fine places are four times as many as cells, and the rest is the same
    classes = coarse - 2 - side**2
    if fine - coarse != 3 * side**2 or side < 1 or classes < 1:
        raise ValueError(
            f"content_coarse_pos_emb has {coarse} rows and content_fine_pos_emb {fine}, which are no square of cells with "
            "four places each, and classes"
        )
    _, rows, width = shapes[BEFORE + "pos_emb"]

    def net(name):
        return Successive(
            count(shapes, rf"transformer\.{name}_transformer\.(\d+)\."), width, heads or HEADS,
            hidden=shapes[f"{BEFORE}{name}_transformer.0.mlp.0.weight"][0], dropout=0.1, attention_dropout=0.1,
        )  # fmt: skip

    module = DQTransformer(net("position"), net("content"), StartClass(width), rows=rows)
    spec = TokenSpec(pyramid((side, 2 * side)), codes=(entries["content_emb"] - 1 - classes,))
    return module.complete(spec, Info(classes=classes))


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`. A file knows the size of its images by its positions.

    Raises:
      ValueError: no network has such a size or such levels.
      KeyError: a key is missing.
    """
    return tokenizer(shapes, size, groups or 32) if kind == "tokenizer" else generator(shapes, heads)


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The averages that the codebook follows; a generator's masks."""
    if isinstance(module, DQTransformer):
        rows = module.rows or module.length - 1
        nets = (("position", module.places), ("content", module.contents))
        return {
            f"{BEFORE}{name}_transformer.{i}.attn.mask": (1, 1, rows, rows)
            for name, net in nets
            for i in range(net.layers)
        }
    return {CODES + "cluster_size_ema": (module.codes,), CODES + "embed_ema": (module.codes, module.code_features)}


def fills(module: nn.Module) -> dict[str, np.ndarray]:
    """The masks of a generator: ones where a row sees another."""
    masks = buffers(module, {}) if isinstance(module, DQTransformer) else {}
    return {key: np.tril(np.ones(shape, np.float32)) for key, shape in masks.items()}


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, DQTransformer):
        info, (rows, columns) = Info(classes=module.conditioning.classes), module.spec.scales[0]
        words = (
            f"{module.places.layers} layers for places and {module.contents.layers} for codes, of width {module.places.width} "
            f"with {module.places.heads} heads, {rows}x{columns} cells, {module.codes} codes, {info.classes} classes"
        )
        order = Items(module.length - 1 - grids(module.spec)[1])
        return words, info, {"order": codec.encode(order), "sampling": codec.encode(Sampling(filter=Filter(top_k=300)))}
    (height, width), (rows, columns), (more, most) = module.size, module.grid, module.fine_grid
    words = (
        f"{height}x{width} pixels to {rows}x{columns} cells of one code, or of four of {more}x{most}, out of {module.codes}; "
        f"cells are chosen by {module.router}"
    )
    return words, Info(), {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: DQ-VAE has no such network.
    """
    if type(module) is DQVAE:
        return tokenizer_rules(module)
    if type(module) is DQTransformer:
        return generator_rules(module)
    raise ValueError(f"DQ-VAE has no {type(module).__name__}")
