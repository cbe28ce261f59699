r"""FlowAR-H, ImageNet classes, 256 pixels: 1913.3M parameters, scales 1 2 4 8 16 of KL-16 latents (arXiv:2412.15205).

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16_pyramid --scales 1 2 4 8 16
    python train.py configs/flowar_h_256.py
    python sample.py runs/flowar_h_256 --count 50000 --out flowar_h.npz

    with fewer steps at large scales (DiSA, arXiv:2505.20297):
    python sample.py runs/flowar_h_256 --anneal linear --inner-steps 50 --last-inner-steps 15 --guidance 1.4 \
        --count 50000 --out flowar_h_disa.npz

Published: FID 1.65 with guidance 2.4, 50 steps, guided up to t = 0.7, 50,000 samples. The ramp counts guidance from 0: here it is
1.4 at the last scale.
"""

from _flowar import flowar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return flowar("h")
