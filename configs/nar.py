r"""NAR: all tokens of a diagonal at once, each from its neighbours beside and above (arXiv:2503.10696).

    python train.py configs/nar.py:VARIANT
    python sample.py runs/nar_VARIANT                      runs/mnist5k_nar for the small one

What ran here and pictures: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 64 tokens in 15 steps

ImageNet classes, 256 pixels, 300 epochs, 31 steps in place of 256:

    variant          parameters   published
    b_256            131M         figures only
    m_256            295M         figures only
    l_256            373M         figures only
    xl_256           816M         figures only

From text, on 120 rows of Flan-T5-XL features:

    variant          parameters   tokens               published
    xl_t2i_256       819M         16x16, stage 1       none
    xl_t2i_512       819M         32x32, stage 2       none

Tokenizers, codes and caption features are LlamaGen's (configs/llamagen.py):

    python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i
    python -m ar_jax.tokenize checkpoints/vq_ds16_c2i --data.path data/imagenet \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_256
    python train.py configs/nar.py:b_256
    python sample.py runs/nar_b_256 --count 50000 --out b_256.npz

Stage 1 takes 60 epochs of 4M pictures, stage 2 40 epochs of pictures whose number is not published; here it is LlamaGen's length.
Videos (the paper's 2+1 dimensions) need a tokenizer whose levels are frames: `Branched` then has a branch for time.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Sampling
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.nar import Branched, ByAxis, Neighbouring
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.orders import Diagonals

SIZES = {"b": (12, 768, 12), "m": (18, 1024, 16), "l": (24, 1024, 16), "xl": (36, 1280, 20)}  # layers, width, heads


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    return dataclasses.replace(
        base,
        name="mnist5k_nar",
        generator=dataclasses.replace(
            base.generator, module=Neighbouring(Branched(layers=4, width=128, heads=4, hidden=384), Label(128)),
            order=Diagonals(), sampling=Sampling(Interval(2.5), Constant(0.9)),
        ),
    )  # fmt: skip


def network(model: str, conditioning: type[nn.Module]) -> Neighbouring:
    """The transformer of a published size, in bfloat16."""
    layers, width, heads = SIZES[model]
    remat = "dots" if model == "xl" else "none"
    backbone = Branched(layers, width, heads, dropout=0.1, dtype=jnp.bfloat16, remat=remat)
    return Neighbouring(backbone, conditioning(width), ByAxis(dtype=jnp.bfloat16), dropout=0.1)


def stage(base: GeneratorStage, module: Neighbouring, **fields) -> GeneratorStage:
    """LlamaGen's training of another network, in steps of diagonals."""
    optim = dataclasses.replace(base.optim, schedule="fifths")
    return dataclasses.replace(base, module=module, order=Diagonals(), optim=optim, **fields)


def class_conditional(model: str) -> Experiment:
    """ImageNet classes for 300 epochs, on the ten-crop codes of VQ-16."""
    base = llamagen.class_conditional("b", 256)
    generator = stage(base.generator, network(model, Label), sampling=Sampling(Interval(2.0)))
    return dataclasses.replace(base, name=f"nar_{model}_256", generator=generator)


def text_conditional(size: int, data: str, steps: int) -> Experiment:
    base = llamagen.text_conditional(size, data, steps)
    return dataclasses.replace(
        base, name=f"nar_xl_t2i_{size}", generator=stage(base.generator, network("xl", Caption))
    )


VARIANTS = {
    "mnist5k": mnist5k,
    **{f"{model}_256": partial(class_conditional, model) for model in SIZES},
    "xl_t2i_256": partial(text_conditional, 256, "data/laion_coco", steps=60 * (4_000_000 // 256)),
    "xl_t2i_512": partial(text_conditional, 512, "data/aesthetic", steps=100000),
}
