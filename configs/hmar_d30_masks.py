"""HMAR-d30, ImageNet classes, 256 pixels: 2.56B parameters (arXiv:2506.04421), its masked branch.

    python -m ar_jax.convert vae_ch160v4096z32.pth --to checkpoints/vae_ch160v4096z32
    python train.py configs/hmar_d30.py
    python train.py configs/hmar_d30_masks.py
    python sample.py runs/hmar_d30_masks --count 50000 --out hmar_d30.npz

Published: no figure in the released files. Trains the last eight blocks of the masked branch, its head and its mask vector
for 100 epochs; they begin as those of the next-scale branch, and nothing else moves.
"""

from _var import hmar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return hmar(30, masks=True)
