r"""FlashAR: a trained raster model learns to draw by diagonals in a short second training (arXiv:2605.09430).

    python train.py configs/flashar.py:VARIANT
    python sample.py runs/flashar_VARIANT                  runs/mnist5k_flashar for the small one

What ran here: configs/README.md.

Small, for two CPU cores; begins as the quickstart's run, which has to be there:

    mnist5k          5,000 real digits, 64 tokens in 15 steps

ImageNet classes, 256 pixels, begun as LlamaGen's weights, 75,000 updates, 31 steps in place of 256:

    variant          parameters   published
    b_256            132M         none of this size
    l_256            374M         none of this size
    xl_256           817M         none of this size

    python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i
    python -m ar_jax.convert c2i_B_256.pt --to checkpoints/c2i_B_256
    python -m ar_jax.tokenize checkpoints/vq_ds16_c2i --data.path data/imagenet \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_256
    python train.py configs/flashar.py:b_256

LlamaGen's XL was published for 384 pixels; its weights fit, as positions are turned. The branch begins as the last layer, its norm
and readout as those of the trunk. Not here: distillation from the raster model, a planned mix, replaced input tokens, Emu3.5.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen
import nar

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.flashar import Fused
from ar_jax.generators.nar import Branched, Neighbouring
from ar_jax.nets.conditioning import Label
from ar_jax.orders import Diagonals
from ar_jax.train.optim import Optim

START = {  # what a raster model lacks, and what it begins as
    "fresh": ("backbone/branch", "head/(others|gate)"),
    "alike": (
        ("backbone/branches_0", "backbone/blocks"), ("backbone/branch_norms_0", "backbone/norm"), ("head/others_0", "head/readout"),
    ),
}  # fmt: skip


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    backbone = Branched(layers=4, width=128, heads=4, hidden=384, ahead=1)
    return dataclasses.replace(
        base,
        name="mnist5k_flashar",
        tokenizer=TokenizerStage(module=base.tokenizer.module, path="runs/mnist5k_llamagen"),
        generator=dataclasses.replace(
            base.generator, module=Neighbouring(backbone, Label(128), Fused()), start="runs/mnist5k_llamagen", **START,
            order=Diagonals(), sampling=Sampling(Interval(2.5), Constant(0.9)), steps=250,
            optim=Optim(lr=1e-3, warmup=20, schedule="cosine", ema=0.98), preview_every=125, save_every=125,
        ),
    )  # fmt: skip


def stage(model: str, base: GeneratorStage) -> GeneratorStage:
    """LlamaGen's training of its own weights, in steps of diagonals."""
    net = nar.network(model, Label)
    module = net.clone(backbone=net.backbone.clone(ahead=1), head=Fused(dtype=jnp.bfloat16))
    start = f"checkpoints/c2i_{model.upper()}_{384 if model == 'xl' else 256}"
    return nar.stage(base, module, steps=30 * 2500, sampling=Sampling(Interval(2.0)), start=start, **START)


def class_conditional(model: str) -> Experiment:
    base = llamagen.class_conditional(model, 256)
    return dataclasses.replace(base, name=f"flashar_{model}_256", generator=stage(model, base.generator))


VARIANTS = {
    "mnist5k": mnist5k,
    **{f"{model}_256": partial(class_conditional, model) for model in ("b", "l", "xl")},
}
