r"""xAR-H, ImageNet classes, 256 pixels: 1186.0M parameters, four cells of 8x8 KL-16 latents (arXiv:2502.20388).

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16
    python -m ar_jax.tokenize checkpoints/kl16 --data.path data/imagenet/train --flip --out cache/imagenet_kl16_256
    python train.py configs/xar_h_256.py
    python sample.py runs/xar_h_256 --count 50000 --out xar_h.npz

    with fewer steps for later cells (DiSA, arXiv:2505.20297):
    python sample.py runs/xar_h_256 --anneal linear --inner-steps 50 --last-inner-steps 15 \
        --count 50000 --out xar_h_disa.npz

Published: FID 1.24 with guidance 2.2, 50 steps, 50,000 samples. The ramp counts guidance from 0: here it is 1.2
at the last cell.
"""

from _xar import xar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return xar("h")
