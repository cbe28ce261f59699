r"""MaskGIT: codes in any order, the surest first (arXiv:2202.04200), as the generators of TiTok have it (arXiv:2406.07550).

    python train.py configs/maskgit.py:VARIANT
    python sample.py runs/maskgit_VARIANT                  runs/mnist5k_maskgit for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, on the tokenizer of the quickstart; 12 steps

ImageNet classes, 256 pixels, on TiTok's tokenizers of 32, 64 and 128 codes on a line:

    variant          parameters   published
    titok_l32        177M         FID 2.77: 8 steps, guidance 5.5 here, temperature 9.5
    titok_b64        177M         FID 2.48: 8 steps, guidance 4.0 here, temperature 11
    titok_s128       295M         FID 1.97: 64 steps, guidance 6.9, temperature 2.8; a U-ViT

    python -m ar_jax.convert tokenizer_titok_l32.bin --to checkpoints/tokenizer_titok_l32
    python train.py configs/maskgit.py:titok_l32
    python sample.py runs/maskgit_titok_l32 --count 50000 --out titok_l32.npz

Every step draws all hidden codes; those with the largest logits, up to noise, stay. The noise is the temperature, which falls to 0
(`Fading`); published guidance g of the first two is 1 + g here.
"""

from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.convert import maskgit as released
from ar_jax.data import Data
from ar_jax.decode.guidance import Rising
from ar_jax.decode.temperature import Fading
from ar_jax.nets.bert import Bert, UViT
from ar_jax.orders import Confident
from ar_jax.train.optim import AdamW, Optim

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
NETS = {  # number of tokens, network
    "l32": (32, Bert(24, 768, 16, hidden=3072, dtype=jnp.bfloat16, remat="dots", **DROPOUT)),
    "b64": (64, Bert(24, 768, 16, hidden=3072, dtype=jnp.bfloat16, remat="dots", **DROPOUT)),
    "s128": (128, UViT(20, 1024, 16, hidden=4096, dtype=jnp.bfloat16, remat="dots")),
}


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    return Experiment(
        name="mnist5k_maskgit",
        data=base.data,
        tokenizer=base.tokenizer,
        generator=GeneratorStage(
            module=released.module(Bert(layers=4, width=128, heads=4, hidden=384), codes=256),
            order=Confident(12, "arccos"),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Rising(4.0, "lagging"), Fading(1.5, eased=True)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def class_conditional(model: str) -> Experiment:
    """ImageNet classes for 800 epochs, on the codes of centre crops and their mirror images; in bfloat16."""
    n, network = NETS[model]
    steps, guidance, temperature = released.PUBLISHED[n]
    return Experiment(
        name=f"maskgit_titok_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=256, flip=True),
        tokenizer=TokenizerStage(path=f"checkpoints/tokenizer_titok_{model}"),
        generator=GeneratorStage(
            module=released.module(network, codes=4096), order=Confident(steps, "arccos"),
            steps=500_000, batch=2048, drop=0.1,
            optim=Optim(
                lr=2e-4, rule=AdamW((0.9, 0.96)), weight_decay=0.03, clip=1.0, warmup=10_000, schedule="cosine", end_lr=1e-5,
                ema=0.999,
            ),
            sampling=Sampling(guidance, temperature),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, **{f"titok_{model}": partial(class_conditional, model) for model in NETS}}
