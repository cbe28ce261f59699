"""VAR-d24, ImageNet classes, 256 pixels: 1.0B parameters (arXiv:2404.02905).

    python -m ar_jax.convert vae_ch160v4096z32.pth --to checkpoints/vae_ch160v4096z32
    python train.py configs/var_d24.py
    python sample.py runs/var_d24 --count 50000 --out var_d24.npz

Published: FID 2.33 with guidance 1.5, top-k 900, top-p 0.96, 50,000 samples.
"""

from _var import var

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return var(24)
