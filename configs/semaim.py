r"""SemAIM: patches predicted in an order of the image's own, to learn features; it draws no images (arXiv:2312.10457).

    python train.py configs/semaim.py:VARIANT
    python tests/probe.py runs/mnist5k_semaim              how good its features are, of the small one

What ran here: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, patches of 4x4 pixels

ImageNet, 224 pixels, patches of 16x16, 800 epochs; published is the top-1 accuracy after fine-tuning:

    variant          parameters   published
    b                175M         84.1%
    l                613M         85.8%
    h                1.3B         none

    python train.py configs/semaim.py:b --data.path IMAGENET

Not as published: crops are square windows of random scale, as everywhere here. Of the targets that the paper has beside pixels, the
network's own features are here (`--generator.module.target features`); an average's, DINO's and CLIP's are not, nor is fine-tuning.
"""

from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, TokenizerStage
from ar_jax.data import Data
from ar_jax.generators.semaim import SemAIM, TwoStreams
from ar_jax.nets.conditioning import Nothing
from ar_jax.tokenizers.patches import Patches
from ar_jax.train.optim import AdamW, Optim

SIZES = {"b": (12, 768, 12), "l": (24, 1024, 16), "h": (32, 1280, 16)}  # layers of each stream, width, heads
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours in [0, 1]


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_semaim",
        data=Data(name="mnist5k", size=32, crop="random"),
        tokenizer=TokenizerStage(module=Patches(size=(32, 32), patch=4, channels=1)),
        generator=GeneratorStage(
            module=SemAIM(TwoStreams(4, 128, 4, hidden=384, queries=2), Nothing(128)), steps=500, batch=64,
            optim=Optim(lr=2e-3, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=3.0, warmup=50, schedule="cosine"),
            log_every=50, preview_every=0, save_every=250,
        ),
    )  # fmt: skip


def published(size: str) -> Experiment:
    """In bfloat16."""
    layers, width, heads = SIZES[size]
    epoch = llamagen.IMAGENET // 2048
    pixels = Patches(
        (224, 224), 16, shift=tuple(2 * m - 1 for m in MEAN), scale=tuple(0.5 / deviation for deviation in DEVIATION)
    )
    return Experiment(
        name=f"semaim_{size}",
        data=Data(name="image_folder", path="data/imagenet", size=224, crop="random", min_fraction=0.45, flip=True),
        tokenizer=TokenizerStage(module=pixels),
        generator=GeneratorStage(
            module=SemAIM(TwoStreams(layers, width, heads, dtype=jnp.bfloat16, remat="dots"), Nothing(width)),
            steps=800 * epoch, batch=2048,
            optim=Optim(
                lr=1.6e-3, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=3.0, warmup=30 * epoch, schedule="cosine",
                no_decay=("first$",),
            ),
            preview_every=0, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, **{size: partial(published, size) for size in SIZES}}
