"""HMAR-d16, ImageNet classes, 256 pixels: 468M parameters (arXiv:2506.04421), its next-scale branch.

    python -m ar_jax.convert vae_ch160v4096z32.pth --to checkpoints/vae_ch160v4096z32
    python train.py configs/hmar_d16.py
    python train.py configs/hmar_d16_masks.py
    python sample.py runs/hmar_d16_masks --count 50000 --out hmar_d16.npz

Published: no figure in the released files. This is the first of two trainings; the second adds the masked branch.
"""

from _var import hmar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return hmar(16)
