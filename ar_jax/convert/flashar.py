"""FlashAR's form of LlamaGen's transformers: a branch from an inner layer, and a gate. Their tokenizers are LlamaGen's."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import nar
from ar_jax.convert.names import LINEAR, PLAIN, Rule
from ar_jax.data import Info
from ar_jax.generators.flashar import Fused
from ar_jax.generators.nar import Neighbouring

Shapes = Mapping[str, tuple[int, ...]]

FIXED = nar.FIXED
AHEAD = nar.BRANCH  # layers before the end from which the branch starts; not in the file


def recognise(shapes: Shapes) -> str:
    """ "generator" or "" for files that are not FlashAR's, judged by a few keys; `build` may yet fail."""
    return "generator" if {"hv_gate_mlp.0.weight", "hv_mix_logit"} & shapes.keys() else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `nar.build`."""
    base = nar.build(kind, shapes, size=size, heads=heads, groups=groups, scales=scales)
    gate = shapes.get("hv_gate_mlp.0.weight")
    head = Fused(mix="gate", hidden=gate[0]) if gate else Fused(mix="scalar")
    return base.clone(backbone=base.backbone.clone(ahead=AHEAD), head=head).on(base.spec)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    return nar.describe(module)


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in such files.

    Raises:
      ValueError: FlashAR has no such network.
    """
    if type(module) is not Neighbouring or type(module.head) is not Fused:
        raise ValueError(f"FlashAR has no {type(module).__name__}")
    return [
        *nar.generator_rules(module),
        ("head/part", "hv_mix_logit", PLAIN),
        ("head/gate_in/kernel", "hv_gate_mlp.0.weight", LINEAR),
        ("head/gate_out/kernel", "hv_gate_mlp.2.weight", LINEAR),
        ("head/gate_out/bias", "hv_gate_mlp.2.bias", PLAIN),
    ]
