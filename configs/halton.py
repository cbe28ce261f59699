r"""Halton-MaskGIT: codes in sets that lie far apart, in the order of a Halton sequence (ICLR 2025).

    python train.py configs/halton.py:VARIANT
    python sample.py runs/halton_VARIANT                   runs/mnist5k_halton for the small one

What ran here, and names of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, on the tokenizer of the quickstart; 16 steps

ImageNet classes on LlamaGen's codes, 256 or 384 pixels, 32 steps:

    variant          parameters   guidance   published
    t_256            23M          2.5        FID 10.2
    s_256            69M          2.0        FID 6.40
    s_384            69M          2.0        FID 6.11
    b_256            142M         1.7        FID 4.17
    b_384            142M         1.7        FID 4.15
    l_384            480M         1.5        FID 2.59

    python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i
    python train.py configs/halton.py:b_256
    python sample.py runs/halton_b_256 --count 50000 --out halton.npz

Published guidance w is 1 + w here. Every image begins at a place of its own in the sequence, as published figures are drawn;
`--order.rolled False` begins all at its first point.
"""

from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.convert.halton import GUIDANCE, HEADS
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.halton_maskgit import HaltonMaskGIT, Registered
from ar_jax.nets.conditioning import Label
from ar_jax.orders import Halton
from ar_jax.train.optim import AdamW, Optim

SIZES = {"t": (6, 384), "s": (12, 512), "b": (12, 768), "l": (24, 1024)}  # layers, width


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    return Experiment(
        name="mnist5k_halton",
        data=base.data,
        tokenizer=base.tokenizer,
        generator=GeneratorStage(
            module=HaltonMaskGIT(Registered(4, 128, 4, hidden=384), Label(128)),
            order=Halton(16), steps=500, batch=64, drop=0.1,
            optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.0)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def class_conditional(size: str, pixels: int) -> Experiment:
    """ImageNet classes on LlamaGen's codes; in bfloat16."""
    layers, width = SIZES[size]
    net = Registered(layers, width, HEADS[width], dropout=0.1, dtype=jnp.bfloat16, remat="dots")
    return Experiment(
        name=f"halton_{size}_{pixels}",
        data=Data(name="image_folder", path="data/imagenet", size=pixels, flip=True),
        tokenizer=TokenizerStage(path="checkpoints/vq_ds16_c2i"),
        generator=GeneratorStage(
            module=HaltonMaskGIT(net, Label(width)), order=Halton(32), steps=1_000_000, batch=256, drop=0.1,
            optim=Optim(
                lr=1e-4, rule=AdamW((0.9, 0.999)), weight_decay=0.03, clip=1.0, warmup=2500, schedule="cosine", hold=0.9,
                end_lr=1e-6,
            ),
            sampling=Sampling(Interval(GUIDANCE[width])),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{
        f"{size}_{pixels}": partial(class_conditional, size, pixels)
        for size, pixels in (("t", 256), ("s", 256), ("s", 384), ("b", 256), ("b", 384), ("l", 384))
    },
}
