"""HMAR: next-scale prediction whose scales are then refined by masked prediction (arXiv:2506.04421).

    python train.py configs/hmar.py:VARIANT
    python sample.py runs/hmar_VARIANT                     runs/mnist5k_hmar for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, both branches trained at once

ImageNet classes, 256 pixels, in two trainings:

    variant          parameters   trains                      published, 14 steps
    d16              468M         the next-scale branch
    d16_masks        468M         then the masked branch      FID 3.01, IS 288.6
    d20              846M         the next-scale branch
    d20_masks        846M         then the masked branch      FID 2.50, IS 319.0
    d24              1.38B        the next-scale branch
    d24_masks        1.38B        then the masked branch      FID 2.10, IS 324.3
    d30              2.56B        the next-scale branch
    d30_masks        2.56B        then the masked branch      FID 1.95, IS 334.5

    python -m ar_jax.convert vae_ch160v4096z32.pth --to checkpoints/vae_ch160v4096z32
    python train.py configs/hmar.py:d16
    python train.py configs/hmar.py:d16_masks
    python sample.py runs/hmar_d16_masks --count 50000 --out hmar_d16.npz

The second trains the last eight blocks of the masked branch, its head and its mask vector for 100 epochs; they begin as
those of the next-scale branch, and nothing else moves.

The tokenizer of mnist5k is VAR's. Redrawing may be changed while sampling: --refine "1 1,3 1,1,2,5" draws anew in 2x2
and 3x3, --refine "" nowhere.

    python tests/code_usage.py runs/mnist5k_hmar
"""

import dataclasses
from functools import partial

import var

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.convert.next_scale import HMAR_SAMPLING, REFINE
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.logits import Filter
from ar_jax.generators.hmar import Hmar
from ar_jax.generators.inputs import NextScale
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.orders import scales
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.train.optim import Optim

MASKS = 8  # last blocks that the two branches do not share


def mnist5k() -> Experiment:
    base, head = var.mnist5k(), Categorical(bias=True, std=0.001)

    def net(layers: int, final: bool = True) -> AdaLN:
        return AdaLN(layers, width=128, heads=4, sees="step", final=final, depth=4)

    return Experiment(
        name="mnist5k_hmar",
        data=base.data,
        tokenizer=base.tokenizer,
        generator=GeneratorStage(
            module=Hmar(
                net(2, final=False), Label(128, std=0.05), head, NextScale(channels=8), emphasis="lognorm", tail=net(2),
                masks=net(2), mask_head=head.clone(), refine=((1,), (1, 3), (1, 1, 2, 5), (4, 4, 8)),
            ),
            order=scales, steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", clip=2.0, ema=0.99),
            sampling=Sampling(Ramp(1.5), filter=Filter(100, top_p=0.96)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def class_conditional(depth: int, masks: bool = False) -> Experiment:
    """Training of the next-scale branch, or after it of the masked branch."""
    trunk, (label, head) = depth - MASKS, var.ends(depth)
    module = Hmar(
        var.network(depth, 0, trunk, sees="step", final=False), label, head, NextScale(), emphasis="lognorm",
        tail=var.network(depth, trunk, MASKS, sees="step"), masks=var.network(depth, trunk, MASKS, sees="step"),
        mask_head=head.clone(), refine=REFINE if masks else (), branches=("masks",) if masks else ("scales",),
    )  # fmt: skip
    settings = var.optimiser(depth, 100 if masks else var.EPOCHS[depth], batch=1024 if depth == 30 else 768)
    settings["optim"] = dataclasses.replace(settings["optim"], trained=(r"^/mask",) if masks else (r"^/(?!mask)",))
    if masks:
        settings |= {"start": f"runs/hmar_d{depth}", "alike": (("masks", "tail"), ("mask_head", "head"))}
    return Experiment(
        name=f"hmar_d{depth}" + ("_masks" if masks else ""),
        data=var.imagenet(256, 1 / 1.125),
        tokenizer=TokenizerStage(module=ResidualPyramid(), path="checkpoints/vae_ch160v4096z32"),
        generator=GeneratorStage(
            module=module, order=scales, sampling=HMAR_SAMPLING[depth], **settings
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{
        f"d{depth}{part}": partial(class_conditional, depth, masks=part == "_masks")
        for depth in (16, 20, 24, 30)
        for part in ("", "_masks")
    },
}
