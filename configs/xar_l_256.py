r"""xAR-L, ImageNet classes, 256 pixels: 608.4M parameters, four cells of 8x8 KL-16 latents (arXiv:2502.20388).

    python -m ar_jax.convert kl16.ckpt --to checkpoints/kl16
    python -m ar_jax.tokenize checkpoints/kl16 --data.path data/imagenet/train --flip --out cache/imagenet_kl16_256
    python train.py configs/xar_l_256.py
    python sample.py runs/xar_l_256 --count 50000 --out xar_l.npz

    with fewer steps for later cells (DiSA, arXiv:2505.20297):
    python sample.py runs/xar_l_256 --anneal linear --inner-steps 50 --last-inner-steps 15 \
        --count 50000 --out xar_l_disa.npz

Published: sampled with guidance 2.3, 50 steps; its FID is not among the facts this file was made from. The ramp counts guidance from 0: here it is 1.3
at the last cell.
"""

from _xar import xar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return xar("l")
