r"""TokenBridge: masked autoregression on the rounded numbers of continuous tokens (arXiv:2503.16430).

    python train.py configs/tokenbridge.py:VARIANT
    python sample.py runs/tokenbridge_VARIANT              runs/mnist5k_tokenbridge for the small one

What ran here, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, on the tokenizer of mar.py:mnist5k, 4 numbers of 16 levels a token

ImageNet classes, 256 pixels, 256 steps, on KL-16 with 16 numbers of 64 levels a token; 400 and 800 epochs:

    variant          parameters   published: guidance and temperature in SIZES, 50,000 samples
    l_256            487M         FID 1.76, IS 294.8
    h_256            910M         FID 1.55, IS 313.3

The tokenizer is MAR's, whose numbers are rounded without any training:

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16_levels --levels 64
    python train.py configs/tokenbridge.py:l_256

In training here the head's first row carries the vector of its dimension, as in sampling; the published training leaves it
out (`--generator.module.head.net.plain-start True`, which converted weights have).
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import mar

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.convert.mar import SCALE
from ar_jax.convert.tokenbridge import CHANNELS
from ar_jax.data import Data
from ar_jax.decode.guidance import Linear
from ar_jax.decode.temperature import Constant
from ar_jax.generators.masked import Masked
from ar_jax.heads.by_dimension import Dimensions
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import ViT
from ar_jax.orders import Shuffled
from ar_jax.tokenizers.dimensionwise import Dimensionwise
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.train.optim import AdamW, Optim

# layers of encoder and decoder each, width, layers of the head, guidance, temperature, epochs
SIZES = {"l": (16, 1024, 4, 3.1, 0.96, 400), "h": (20, 1280, 6, 3.45, 0.91, 800)}


def mnist5k() -> Experiment:
    """On the tokenizer of MAR's."""
    base = mar.mnist5k()
    latents = base.tokenizer.module
    head = Factorised(
        Dimensions(layers=2, width=64, heads=4), Categorical(bias=True, std=0.16), projected=True, guided="rows", std=1.0
    )  # fmt: skip
    return dataclasses.replace(
        base,
        name="mnist5k_tokenbridge",
        tokenizer=dataclasses.replace(base.tokenizer, module=Dimensionwise(latents, levels=16)),
        generator=dataclasses.replace(
            base.generator, module=base.generator.module.clone(head=head, vectors=latents.latent), steps=500,
            preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def class_conditional(model: str) -> Experiment:
    """ImageNet classes, on the rounded latents of KL-16."""
    layers, width, depth, guidance, temperature, epochs = SIZES[model]

    def net():
        return ViT(layers, width, 16, dropout=0.1, attention_dropout=0.1, dtype=jnp.bfloat16, remat="dots")

    small = Dimensions(depth, 1024, 8, dropout=0.1, dtype=jnp.bfloat16, remat="full")
    readout = Categorical(bias=True, std=0.043, dtype=jnp.bfloat16)  # as Xavier's
    head = Factorised(small, readout, CHANNELS, projected=True, guided="rows", std=1.0)
    latents = KLVAE(shift=(0.0,), scale=(SCALE,))
    return Experiment(
        name=f"tokenbridge_{model}_256",
        data=Data(name="image_folder", path="data/imagenet", size=256, flip=True),
        tokenizer=TokenizerStage(module=Dimensionwise(latents), path="checkpoints/kl16_levels"),
        generator=GeneratorStage(
            module=Masked(net(), net(), Label(width, apart=True), head, vectors=latents.latent),
            order=Shuffled(steps=256), steps=epochs * mar.EPOCH, batch=mar.BATCH, drop=0.1,
            optim=Optim(
                lr=4e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.02, clip=3.0, warmup=100 * mar.EPOCH, schedule="cosine",
                ema=0.9999,
            ),
            sampling=Sampling(Linear(guidance), Constant(temperature)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, **{f"{model}_256": partial(class_conditional, model) for model in SIZES}}
