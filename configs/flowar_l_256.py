r"""FlowAR-L, ImageNet classes, 256 pixels: 586.9M parameters, scales 1 2 4 8 16 of KL-16 latents (arXiv:2412.15205).

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16_pyramid --scales 1 2 4 8 16
    python train.py configs/flowar_l_256.py
    python sample.py runs/flowar_l_256 --count 50000 --out flowar_l.npz

    with fewer steps at large scales (DiSA, arXiv:2505.20297):
    python sample.py runs/flowar_l_256 --anneal linear --inner-steps 25 --last-inner-steps 15 --guidance 1.4 \
        --count 50000 --out flowar_l_disa.npz

Published: FID 1.90 with guidance 2.4, 25 steps, guided up to t = 0.9, 50,000 samples. The ramp counts guidance from 0: here it is
1.4 at the last scale.
"""

from _flowar import flowar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return flowar("l")
