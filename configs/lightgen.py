r"""LightGen: masked autoregression from text, on few images (arXiv:2503.08619).

    python train.py configs/lightgen.py:VARIANT
    python sample.py runs/lightgen_VARIANT --captions "red heart"    runs/emoji_lightgen for the small one

What ran here: configs/README.md.

Small, for two CPU cores; what it needs stands in configs/llamagen.py:

    emoji            text to image: colour emoji by their Unicode names

Images of captions, 256 pixels, on 128 rows of Flan-T5-XXL features:

    variant          parameters   published
    base             362M         none
    large            792M         weights; the paper says 0.7B
    huge             1.5B         none

    python -m ar_jax.convert lightgen.pth --to checkpoints/lightgen
    python train.py configs/lightgen.py:large --data.path IMAGES --data.text FEATURES.safetensors

Not as published: the tokenizer, which is theirs of Stable Diffusion 3.5 and not read here, is a KL autoencoder of the same shape
of latents; captions without a picture of theirs are not distilled; the last stages, at 512 and 1024 pixels, begin as
`--generator.start RUN` and `--data.size 512`, whose positions are resized from those of 256; DPO is not here.
"""

import dataclasses
from functools import partial

import flextok
import jax.numpy as jnp
import mar

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.lightgen import Aligned, Crossed, LightGen
from ar_jax.heads.diffusion import Diffusion
from ar_jax.nets.vit import ViT
from ar_jax.orders import Shuffled
from ar_jax.train.optim import AdamW, Optim

SIZES = {"base": (768, 12, 12), "large": (1024, 16, 16), "huge": (1280, 20, 16)}  # width, layers of each stack, heads
PAIRS = 2_000_000  # images with captions


def emoji() -> Experiment:
    """Unicode names as captions, MiniLM as encoder."""
    base = mar.mnist5k()
    tokenizer = dataclasses.replace(
        base.tokenizer, module=base.tokenizer.module.clone(features=16, groups=8, latent=8), steps=800,
        preview_every=400, save_every=400,
    )  # fmt: skip
    net = {"width": 128, "heads": 4, "hidden": 384}
    module = LightGen(
        ViT(3, **net), ViT(3, **net), Aligned(ViT(2, **net)), Diffusion(width=192, depth=3, steps="50", latest=950),
        cross=Crossed(3, **net),
    )  # fmt: skip
    return dataclasses.replace(
        base,
        name="emoji_lightgen",
        data=Data(name="emoji", size=32, crop="random", min_fraction=0.9, text="minilm", text_rows=16),
        tokenizer=tokenizer,
        generator=dataclasses.replace(
            base.generator, module=module, steps=1500, sampling=Sampling(Interval(3.0)), preview_every=500, save_every=500
        ),
    )


def published(size: str) -> Experiment:
    """1,000 epochs at 256 pixels, in bfloat16."""
    width, layers, heads = SIZES[size]

    def net(kind, depth):
        return kind(depth, width, heads, dropout=0.1, attention_dropout=0.1, dtype=jnp.bfloat16, remat="dots")

    module = LightGen(
        net(ViT, layers), net(ViT, layers), Aligned(net(ViT, 6)),
        Diffusion(width * 3 // 2, 8, dtype=jnp.bfloat16, remat="full"), cross=net(Crossed, layers), places=16,
    )  # fmt: skip
    epoch = PAIRS // 2048
    return Experiment(
        name=f"lightgen_{size}",
        data=Data(name="image_folder", path="data/captioned", size=256, flip=True, text_rows=128),
        tokenizer=TokenizerStage(module=flextok.autoencoder().clone(patch=2), path="runs/flextok_vae/tokenizer"),
        generator=GeneratorStage(
            module=module, order=Shuffled(steps=64), steps=1000 * epoch, batch=2048, drop=0.1,
            optim=Optim(
                lr=8e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.02, clip=3.0, warmup=100 * epoch, ema=0.9999,
                no_decay=("/head/",),
            ),
            sampling=Sampling(Interval(4.0)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"emoji": emoji, **{size: partial(published, size) for size in SIZES}}
