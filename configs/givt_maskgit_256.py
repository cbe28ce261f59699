"""GIVT-MaskGIT on ImageNet, 256 pixels: 304M parameters (arXiv:2312.02116).

    python train.py configs/givt_vae.py --out checkpoints
    python train.py configs/givt_maskgit_256.py

Published: FID 4.53 with 16 steps, choice temperature 35 and density-based guidance of weight 0.1 (which is guidance 1.1
here). The released training never drops labels, although it says so; ours drops a tenth, without which there is no guidance.
"""

from _givt import class_conditional

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return class_conditional("maskgit")
