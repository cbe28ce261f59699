"""FlexVAR's released checkpoints: the tokenizer FlexVAE, LlamaGen's network with independent scales."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.names import Rule
from ar_jax.data import Info
from ar_jax.tokenizers.pyramid import Pyramid

SCALES = {  # by the side of the latent
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 23, 32),
}
CODEBOOK = (8912, 32)  # that of no other tokenizer with these keys
FIXED = set()  # all parameters are trained
buffers = llamagen.buffers


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """ "tokenizer", or "" for files that are not FlexVAR's: only the codebook tells them from LlamaGen's."""
    return llamagen.recognise(shapes) if tuple(shapes.get("quantize.embedding.weight", ())) == CODEBOOK else ""


def build(
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    size: int,
    heads: int,
    groups: int,
    scales: tuple[int, ...],
) -> nn.Module:
    """The network of a file; the arguments are those of `var.build`.

    Raises:
      ValueError: the scales of this size are not published.
      KeyError: a key is missing.
    """
    net = llamagen.vqgan(shapes, size or 256, groups or 32)
    scales = scales or SCALES.get(net.grid[0], ())
    if not scales:
        raise ValueError(f"the scales of a latent of {net.grid[0]}x{net.grid[1]} are not published; give --scales")
    fields = {field.name: getattr(net, field.name) for field in dataclasses.fields(net) if field.init}
    return Pyramid(**fields | {"scales": scales})


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    (height, width), scales = module.size, " ".join(map(str, module.scales))
    return f"{height}x{width} pixels to independent scales {scales} of codes out of {module.codes}", Info(), {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: FlexVAR has no such network.
    """
    if type(module) is Pyramid:
        return llamagen.vqgan_rules(module)
    raise ValueError(f"FlexVAR has no {type(module).__name__}")
