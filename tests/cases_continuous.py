"""Methods of continuous tokens as tiny lines; `test_laws_continuous.py` runs their laws."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from trees import random_params

from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.generators.himar import HiMar, Resolutions, TaskViT
from ar_jax.generators.lightgen import Aligned, Crossed, LightGen
from ar_jax.generators.masked import Masked
from ar_jax.generators.maskgit import MaskGIT
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.flow import Flow
from ar_jax.heads.gaussian_mixture import GaussianMixture
from ar_jax.heads.joint_diffusion import JointDiffusion
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import GPT, ViT
from ar_jax.orders import Confident, Shuffled, raster
from ar_jax.tokens import TokenSpec, grid, pyramid

SPEC = TokenSpec(grid(3, 4), channels=3)
INFO = Info(classes=3, captions=True, text_rows=4, text_width=6)


@dataclasses.dataclass(frozen=True)
class Case:
    generator: Any
    order: Callable = raster
    images: int = 4

    @functools.cached_property
    def params(self):
        """Random everywhere: zero-initialised readouts would make the laws hold trivially."""
        return random_params(self.generator, 0.2)

    @functools.cached_property
    def tokens(self):
        spec = self.generator.spec
        return np.random.default_rng(2).normal(size=(self.images, spec.n, spec.channels)).astype(np.float32)

    @functools.cached_property
    def batch(self):
        random = np.random.default_rng(3)
        mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool)[: self.images]
        text = random.normal(size=(*mask.shape, 6)).astype(np.float32) * mask[..., None]
        return {"label": np.arange(self.images, dtype=np.int32) % 3, "text": text, "text_mask": mask}

    def ordered(self, **fields):
        """Its order, an order per image where it is drawn."""
        order = dataclasses.replace(self.order, **fields) if fields else self.order
        return order(self.generator.spec, jax.random.split(jax.random.key(6), self.images), self.images, 0)


def masked(head, **net):
    encoder, decoder = ViT(2, 16, 2, hidden=24, **net), ViT(1, 24, 3, **net)
    return Case(Masked(encoder, decoder, Label(16, apart=True), head, buffer=2).complete(SPEC, INFO), Shuffled(5, 2))


def himar():
    head, joint = Diffusion(16, 1, multiplier=2, steps="3", latest=800), JointDiffusion(16, 1, 2, 2, "3", 800)
    generator = HiMar(TaskViT(1, 16, 2, hidden=24), TaskViT(1, 24, 3), Label(16, apart=True), head, joint, buffer=2)
    return Case(generator.complete(TokenSpec(pyramid((2, (3, 4))), channels=3), INFO), Resolutions(3, 3, scans=1))


def causal(conditioning, head):
    return Case(Causal(Transformer(layers=2, width=16, heads=2, hidden=24), conditioning, head).complete(SPEC, INFO))


CASES = {
    "himar": himar(),
    "mar": masked(Diffusion(16, 2, multiplier=2, steps="6", anneal="linear", last_steps=3, latest=800), remat="dots"),
    "masked_flow": masked(Flow(16, 1, steps=5, solver="heun", remat="full"), remat="full"),
    "causal_flow": causal(Caption(16), Flow(16, 2, steps=4, anneal="linear", last_steps=2, solver="stochastic")),
    "givt": causal(Label(16), GaussianMixture(3)),
    "lightgen": Case(
        LightGen(
            ViT(1, 16, 2, hidden=24), ViT(1, 24, 3), Aligned(ViT(1, 16, 2)), Flow(16, 1, steps=3),
            cross=Crossed(2, 24, 3, remat="full"), places=5,
        ).complete(SPEC, INFO),
        Shuffled(4, 2),
    ),
    "givt_masked": Case(
        MaskGIT(GPT(2, 16, 2, hidden=24, rows=0), Label(16), GaussianMixture(3)).complete(SPEC, INFO), Confident(5)
    ),
}
MASKED = {name: case for name, case in CASES.items() if isinstance(case.generator, Masked)}
