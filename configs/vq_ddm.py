r"""VQ-DDM: codes that are replaced by any others, step by step, and brought back by a U-Net (arXiv:2112.01799).

    python train.py configs/vq_ddm.py:VARIANT
    python sample.py runs/vq_ddm_VARIANT                   runs/mnist5k_vq_ddm for the small one

What ran here: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, on the tokenizer of the quickstart; 50 of 1,000 times

Images of 256 pixels, without a condition; no weights are published:

    variant          parameters   tokens
    church           118M         16x16 of 1,024

    python train.py configs/vq_ddm.py:church --tokenizer.path RUN

The published number of steps is that of the times, 4,000; `--steps` takes fewer, and steps go back over all that they skip.
Losses are in nats, theirs in bits. Classes are ours: the vector of one is added to that of the time. Not here: the tokenizer
whose codebook is made anew of features (ReFiT).
"""

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.binary_diffusion import Denoised
from ar_jax.generators.code_diffusion import CodeDiffusion
from ar_jax.generators.corruption import Uniform
from ar_jax.nets.code_unet import CodeUNet
from ar_jax.nets.conditioning import Label, Nothing
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import AdamW, Optim


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    return Experiment(
        name="mnist5k_vq_ddm",
        data=base.data,
        tokenizer=base.tokenizer,
        generator=GeneratorStage(
            module=CodeDiffusion(CodeUNet(48, (1, 2, 2)), Label(48, std=1.0), Uniform(1000)),
            order=Denoised(50), steps=500, batch=64, drop=0.1,
            optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.0), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def church() -> Experiment:
    return Experiment(
        name="vq_ddm_church",
        data=Data(name="image_folder", path="data/church", size=256),
        tokenizer=TokenizerStage(module=VQGAN(codes=1024, code_features=256), path="checkpoints/vqgan_1024"),
        generator=GeneratorStage(
            module=CodeDiffusion(CodeUNet(dtype=jnp.bfloat16), Nothing(128), Uniform(), weigh_times=True),
            order=Denoised(4000), steps=500_000, batch=1080,
            optim=Optim(lr=1e-4, rule=AdamW((0.9, 0.999)), weight_decay=0.0, schedule="cosine"),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, "church": church}
