"""GIVT: Gaussian mixtures on the latents of an autoencoder, in raster order or as MaskGIT (arXiv:2312.02116).

    python train.py configs/givt.py:VARIANT
    python sample.py runs/givt_VARIANT                     runs/mnist5k_givt for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, in raster order

The tokenizer, ImageNet, 256 pixels:

    variant          tokens                     published
    vae              16x16 of 16 numbers        the network and the weight of its KL loss; weights of other losses are ours

ImageNet classes, 256 pixels, 500 epochs, the size the authors call default:

    variant          parameters   published
    causal_256       304M         FID 3.35: temperature 0.95, density-based guidance of weight 0.4 (guidance 1.4 here)
    maskgit_256      304M         FID 4.53: 16 steps, choice temperature 35, density-based guidance of weight 0.1
                                  (guidance 1.1 here)

    python train.py configs/givt.py:vae --out checkpoints
    python train.py configs/givt.py:causal_256

The released training never drops labels, although it says so; ours drops a tenth, without which there is no guidance.
"""

from functools import partial

import jax.numpy as jnp
import mar

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.generators.maskgit import MaskGIT
from ar_jax.heads.gaussian_mixture import GaussianMixture
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import GPT
from ar_jax.orders import Confident, raster
from ar_jax.tokenizers.givt_vae import GivtVAE
from ar_jax.train.optim import AdamW, Optim

IMAGENET = 1_281_167  # training images
BATCH = 8192
STEPS = 500 * IMAGENET // BATCH
DATA = Data(name="image_folder", path="data/imagenet", size=256, crop="random", flip=True)


def mnist5k() -> Experiment:
    """On the tokenizer of MAR's."""
    base = mar.mnist5k()
    return Experiment(
        name="mnist5k_givt",
        data=base.data,
        tokenizer=base.tokenizer,
        generator=GeneratorStage(
            module=Causal(Transformer(layers=4, width=128, heads=4, hidden=384), Label(128), GaussianMixture(8)),
            steps=700, batch=64, optim=Optim(lr=1e-3, clip=3.0, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(1.4), Constant(0.95)),
            log_every=50, preview_every=350, save_every=350,
        ),
    )  # fmt: skip


def vae() -> Experiment:
    """Training of the autoencoder on 256-pixel images."""
    return Experiment(
        name="givt_vae",
        data=DATA,
        tokenizer=TokenizerStage(
            module=GivtVAE(kl=5e-5, dtype=jnp.bfloat16),
            losses=Losses(reconstruction="l2", lpips=0.1, adversarial=0.1, adversarial_start=0, adaptive=False),
            steps=100 * (IMAGENET // 256), batch=256, optim=Optim(lr=1e-4, rule=AdamW((0.0, 0.99)), weight_decay=0.0, ema=0.999),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def class_conditional(kind: str) -> Experiment:
    """ImageNet classes for 500 epochs: "causal" or "maskgit" in the size the authors call default, in bfloat16."""
    masked = kind == "maskgit"
    network = GPT(
        layers=24, width=1024, heads=16, rows=0 if masked else 256, dropout=0.4 if masked else 0.2, dtype=jnp.bfloat16,
        remat="dots",
    )  # fmt: skip
    parts = network, Label(1024, std=1.0), GaussianMixture(16)
    return Experiment(
        name=f"givt_{kind}_256",
        data=DATA,
        tokenizer=TokenizerStage(module=GivtVAE(), path="checkpoints/givt_vae"),
        generator=GeneratorStage(
            module=MaskGIT(*parts) if masked else Causal(*parts), order=Confident() if masked else raster,
            steps=STEPS, batch=BATCH, drop=0.1,
            optim=Optim(
                lr=1e-3, rule=AdamW((0.9, 0.95)), weight_decay=0.0 if masked else 1e-4, clip=1.0, warmup=STEPS // 10,
                schedule="cosine",
            ),
            sampling=Sampling(Interval(1.1)) if masked else Sampling(Interval(1.4), Constant(0.95)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "vae": vae,
    "causal_256": partial(class_conditional, "causal"),
    "maskgit_256": partial(class_conditional, "maskgit"),
}
