r"""Token-Shuffle: 2x2 neighbouring tokens are one row of the transformer and are drawn in one step (arXiv:2504.17789).

    python train.py configs/token_shuffle.py:VARIANT
    python sample.py runs/token_shuffle_VARIANT            runs/mnist5k_token_shuffle for the small one

What ran here and pictures: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, on the tokenizer of the quickstart; 64 tokens in 16 steps

From text, on 120 rows of Flan-T5-XL features and the codes of LlamaGen's VQ-16, each begun as the one before:

    variant          parameters   steps                                  published
    t2i_512          2.38B        1,024, tokens are not merged           none
    t2i_1024         2.61B        1,024, for 4,096 tokens                none of this stage
    t2i_2048         2.61B        4,096, for 16,384 tokens; z-loss       none

    python -m ar_jax.convert vq_ds16_t2i.pt --to checkpoints/vq_ds16_t2i_512 --size 512     and so on for 1024, 2048
    python train.py configs/token_shuffle.py:t2i_512 --data.path IMAGES --data.text FEATURES.safetensors

Nothing is released. Reported is 0.77 on GenAI-Bench's hard prompts, of width 3072, 20 layers and 2.7B parameters. Of these a part
is the table of the words: there text and image are one sequence of a language model, here text comes as features (configs/llamagen.py
says how). Heads are 24, of 128 numbers; 20, as one reads, do not divide 3072. Stages see the reported numbers of tokens, counted before
they are merged; batch, rate and the number and width of perceptrons are ours.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, Sampling
from ar_jax.decode.guidance import Rising
from ar_jax.decode.logits import Filter
from ar_jax.decode.temperature import Constant
from ar_jax.generators.token_shuffle import Merged, NextCell
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import Cells

STAGES = {  # pixels: side of a cell, perceptrons, z-loss, tokens seen
    512: (1, 0, 0.0, 50e9),
    1024: (2, 2, 0.0, 2e12),
    2048: (2, 2, 1e-4, 300e9),
}


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    backbone = Transformer(layers=4, width=128, heads=4, hidden=384, final=False)
    return dataclasses.replace(
        base,
        name="mnist5k_token_shuffle",
        generator=dataclasses.replace(
            base.generator, module=NextCell(backbone, Label(128)), order=Cells(2),
            sampling=Sampling(Rising(2.5, "half_linear"), Constant(0.9)),
        ),
    )  # fmt: skip


def text_conditional(size: int) -> Experiment:
    side, blocks, z_loss, seen = STAGES[size]
    base, batch = llamagen.text_conditional(size, "data/text_to_image", steps=0), 512
    backbone = Transformer(layers=20, width=3072, heads=24, dtype=jnp.bfloat16, remat="full", final=False)
    head = Categorical(dtype=jnp.bfloat16, chunk=1024, z_loss=z_loss)
    module = NextCell(backbone, Caption(3072), head, Merged(side=side, blocks=blocks, dtype=jnp.bfloat16))
    start = {512: "", 1024: "runs/token_shuffle_t2i_512", 2048: "runs/token_shuffle_t2i_1024"}[size]
    return dataclasses.replace(
        base,
        name=f"token_shuffle_t2i_{size}",
        generator=dataclasses.replace(
            base.generator, module=module, order=Cells(side), batch=batch, steps=round(seen / (size // 16) ** 2 / batch),
            start=start, fresh=("(compress|expand|perceptrons)",) if size == 1024 else (),
            sampling=Sampling(Rising(7.5, "half_linear"), filter=Filter(1000)),
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, **{f"t2i_{size}": partial(text_conditional, size) for size in STAGES}}
