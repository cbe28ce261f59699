"""What GIVT's configs share (arXiv:2312.02116)."""

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.generators.maskgit import MaskGIT
from ar_jax.heads.gaussian_mixture import GaussianMixture
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import GPT
from ar_jax.orders import Confident, raster
from ar_jax.tokenizers.givt_vae import GivtVAE
from ar_jax.train.optim import Optim

IMAGENET = 1_281_167  # training images
BATCH = 8192
STEPS = 500 * IMAGENET // BATCH
DATA = Data(name="image_folder", path="data/imagenet/train", size=256, crop="random", flip=True)


def tokenizer(name: str) -> Experiment:
    """Training of the autoencoder on 256-pixel images."""
    return Experiment(
        name=name,
        data=DATA,
        tokenizer=TokenizerStage(
            module=GivtVAE(kl=5e-5, dtype=jnp.bfloat16),
            losses=Losses(reconstruction="l2", lpips=0.1, adversarial=0.1, adversarial_start=0, adaptive=False),
            steps=100 * (IMAGENET // 256), batch=256, optim=Optim(lr=1e-4, betas=(0.0, 0.99), weight_decay=0.0, ema=0.999),
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
                lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0 if masked else 1e-4, clip=1.0, warmup=STEPS // 10,
                schedule="cosine",
            ),
            sampling=Sampling(Interval(1.1)) if masked else Sampling(Interval(1.4), Constant(0.95)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip
