r"""xAR-B, ImageNet classes, 256 pixels: 172.6M parameters, four cells of 8x8 KL-16 latents (arXiv:2502.20388).

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16
    python -m ar_jax.tokenize checkpoints/kl16 --data.path data/imagenet/train --flip --out cache/imagenet_kl16_256
    python train.py configs/xar_b_256.py
    python sample.py runs/xar_b_256 --count 50000 --out xar_b.npz

    with fewer steps for later cells (DiSA, arXiv:2505.20297):
    python sample.py runs/xar_b_256 --anneal linear --inner-steps 50 --last-inner-steps 15 \
        --count 50000 --out xar_b_disa.npz

Published: sampled with guidance 2.7, 40 steps; its FID is not among the facts this file was made from. The ramp counts guidance from 0: here it is 1.7
at the last cell.
"""

from _xar import xar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return xar("b")
