r"""xAR: next-cell prediction by a flow over noisy earlier cells (arXiv:2502.20388).

    python train.py configs/xar.py:VARIANT
    python sample.py runs/xar_VARIANT                      runs/mnist5k_xar for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits; 12 minutes

ImageNet classes, 256 pixels, 800 epochs, four cells of 8x8 KL-16 latents. The ramp counts guidance from 0: what is
published as 2.2 is 1.2 here, at the last cell:

    variant          parameters   published, 50,000 samples
    b_256            172.6M       FID 1.72, IS 280.4: guidance 2.7, 40 steps
    l_256            608.4M       FID 1.28, IS 292.5: guidance 2.3, 50 steps
    h_256            1186.0M      FID 1.24, IS 301.6: guidance 2.2, 50 steps

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16
    python -m ar_jax.tokenize checkpoints/kl16 --data.path data/imagenet --flip --out cache/imagenet_kl16_256
    python train.py configs/xar.py:b_256
    python sample.py runs/xar_b_256 --count 50000 --out xar_b.npz

With fewer steps for later cells (DiSA, arXiv:2505.20297):

    python sample.py runs/xar_b_256 --anneal linear --inner-steps 50 --last-inner-steps 15 \
        --count 50000 --out xar_b_disa.npz
"""

from functools import partial

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.convert.mar import SCALE
from ar_jax.convert.xar import EVALUATED
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval, Ramp
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import Cells
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.patches import Patches
from ar_jax.train.optim import AdamW, Optim

IMAGENET = 1_281_167  # training images
SIZES = {"b": (8, 768, 12), "l": (16, 1024, 16), "h": (20, 1280, 16)}  # layers of each stack, width, heads


def mnist5k() -> Experiment:
    """On patches of pixels."""
    return Experiment(
        name="mnist5k_xar",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(module=Patches(size=(32, 32), patch=4, channels=1)),
        generator=GeneratorStage(
            module=BlockFlow(EncoderDecoder(layers=2, width=128, heads=4), Label(128, std=1.0), steps=25),
            order=Cells(4), steps=1200, batch=64,
            optim=Optim(lr=1e-3, rule=AdamW((0.9, 0.96)), weight_decay=0.02, warmup=100, schedule="cosine", ema=0.995),
            sampling=Sampling(Interval(3.0)),
            log_every=50, preview_every=600, save_every=600,
        ),
    )  # fmt: skip


def class_conditional(size: str) -> Experiment:
    """ImageNet for 800 epochs, on cached latents of centre crops and their mirror images."""
    layers, width, heads = SIZES[size]
    guidance, steps = EVALUATED[width]
    backbone = EncoderDecoder(
        layers, width, heads, dropout=0.1, attention_dropout=0.1, dtype=jnp.bfloat16,
        remat="none" if size == "b" else "dots",
    )  # fmt: skip
    updates = IMAGENET // 2048
    return Experiment(
        name=f"xar_{size}_256",
        data=Data(name="image_folder", path="data/imagenet", size=256),
        tokenizer=TokenizerStage(module=KLVAE(shift=(0.0,), scale=(SCALE,)), path="checkpoints/kl16"),
        generator=GeneratorStage(
            module=BlockFlow(backbone, Label(width), steps=steps, dtype=jnp.bfloat16), order=Cells(8),
            steps=800 * updates, batch=2048, drop=0.1, tokens="cache/imagenet_kl16_256",
            optim=Optim(
                lr=4e-4, rule=AdamW((0.9, 0.96)), weight_decay=0.02, clip=1.0, warmup=100 * updates, ema=0.9999
            ),
            sampling=Sampling(Ramp(guidance)), preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, **{f"{size}_256": partial(class_conditional, size) for size in SIZES}}
