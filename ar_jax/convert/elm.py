"""ELM's released generators, with one and with two sub-codes; its tokenizers are those of `binary_latent`."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.names import LINEAR, PLAIN, Rule, count
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval, Rising
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Joined, Previous
from ar_jax.heads.bitwise import Bitwise
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 1792: 28}  # by width; not in the file
SAMPLING = {  # of the published scripts, by width; those of other widths are not known, the first is taken for them
    1024: Sampling(Rising(4.0), filter=Filter(1000)),
    1536: Sampling(Interval(2.0), filter=Filter(400)),
}
FIXED = set()  # all parameters are trained


def inputs(sub_codes: int) -> Previous:
    """What rows carry: of one sub-code its vector, of several a projection of theirs."""
    return Joined(shared=False, bias=False) if sub_codes > 1 else Previous()


def generator_rules(generator: Causal) -> list[Rule]:
    k = len(generator.spec.codes)
    output = ("output.{}.weight", LINEAR._replace(pieces=k)) if k > 1 else ("output.weight", LINEAR)
    own = ("inputs/embedding", "head/readout/kernel")
    return [
        *(rule for rule in llamagen.gpt_rules(generator) if rule[0] not in own),
        ("inputs/embedding", "tok_embedder.weight", PLAIN),
        (r"inputs/code_(\d+)/embedding", r"tok_embedder.\1.weight", PLAIN),
        ("inputs/projection/kernel", "proj.weight", LINEAR),
        ("head/readout/kernel", *output),
    ]


def generator(shapes: Shapes, tokens: tuple[int, int], heads: int = 0) -> Causal:
    """The transformer whose state dict has these keys and shapes; the file holds neither its heads nor its tokens.

    Raises:
      ValueError: the number of heads is not published for the width.
    """
    k = count(shapes, r"tok_embedder\.(\d+)\.")
    codes, width = shapes["tok_embedder.0.weight" if k else "tok_embedder.weight"]
    heads = heads or HEADS.get(width, 0)
    if not heads:
        raise ValueError(f"the file does not hold the number of heads and width {width} is not published; give --heads")
    hidden = shapes["layers.0.feed_forward.w1.weight"][0]
    backbone = Transformer(count(shapes, r"layers\.(\d+)\."), width, heads, hidden=hidden, dropout=0.1)
    classes = shapes["cls_embedding.embedding_table.weight"][0] - 1
    spec = TokenSpec(grid(*tokens), codes=(codes,) * (k or 1))
    head = Bitwise(bias=False, std=0.0)
    return Causal(backbone, Label(width), head, inputs(k or 1), dropout=0.1).complete(spec, Info(classes=classes))


def recognise(shapes: Shapes) -> str:
    """ "generator", or "" for files that are not of ELM's generators, judged by a few keys; `build` may yet fail."""
    return "generator" if {"tok_embedder.weight", "tok_embedder.0.weight"} & shapes.keys() else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`. Images are of 256 pixels unless a size is given."""
    if size % 16:
        raise ValueError(f"--size is {size}; it must be a multiple of 16 pixels, one token each")
    return generator(shapes, ((size or 256) // 16,) * 2, heads)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    net, info, codes = module.backbone, Info(classes=module.conditioning.classes), module.spec.codes
    _, rows, columns = module.spec.coords.max(0) + 1
    words = (
        f"{net.layers} layers of width {net.width} with {net.heads} heads, {rows}x{columns} tokens with {len(codes)} "
        f"sub-codes of {codes[0]}, {info.classes} classes"
    )
    sampling = SAMPLING.get(net.width, SAMPLING[1024])
    return words, info, {"order": codec.encode(raster), "sampling": codec.encode(sampling)}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: ELM has no such network.
    """
    if type(module) is Causal and type(module.head) is Bitwise and isinstance(module.conditioning, Label):
        return generator_rules(module)
    raise ValueError(f"ELM has no {type(module).__name__} with the head {type(getattr(module, 'head', None)).__name__}")
