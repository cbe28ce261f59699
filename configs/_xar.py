"""What xAR's configs share (arXiv:2502.20388)."""

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, TokenizerStage
from ar_jax.convert.mar import SCALE
from ar_jax.convert.xar import EVALUATED
from ar_jax.data import Data
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import Cells
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.train.optim import Optim

IMAGENET = 1_281_167  # training images
SIZES = {"b": (8, 768, 12), "l": (16, 1024, 16), "h": (20, 1280, 16)}  # layers of each stack, width, heads


def xar(size: str) -> Experiment:
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
        data=Data(name="image_folder", path="data/imagenet/train", size=256),
        tokenizer=TokenizerStage(module=KLVAE(shift=(0.0,), scale=(SCALE,)), path="checkpoints/kl16"),
        generator=GeneratorStage(
            module=BlockFlow(backbone, Label(width), steps=steps, dtype=jnp.bfloat16), order=Cells(8),
            steps=800 * updates, batch=2048, drop=0.1, tokens="cache/imagenet_kl16_256",
            optim=Optim(
                lr=4e-4, betas=(0.9, 0.96), weight_decay=0.02, clip=1.0, warmup=100 * updates, ema=0.9999
            ),
            sampling=Sampling(Ramp(guidance)), preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip
