"""FlexVAR-d24, ImageNet classes, trained at up to 256 pixels: 1.04B parameters (arXiv:2502.20313).

    python -m ar_jax.convert FlexVAE.pth --to checkpoints/flexvae_1to16 \\
        --scales 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
    python train.py configs/flexvar_d24.py
    python sample.py runs/flexvar_d24 --count 50000 --out flexvar_d24.npz
    python sample.py runs/flexvar_d24 --scales 1,2,3,4,5,6,7,8,9,10,12,14,16 --out 13_steps.png
    python sample.py runs/flexvar_d24 --scales 1,2,3,4,5,6,7,8,9,10,12,14,16,23,32 --guidance 3 --out 512_pixels.png

Published: FID 2.21, IS 299.1 in 10 steps with guidance 2.5, top-k 900, top-p 0.95, 50,000 samples.
"""

from _var import flexvar

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return flexvar(24)
