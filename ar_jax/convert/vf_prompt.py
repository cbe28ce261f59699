"""LlamaGen's tokenizers for images of two sizes, as VF prompt takes them; it has no released files of its own."""

from typing import Any

import flax.linen as nn

from ar_jax.convert import llamagen
from ar_jax.convert.names import Rule
from ar_jax.data import Info
from ar_jax.tokenizers.two_sizes import TwoSizes
from ar_jax.tokens import sides

FIXED = set()  # all parameters are trained


def recognise(shapes: dict[str, tuple[int, ...]]) -> str:
    """ "tokenizer" or ""; LlamaGen, which comes before, takes all files where nobody asks for this family."""
    return "tokenizer" if llamagen.recognise(shapes) == "tokenizer" else ""


def build(
    kind: str, shapes: dict[str, tuple[int, ...]], *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> TwoSizes:
    """The network of a file; the arguments are those of `llamagen.build`. `scales` are two, the small picture's first."""
    base = llamagen.build(kind, shapes, size=size, heads=heads, groups=groups, scales=())
    if len(scales) != 2 or sides(scales[1]) != base.grid or not 0 < scales[0] <= scales[1]:
        raise ValueError(
            f"--scales is {scales or 'not given'}; give the sides of the small picture and of the image's {base.grid} codes, such as "
            f"--scales {base.grid[0] // 4} {base.grid[0]}"
        )
    return TwoSizes(base, scales[0])


def describe(module: TwoSizes) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    rows, columns = sides(module.prompt)
    return f"{llamagen.describe(module.base)[0]}, before them {rows}x{columns} of a small picture", Info(), {}


def buffers(module: TwoSizes, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return llamagen.buffers(module.base, shapes)


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: there is no such network.
    """
    if type(module) is not TwoSizes:
        raise ValueError(f"VF prompt has no {type(module).__name__}")
    return llamagen.rules(module.base)
