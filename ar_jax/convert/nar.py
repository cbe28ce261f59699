"""NAR's released checkpoints: class- and text-conditional transformers. Their tokenizers are LlamaGen's."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.names import LINEAR, PLAIN, Rule, count
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.nar import Branched, ByAxis, Neighbouring
from ar_jax.orders import Diagonals

Shapes = Mapping[str, tuple[int, ...]]

FIXED = llamagen.FIXED
BRANCH = 1  # blocks of the branch; not in the file, which numbers all blocks alike


def generator_rules(generator: Neighbouring) -> list[Rule]:
    trunk, blocks = llamagen.gpt_rules(generator), "backbone/blocks/"
    branch = [
        (path.replace(blocks, "backbone/branches_0/"), key, layout._replace(first=generator.backbone.layers))
        for path, key, layout in trunk
        if path.startswith(blocks)
    ]
    return [
        *trunk,
        *branch,
        ("backbone/branch_norms_0/scale", "medusa_norm.weight", PLAIN),
        ("head/others_0/kernel", "medusa_output.weight", LINEAR),
    ]


def generator(shapes: Shapes, tokens: int, heads: int = 0) -> Neighbouring:
    """The transformer whose state dict has these keys and shapes; see `llamagen.gpt`."""
    base = llamagen.gpt(shapes, tokens, heads)
    net, layers = base.backbone, count(shapes, r"layers\.(\d+)\.") - BRANCH
    if layers < 1:
        raise ValueError(f"it has {layers + BRANCH} blocks; needed are one of the branch and others before it")
    backbone = Branched(layers, net.width, net.heads, hidden=net.hidden, dropout=net.dropout, branch=BRANCH)
    module = Neighbouring(backbone, base.conditioning, ByAxis(), dropout=base.dropout)
    return module.on(base.spec)


def recognise(shapes: Shapes) -> str:
    """ "generator" or "" for files that are not NAR's, judged by a few keys; `build` may yet fail."""
    return "generator" if "medusa_output.weight" in shapes else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file.

    Args:
      kind: what `recognise` said.
      shapes: by key.
      size: of the images in pixels, 16 a token; 0 is 256.
      heads: 0 takes the published number.
      groups, scales: unused.
    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    if size % 16:
        raise ValueError(f"--size is {size}; it must be a multiple of 16 pixels, one token each")
    return generator(shapes, ((size or 256) // 16) ** 2, heads)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    words, info, settings = llamagen.describe(module)
    sampling = {} if info.captions else {"sampling": codec.encode(Sampling(Interval(2.0)))}
    return f"{words}, by diagonals", info, settings | {"order": codec.encode(Diagonals())} | sampling


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: NAR has no such network.
    """
    if type(module) is not Neighbouring or type(module.head) is not ByAxis or module.backbone.axes != 2:
        raise ValueError(f"NAR has no {type(module).__name__}")
    return generator_rules(module)
