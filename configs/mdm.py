r"""Masked diffusion: a masked model without a time, drawn by first hitting (arXiv:2409.02908).

    python train.py configs/mdm.py:VARIANT
    python sample.py runs/mnist5k_mdm

What ran here: configs/README.md.

Small, for two CPU cores; no sizes for images are published:

    mnist5k          5,000 real digits, on the tokenizer of the quickstart; one code a step

`--steps 16` draws several codes a step; with `--generator.look-back` each of them as at the time when it is hit.
"""

import llamagen

from ar_jax.config import Experiment, GeneratorStage, Sampling
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.masked_diffusion import FirstHitting, MaskedDiffusion
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.bert import Bert
from ar_jax.nets.conditioning import Label
from ar_jax.train.optim import Optim


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    return Experiment(
        name="mnist5k_mdm",
        data=base.data,
        tokenizer=base.tokenizer,
        generator=GeneratorStage(
            module=MaskedDiffusion(Bert(4, 128, 4, hidden=384), Label(128), Categorical(bias=True, std=0.02)),
            order=FirstHitting(64), steps=500, batch=64, drop=0.1,
            optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.0), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k}
