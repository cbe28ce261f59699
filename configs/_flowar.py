"""What FlowAR's configs share (arXiv:2412.15205)."""

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, TokenizerStage
from ar_jax.convert.flowar import EVALUATED, SCALES, SPAN
from ar_jax.convert.mar import SCALE
from ar_jax.data import Data
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import scales
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.train.optim import Optim

IMAGENET = 1_281_167  # training images
# layers of each stack, width, heads; layers and width of the flow head, whether it looks at hidden rows
SIZES = {
    "s": (6, 768, 12, 2, 1024, False),
    "l": (8, 1024, 16, 12, 1024, True),
    "h": (15, 1536, 16, 12, 1536, True),
}


def flowar(size: str) -> Experiment:
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
        data=Data(name="image_folder", path="data/imagenet/train", size=256, crop="random", min_fraction=8 / 9, flip=True),
        tokenizer=TokenizerStage(
            module=LatentPyramid(KLVAE(shift=(0.0,), scale=(SCALE,)), SCALES), path="checkpoints/kl16_pyramid"
        ),
        generator=GeneratorStage(
            module=Causal(backbone, Label(width), head, NextLatent()), order=scales,
            steps=400 * updates, batch=2048, drop=0.1,
            optim=Optim(
                lr=4e-4, betas=(0.9, 0.95), weight_decay=0.02,
                # published is 3 for a sum over scales, weighted by their tokens / 256; ours is the mean over 341 tokens
                clip=3.0 * 256 / 341,
                warmup=100 * updates, schedule="cosine", end_lr=1e-5, ema=0.9999,
            ),
            sampling=Sampling(Ramp(guidance)), preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip
