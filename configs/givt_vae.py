"""GIVT's autoencoder on ImageNet, 256 pixels: 16x16 tokens of 16 numbers, as they are (arXiv:2312.02116).

    python train.py configs/givt_vae.py

The network and the weight of its KL loss are published; weights of the other losses are ours.
"""

from _givt import tokenizer

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return tokenizer("givt_vae")
