"""xAR's released checkpoints: transformers that are the velocity of cells of tokens."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ar_jax.convert.flowar import backbone, backbone_rules, frequencies, mask, stacks, words
from ar_jax.convert.mar import layers
from ar_jax.convert.names import Rule
from ar_jax.data import Info
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.positions import rotary
from ar_jax.orders import Cells
from ar_jax.tokens import TokenSpec, grid

FIXED = set()  # all parameters are trained
AVERAGED = ("generator",)  # trained as MAR is, whose figures are of the average
# as evaluated, by width: guidance of the last cell less 1, steps
EVALUATED = {768: (1.7, 40), 1024: (1.3, 50), 1280: (1.2, 50)}
Shapes = Mapping[str, tuple[int, ...]]


def cells(spec: TokenSpec) -> Cells:
    """The published order: four cells."""
    return Cells(max(spec.scales[0]) // 2)


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files, whose slots lie cell by cell.

    Raises:
      ValueError: xAR has no such network.
    """
    if type(module) is not BlockFlow:
        raise ValueError(f"xAR has no {type(module).__name__}")
    pairs = (
        ("input", "z_proj"),
        ("time/fc1", "time_embed.mlp.0"),
        ("time/fc2", "time_embed.mlp.2"),
        ("output", "pred"),
    )
    found = [*backbone_rules(module.backbone), *layers("", "", pairs)]
    slot = cells(module.spec)(module.spec).slot[0]
    back = np.argsort(slot)

    def by_cell(rule):
        ours, theirs, kind = rule
        if not ours.endswith("_positions"):
            return rule
        return ours, theirs, kind._replace(
            to_torch=lambda x: kind.to_torch(x[slot]), from_torch=lambda x: kind.from_torch(x)[back]
        )  # fmt: skip

    return [by_cell(rule) for rule in found]


def recognise(shapes: Shapes) -> str:
    """ "generator", or "" for files that are not xAR's, judged by a few keys; `build` may yet fail."""
    return "generator" if {"pred.weight", "z_proj.weight", "time_embed.mlp.0.weight"} <= shapes.keys() else ""


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> BlockFlow:  # fmt: skip
    """The network of a file; the arguments are those of `llamagen.build`. All but `heads` are unused.

    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    n, channels = shapes["encoder_pos_embed_learned"][1], shapes["z_proj.weight"][1]
    side = round(n**0.5)
    if side**2 != n or side % 2:
        raise ValueError(f"the file has places for {n} tokens, which make no square of four cells")
    net = backbone(shapes, heads)
    module = BlockFlow(net, Label(net.width), steps=EVALUATED.get(net.width, (0, 50))[1])
    info = Info(classes=shapes["class_emb.weight"][0] - 1)
    return module.complete(TokenSpec(grid(side, side), channels=channels), info)


def fills(module: BlockFlow) -> dict[str, np.ndarray]:
    """Contents of the buffers."""
    order = cells(module.spec)(module.spec)
    found = {"mask": mask(order.step)} | frequencies(stacks(module.backbone))
    coords = module.spec.coords[order.slot]
    for key, (number, width, heads) in stacks(module.backbone).items():
        cos, sin = np.asarray(rotary(jnp.asarray(coords), width // heads))[:, 0]
        for i in range(number):
            found |= {f"{key.format(i)}.rope.freqs_cos": cos, f"{key.format(i)}.rope.freqs_sin": sin}
    return found


def buffers(module: BlockFlow, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """What follows from the sizes."""
    return {key: value.shape for key, value in fills(module).items()}


def describe(module: BlockFlow) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    (rows, columns), order = module.spec.scales[0], cells(module.spec)
    text = (
        f"{words(module.backbone)}, {rows}x{columns} tokens of {module.spec.channels} numbers in cells of "
        f"{order.side}x{order.side}, {module.conditioning.classes} classes"
    )
    sampling = codec.encode(Sampling(Ramp(EVALUATED.get(module.backbone.width, (0.0,))[0])))
    return text, Info(classes=module.conditioning.classes), {"order": codec.encode(order), "sampling": sampling}
