r"""FlowAR-S, ImageNet classes, 256 pixels: 171.7M parameters, scales 1 2 4 8 16 of KL-16 latents (arXiv:2412.15205).

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16_pyramid --scales 1 2 4 8 16
    python train.py configs/flowar_s_256.py
    python sample.py runs/flowar_s_256 --count 50000 --out flowar_s.npz

    with fewer steps at large scales (DiSA, arXiv:2505.20297):
    python sample.py runs/flowar_s_256 --anneal linear --inner-steps 25 --last-inner-steps 15 --guidance 3.2 \
        --count 50000 --out flowar_s_disa.npz

Published: guidance 4.3, 25 steps: no FID stated for it. The ramp counts guidance from 0: here it is
3.3 at the last scale.
"""

from _flowar import flowar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return flowar("s")
