"""JPEG-LM: next-token prediction of the bytes of JPEG files (arXiv:2408.08459).

    python train.py configs/jpeg_lm.py:VARIANT
    python sample.py runs/jpeg_lm_VARIANT                  runs/mnist5k_jpeg_lm for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, files of at most 125 bytes without their header

Images of 256 pixels, without any condition:

    variant          parameters   tokens                published
    7b               6.5B         12,288, a byte each   no FID that can be compared

The tokenizer is Pillow's JPEG encoder, with quality 25 and a restart marker after every 16x16 pixels: nothing is trained. Sampling
draws what follows the grammar of markers, so every sample is a file that opens. The published tokens are 320 merges of bytes,
which are not released, and the header's bytes are among them; ours are single bytes without the header, whatever more than 12,288 of them is cut. Optimiser and batch of
7b are ours, two epochs of 23 million images as published.

The lower part of an image is drawn to an upper part, as in the paper, with what is white in the mask free:

    python sample.py runs/jpeg_lm_7b --edit photo.png --mask lower_half.png
"""

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label, Start
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.jpeg import JpegBytes
from ar_jax.train.optim import AdamW, Optim

IMAGES = 23_000_000  # of the published training


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_jpeg_lm",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(module=JpegBytes((32, 32), length=128, quality=10)),
        generator=GeneratorStage(
            module=Causal(Transformer(layers=4, width=128, heads=4, hidden=384, line=True), Label(128)),
            steps=500, batch=32, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(1.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def published() -> Experiment:
    backbone = Transformer(32, 4096, 32, hidden=11008, line=True, dtype=jnp.bfloat16, remat="full")
    return Experiment(
        name="jpeg_lm_7b",
        data=Data(name="image_folder", path="data/images", size=256),
        tokenizer=TokenizerStage(module=JpegBytes(longer="cut")),
        generator=GeneratorStage(
            module=Causal(backbone, Start(4096), Categorical(dtype=jnp.bfloat16, chunk=2048)),
            steps=2 * IMAGES // 512, batch=512, drop=0.0,
            optim=Optim(lr=3e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.1, clip=1.0, warmup=2000, schedule="cosine"),
            sampling=Sampling(filter=Filter(top_k=50, top_p=0.9)),
            preview_every=5000, preview_images=8, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, "7b": published}
