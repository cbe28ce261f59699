r"""FlowAR: next-scale prediction of latents, a flow for every scale (arXiv:2412.15205).

    python train.py configs/flowar.py:VARIANT
    python sample.py runs/flowar_VARIANT                   runs/mnist5k_flowar for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits; 20 minutes

ImageNet classes, 256 pixels, 400 epochs, scales 1 2 4 8 16 of KL-16 latents. The ramp counts guidance from 0: what is
published as 2.4 is 1.4 here, at the last scale:

    variant          parameters   published, 50,000 samples                             with DiSA (below)
    s_256            171.7M       guidance 4.3, 25 steps; no FID is stated for it       --inner-steps 25 --guidance 3.2
    l_256            586.9M       FID 1.90: guidance 2.4, 25 steps, guided to t = 0.9   --inner-steps 25 --guidance 1.4
    h_256            1913.3M      FID 1.65: guidance 2.4, 50 steps, guided to t = 0.7   --inner-steps 50 --guidance 1.4

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16_pyramid --scales 1 2 4 8 16
    python train.py configs/flowar.py:l_256
    python sample.py runs/flowar_l_256 --count 50000 --out flowar_l.npz

With fewer steps at large scales (DiSA, arXiv:2505.20297):

    python sample.py runs/flowar_l_256 --anneal linear --inner-steps 25 --last-inner-steps 15 --guidance 1.4 \
        --count 50000 --out flowar_l_disa.npz
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import mar

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.convert.flowar import EVALUATED, SCALES, SPAN
from ar_jax.convert.mar import SCALE
from ar_jax.data import Data
from ar_jax.decode.guidance import Ramp
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import scales
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.train.optim import AdamW, Optim

IMAGENET = 1_281_167  # training images
# layers of each stack, width, heads; layers and width of the flow head, whether it looks at hidden rows
SIZES = {
    "s": (6, 768, 12, 2, 1024, False),
    "l": (8, 1024, 16, 12, 1024, True),
    "h": (15, 1536, 16, 12, 1536, True),
}


def mnist5k() -> Experiment:
    """On the tokenizer of MAR's."""
    base = mar.mnist5k()
    latents = base.tokenizer.module
    return Experiment(
        name="mnist5k_flowar",
        data=base.data,
        tokenizer=dataclasses.replace(base.tokenizer, module=LatentPyramid(latents, scales=(1, 2, 4, 8))),
        generator=GeneratorStage(
            module=Causal(
                EncoderDecoder(layers=2, width=96, heads=4, span=8, last_positions=True),
                Label(96),
                JointFlow(width=96, depth=2, heads=4, span=8, steps=16),
                NextLatent(channels=latents.latent),
            ),
            order=scales, steps=1000, batch=64,
            optim=Optim(lr=1e-3, weight_decay=0.02, clip=3.0, warmup=100, schedule="cosine", ema=0.99),
            sampling=Sampling(Ramp(2.0)),
            log_every=50, preview_every=500, save_every=500,
        ),
    )  # fmt: skip


def class_conditional(size: str) -> Experiment:
    """ImageNet for 400 epochs, latents drawn anew for every image."""
    layers, width, heads, depth, head_width, cross = SIZES[size]
    guidance, steps, guided = EVALUATED[width]
    # published in full precision; the residual stream of bfloat16 products stays in bfloat16
    net = {"dtype": jnp.bfloat16, "remat": "dots" if size == "h" else "none"}
    backbone = EncoderDecoder(
        layers, width, heads, dropout=0.1, attention_dropout=0.1, span=SPAN, last_positions=True, **net
    )  # fmt: skip
    head = JointFlow(head_width, depth, cross=cross, span=SPAN, steps=steps, guided_until=guided, **net)
    updates = IMAGENET // 2048
    return Experiment(
        name=f"flowar_{size}_256",
        # short side to 9/8 of the size, then a random crop; here the short side is drawn up to that
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=8 / 9, flip=True),
        tokenizer=TokenizerStage(
            module=LatentPyramid(KLVAE(shift=(0.0,), scale=(SCALE,)), SCALES), path="checkpoints/kl16_pyramid"
        ),
        generator=GeneratorStage(
            module=Causal(backbone, Label(width), head, NextLatent()), order=scales,
            steps=400 * updates, batch=2048, drop=0.1,
            optim=Optim(
                lr=4e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.02,
                # published is 3 for a sum over scales, weighted by their tokens / 256; ours is the mean over 341 tokens
                clip=3.0 * 256 / 341,
                warmup=100 * updates, schedule="cosine", end_lr=1e-5, ema=0.9999,
            ),
            sampling=Sampling(Ramp(guidance)), preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, **{f"{size}_256": partial(class_conditional, size) for size in SIZES}}
