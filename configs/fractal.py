"""FractalGen: generators inside generators, down to the pixels (arXiv:2502.17437).

    python train.py configs/fractal.py:VARIANT
    python sample.py runs/fractal_VARIANT                  runs/mnist5k_fractal for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, masked generators; 500 updates
    mnist5k_ar       the same by causal generators

ImageNet classes, 800 epochs, pixels without a tokenizer; parameters by count:

    variant          parameters   published, 50,000 samples
    ar_64            442M         64 pixels: FID 5.30, IS 56.8
    mar_64           432M         64 pixels: FID 2.72, IS 87.9
    b_256            186M         FID 11.80, IS 274.3
    l_256            437M         FID 7.30, IS 334.9
    h_256            850M         FID 6.15, IS 348.9

Bits a dimension of held-out digits:

    python tests/likelihood.py runs/mnist5k_fractal
"""

from functools import partial

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.convert.fractal import EVALUATED, STEPS
from ar_jax.data import Data
from ar_jax.decode.guidance import Linear, Rising
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.generators.fractal import Infilling, Inside, PreviousPatch
from ar_jax.heads.colours import Colours
from ar_jax.nets.conditioning import Label
from ar_jax.nets.fractal import Enclosed, Entered, FromAbove, Repeated
from ar_jax.nets.vit import ClipViT
from ar_jax.orders import Shuffled, raster
from ar_jax.tokenizers.pixels import Pixels
from ar_jax.train.optim import AdamW, Optim

IMAGENET = 1_281_167  # training images
# of every level, and of the network of colours: layers, width, heads
SMALL = (32, 1024, 16), (8, 512, 8), (3, 128, 4)
SIZES = {
    "b": ((24, 768, 12), (6, 384, 6), (3, 192, 3), (1, 64, 4)),
    "l": ((32, 1024, 16), (8, 512, 8), (4, 256, 4), (1, 64, 4)),
    "h": ((40, 1280, 16), (10, 640, 8), (5, 320, 4), (1, 64, 4)),
}


def masked(levels: tuple, sides: tuple[int, ...], guided: bool, inner_steps: int = STEPS[1], **net) -> Infilling:
    """Masked generators inside each other; `sides` are of the patches of each, from above."""
    *levels, last = levels
    head = Colours(Enclosed(*last, **net))
    for i, (layers, width, heads) in reversed(list(enumerate(levels))):
        given = FromAbove(width, 5, guided) if i else Repeated(Label(width, apart=True), 5)
        generator = Infilling(ClipViT(layers, width, heads, eps=1e-6, **net), given, head)
        if i:
            head = Inside(generator, sides[i], Shuffled(inner_steps), Colours(Enclosed(3, 128, 4, **net)) if guided else None)
    return generator


def causal(levels: tuple, sides: tuple[int, ...], **net) -> Causal:
    """Causal generators inside each other."""
    *levels, last = levels
    head = Colours(Enclosed(*last, **net))
    for i, (layers, width, heads) in reversed(list(enumerate(levels))):
        given = FromAbove(width) if i else Repeated(Label(width, apart=True))
        generator = Causal(Entered(layers, width, heads, **net), given, head, PreviousPatch())
        if i:
            head = Inside(generator, sides[i])
    return generator


def mnist5k(kind: str = "mar") -> Experiment:
    """Of grey pixels: 8x8 patches of 4x4."""
    levels, sides = ((4, 128, 4), (1, 64, 4), (1, 32, 2)), (4, 1)
    return Experiment(
        name="mnist5k_ar_fractal" if kind == "ar" else "mnist5k_fractal",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(module=Pixels((32, 32), sides[0], channels=1)),
        generator=GeneratorStage(
            module=causal(levels, sides) if kind == "ar" else masked(levels, sides, guided=False),
            order=raster if kind == "ar" else Shuffled(steps=16),
            steps=500, batch=32, optim=Optim(lr=2e-3, weight_decay=0.02, clip=3.0, warmup=30, schedule="cosine", ema=0.98),
            sampling=Sampling((Rising if kind == "ar" else Linear)(2.0)),
            log_every=50, preview_every=500, save_every=500,
        ),
    )  # fmt: skip


def class_conditional(name: str, size: int, levels: tuple, batch: int = 2048) -> Experiment:
    """ImageNet classes for 800 epochs."""
    sides, guided, epoch = ((4, 1), False, IMAGENET // batch) if size == 64 else ((16, 4, 1), True, IMAGENET // batch)
    net = {"dropout": 0.1, "dtype": jnp.bfloat16, "remat": "dots"}
    module = causal(levels, sides, **net) if name == "ar" else masked(levels, sides, guided, attention_dropout=0.1, **net)
    weight, factor = EVALUATED[type(module), tuple(width for _, width, _ in levels[:-1]), guided]
    return Experiment(
        name=f"fractal_{name}_{size}",
        data=Data(name="image_folder", path="data/imagenet", size=size, flip=True),
        tokenizer=TokenizerStage(module=Pixels((size, size), sides[0])),
        generator=GeneratorStage(
            module=module, order=raster if name == "ar" else Shuffled(steps=STEPS[0]),
            steps=800 * epoch, batch=batch, drop=0.1,
            optim=Optim(
                lr=5e-5 * batch / 256, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=3.0, warmup=40 * epoch, schedule="cosine"
            ),
            sampling=Sampling((Rising if name == "ar" else Linear)(weight), Constant(1 / factor)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "mnist5k_ar": partial(mnist5k, "ar"),
    "ar_64": partial(class_conditional, "ar", 64, SMALL),
    "mar_64": partial(class_conditional, "mar", 64, SMALL),
    "b_256": partial(class_conditional, "b", 256, SIZES["b"]),
    "l_256": partial(class_conditional, "l", 256, SIZES["l"], batch=1024),
    "h_256": partial(class_conditional, "h", 256, SIZES["h"]),
}
