"""FlowAR and xAR as tiny lines; `test_laws_flow.py` runs their laws."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from cases_continuous import INFO, Case

from ar_jax.generators.block_flow import BlockFlow
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.heads.flow import uniform
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import Cells, Interleaved, scales, whole
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokens import TokenSpec, grid

PYRAMID = LatentPyramid(
    Patches((6, 6), 2, channels=1), (1, (1, 2), 2, 3)
)  # two scales of different sides and equal size
GRID = TokenSpec(grid(3, 4), channels=3)


@dataclasses.dataclass(frozen=True)
class FlowCase(Case):
    pyramid: Any = None

    @functools.cached_property
    def tokenizer(self):
        return self.pyramid and functools.partial(self.pyramid.apply, {})

    @functools.cached_property
    def tokens(self):
        spec = self.generator.spec
        return np.random.default_rng(2).normal(size=(self.images, spec.n, spec.channels)).astype(np.float32)

    def ordered(self):
        return self.order(self.generator.spec, jax.random.split(jax.random.key(6), self.images), self.images, 0)


def flowar(remat="none", **head):
    net = EncoderDecoder(1, 16, 2, 2, 4, span=4, last_positions=True, remat=remat)
    flow = JointFlow(24, 2, heads=2, span=4, remat=remat, **head)
    return FlowCase(Causal(net, Label(16), flow, NextLatent(4)).complete(PYRAMID.spec, INFO), scales, pyramid=PYRAMID)


def xar(order, spec=GRID, **fields):
    generator = BlockFlow(EncoderDecoder(1, 16, 2, 2, remat="dots"), Label(16), **fields)
    return FlowCase(generator.complete(spec, INFO), order)


CASES = {
    "flowar": flowar(cross=False, steps=5),
    "flowar_cross": flowar("dots", steps=6, anneal="linear", last_steps=2, multiplier=2),
    "xar_tokens": xar(Cells(1), steps=4, anneal="two_stage", last_steps=2),
    "xar_cells": xar(Cells(2), steps=4, grid=uniform, solver="euler"),
    "xar_interleaved": xar(Interleaved(2), steps=3),
    "xar_scales": xar(scales, PYRAMID.spec, steps=4, anneal="cosine", last_steps=2),
    "xar_whole": xar(whole, steps=3),
}
