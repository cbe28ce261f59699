"""MAR-H on ImageNet, 256 pixels: 943M parameters (arXiv:2406.11838).

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16
    python train.py configs/mar_h_256.py

Published: FID 1.55, IS 303.7 with 256 steps, 100 denoising steps each, and the guidance below.
With few steps, and denoising steps annealed as in DiSA (arXiv:2505.20297):
    python train.py configs/mar_h_256.py --generator.order.steps 64 --generator.module.head.steps 50 \\
        --generator.module.head.anneal linear --generator.module.head.latest 950
"""

from _mar import class_conditional

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return class_conditional("h")
