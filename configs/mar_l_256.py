"""MAR-L on ImageNet, 256 pixels: 479M parameters (arXiv:2406.11838).

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16
    python train.py configs/mar_l_256.py

Published: FID 1.78, IS 296.0 with 256 steps, 100 denoising steps each, and the guidance below.
With few steps, and denoising steps annealed as in DiSA (arXiv:2505.20297), which needs no training:
    python sample.py runs/mar_l_256 --steps 64 --anneal linear --inner-steps 50 --last-inner-steps 5
"""

from _mar import class_conditional

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return class_conditional("l")
